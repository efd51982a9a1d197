"""Puts the step-time account of a run together: a clock, a counter and a monitor; or nothing if it is off."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from dtrain.config.schema import Config
from dtrain.data.batches import StepBatches
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.protocol import Engine
from dtrain.tasks.protocol import Task
from dtrain.training.build import PreparedModel
from dtrain.training.model_flops import flops_per_token, peak_flops
from dtrain.training.monitors.protocol import Monitor
from dtrain.training.monitors.step_times import DeviceRate, StepTimes, TimesLog
from dtrain.training.step_time import BatchCounter, Clock, DeviceClock, HostClock, measured


class StepAccount:
    """Measures the steps of one start, as `train.time_every` says.

    Attributes:
        monitors: the monitor that writes the account; empty if it is off.
    """

    def __init__(
        self,
        config: Config,
        context: RankContext,
        task: Task,
        prepared: PreparedModel,
        tracker: TimesLog,
        engine: Callable[[], Engine],
    ) -> None:
        """
        Args:
            engine: returns the current engine.
        """
        self.monitors: Sequence[Monitor] = ()
        self._context, self._counter = context, BatchCounter(task, prepared)
        self._clock: Clock | None = None
        every, on_gpu = config.train.time_every, device_of(context.topology).type == "cuda"
        if every is None:
            return
        self._clock = DeviceClock(context.world_size) if on_gpu else HostClock(context.world_size)
        rate = _device_rate(config, context, task, prepared, engine) if on_gpu else None
        self.monitors = [StepTimes(every, self._clock, self._counter, context, tracker, rate=rate)]

    def watch(self, steps: Generator[StepBatches, None, None]) -> Generator[StepBatches, None, None]:
        """Returns the same batches, counted."""
        return steps if self._clock is None else self._counter.watch(steps)

    def measured(self) -> AbstractContextManager[None]:
        """Surrounds the steps."""
        return nullcontext() if self._clock is None else measured(self._clock, self._context.heartbeat)


def _device_rate(
    config: Config, context: RankContext, task: Task, prepared: PreparedModel, engine: Callable[[], Engine]
) -> DeviceRate:
    def per_token() -> float | None:
        if prepared.frozen_cache.border is not None:
            return None  # the estimate is of all layers
        # A token of an encoder-decoder model passes one of its two halves, which the estimate does not tell apart.
        return None if task.head.has_decoder else flops_per_token(engine().module, engine().numel)

    # The table has no peaks of fp32.
    in_half = config.engine.precision in ("bf16", "fp16")
    peak = peak_flops(torch.cuda.get_device_name(device_of(context.topology))) if in_half else None
    return DeviceRate(per_token, peak)

"""Writes where the time of the steps went on each rank, every k steps, and names a rank that all others wait for."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dtrain.console import log
from dtrain.distributed.collectives import all_gather_object, all_reduce_sum
from dtrain.distributed.rank_context import RankContext
from dtrain.training.monitors.protocol import Decision, StepEnd, StepRecord
from dtrain.training.step_time import STEP_PARTS, BatchCounter, Clock, Part, WorkCounts
from dtrain.training.stragglers import RankWork, Straggler, find_straggler

STRAGGLER_STEPS = 50
"""Minimum number of steps that a slow rank is judged by."""

MESSAGES = {
    "compute": (
        "its forward and backward passes take %.2f times as long as the median rank's. Look for other processes on its "
        "cores, a processor or GPU that is throttled, or a slower model of it (dtrain doctor)"
    ),
    "data": (
        "with the wait for its batches its work takes %.2f times as long as the median rank's. Raise data.workers, or look "
        "at the disk that it reads from"
    ),
}


class TimesLog(Protocol):
    """What StepTimes writes to. `Tracker` in runs/tracking.py implements it."""

    def event(self, event: str, **values: Any) -> None:
        """Writes a line of another event."""
        ...

    def step_time(self, step: int, values: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Writes a step_time line."""
        ...


@dataclass(frozen=True)
class DeviceRate:
    """How the model's arithmetic is rated on a GPU.

    Attributes:
        flops_per_token: returns the estimated FLOP per token of the current engine; None if there is no estimate.
        peak_flops: the GPU's peak in FLOP/s; None if it is not known.
    """

    flops_per_token: Callable[[], float | None]
    peak_flops: float | None


@dataclass(frozen=True)
class _RankTimes:
    """One rank's share of an account.

    Attributes:
        seconds: of each part.
        work: what it computed.
    """

    seconds: tuple[float, ...]
    work: WorkCounts

    @classmethod
    def of(cls, row: Sequence[float]) -> _RankTimes:
        parts = len(Part)
        return cls(tuple(row[:parts]), WorkCounts(*map(int, row[parts:])))

    def row(self) -> list[float]:
        return [*self.seconds, *map(float, self.work)]

    def plus(self, other: _RankTimes) -> _RankTimes:
        return _RankTimes.of([a + b for a, b in zip(self.row(), other.row(), strict=True)])


class StepTimes:
    """Gathers every rank's times every `every` steps and after the last one: one small collective at those steps only."""

    def __init__(
        self,
        every: int,
        clock: Clock,
        counter: BatchCounter,
        context: RankContext,
        tracker: TimesLog,
        *,
        rate: DeviceRate | None = None,
    ) -> None:
        """
        Args:
            clock: this rank's, which the heartbeat drives.
            counter: this rank's.
            rate: set on a GPU.
        """
        self._every, self._clock, self._counter = every, clock, counter
        self._context, self._tracker, self._rate = context, tracker, rate
        self._judged: list[_RankTimes] = []
        self._warned: tuple[int, str] | None = None
        self._hosts: list[str] = []

    def needs_at_once(self, end: StepEnd) -> bool:
        return end.step % self._every == 0 or end.is_last

    def after_step(self, record: StepRecord) -> Decision:
        """Collective where an account is due, which is at the same steps on every rank."""
        self._clock.poll()
        if record.step % self._every == 0 or record.is_last:
            ranks = self._gather()
            self._write(record.step, ranks)
            self._judge(record.step, ranks)
        return Decision.CONTINUE

    def _gather(self) -> list[_RankTimes]:
        """Collective. Returns every rank's times since the last call, equal on every rank."""
        own = _RankTimes(tuple(self._clock.take()), self._counter.take()).row()
        table = torch.zeros(self._context.world_size, len(own), dtype=torch.float64)
        table[self._context.rank] = torch.tensor(own, dtype=torch.float64)
        # Each number has one term that is not zero, so the sum is exact.
        return [_RankTimes.of(row) for row in all_reduce_sum(table, self._context).tolist()]

    def _write(self, step: int, ranks: Sequence[_RankTimes]) -> None:
        seconds = {part: [round(each.seconds[part], 6) for each in ranks] for part in Part}
        main = ranks[0].seconds
        in_steps = sum(main[part] for part in STEP_PARTS)
        steps, tokens = ranks[0].work.steps, sum(each.work.tokens for each in ranks)
        padded, computed = sum(each.work.padded for each in ranks), sum(each.work.computed for each in ranks)
        values: dict[str, Any] = {
            "steps": steps,
            "wall_s": round(sum(main), 6),
            **{f"{part.name.lower()}_s": values for part, values in seconds.items()},
        }
        scalars = {
            f"step_time/{part.name.lower()}": sum(seconds[part]) / len(ranks) / steps
            for part in (*STEP_PARTS, Part.CHECKPOINT)
        }
        if padded:
            rates = {"tokens_per_second": tokens / max(in_steps, 1e-9)}
            if computed:  # else what was kept of a frozen part replaces all layers
                rates |= {"fill": tokens / computed, **self._model_rates(tokens / max(in_steps, 1e-9))}
            values |= {"tokens": tokens, **rates}
            scalars |= {f"train/{name}": value for name, value in rates.items()}
        self._tracker.step_time(step, values, scalars)

    def _model_rates(self, tokens_per_second: float) -> dict[str, float]:
        """Returns model FLOP/s of all ranks, and their share of the GPUs' peak; empty without a GPU."""
        per_token = self._rate.flops_per_token() if self._rate is not None else None
        if self._rate is None or per_token is None:
            return {}
        flops, peak = per_token * tokens_per_second, self._rate.peak_flops
        utilization = {} if peak is None else {"utilization": flops / (peak * self._context.world_size)}
        return {"model_flops_per_second": flops, **utilization}

    def _judge(self, step: int, ranks: Sequence[_RankTimes]) -> None:
        """Collective where a new straggler is found, which all ranks find at the same step."""
        self._judged = [a.plus(b) for a, b in zip(self._judged, ranks, strict=True)] if self._judged else list(ranks)
        steps = self._judged[0].work.steps
        if steps < STRAGGLER_STEPS:
            return
        # Where the engine's collectives are not counted, the backward pass contains waits that nobody told apart.
        tells_apart = self._context.traffic.is_complete
        straggler = find_straggler([_work(each, with_backward=tells_apart) for each in self._judged])
        self._judged = []
        if straggler is not None:
            self._report(step, steps, straggler)

    def _report(self, step: int, steps: int, straggler: Straggler) -> None:
        """Collective. Writes an event, and prints a warning unless the same one was printed last."""
        if not self._hosts:
            self._hosts = [str(host) for host in all_gather_object(socket.gethostname(), self._context)]
        rank, host = straggler.rank, self._hosts[straggler.rank]
        self._tracker.event(
            "straggler", step=step, steps=steps, rank=rank, host=host, factor=straggler.factor, part=straggler.part
        )
        if self._warned == (rank, straggler.part):
            return
        self._warned = (rank, straggler.part)
        why = MESSAGES[straggler.part] % straggler.factor
        log.info(
            "warning: rank %d on %s is slow, and the others wait for it: over %d steps %s.", rank, host, steps, why
        )


def _work(times: _RankTimes, *, with_backward: bool) -> RankWork:
    backward = times.seconds[Part.BACKWARD] if with_backward else 0.0
    return RankWork(
        compute_s=times.seconds[Part.FORWARD] + backward,
        data_s=times.seconds[Part.DATA],
        computed=times.work.computed,
        micro_batches=times.work.micro_batches,
    )

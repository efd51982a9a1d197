"""A replica on every rank; torch's DistributedDataParallel averages the gradients.

A micro-batch may leave parameters without a gradient: dropped layers, experts without a token, heads that only some rows
use. DDP would wait for them. This engine supplies zeros for them after the last backward pass, so that every rank always
sends the same buckets, and gradients of earlier micro-batches are summed too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.comm_hooks import Bf16CommHook, CommHook
from dtrain.engine.missing_gradients import drop_unused_gradients
from dtrain.engine.powersgd import PowerSgdCommHook
from dtrain.engine.protocol import EngineTraits, ReadSlots, StepResult, StepWeight
from dtrain.engine.single import SingleEngine, replicated_memory
from dtrain.engine.state import optimizer_slots
from dtrain.models.placement import compute_device

NO_GRADIENT = 0
"""Stands for the address of a gradient that does not exist."""


class DdpEngine(SingleEngine):
    """Extends the single engine: gradients are averaged over ranks in the last micro-batch of a step."""

    name = "ddp"

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        super().__init__(module, optimizer, config, context)
        device = compute_device(module)
        if config.model.compile:
            # Splitting the graph at DDP's buckets fails with dynamic shapes in torch 2.13 ("'float' object has no
            # attribute 'meta'"). In one graph the averaging of gradients overlaps less with backward.
            torch._dynamo.config.optimize_ddp = False
        self._hook = build_comm_hook(config, context, module)
        self.extra_slots = self._hook.extra_slots
        # The host resets error feedback after a skipped step.
        self.decides_on_device = self.decides_on_device and not self.extra_slots
        # Buffers are not broadcast: running statistics are frozen or labeled inexact (docs/models.md), so a broadcast per
        # forward would cost a round trip and change nothing.
        self._replica = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            **_without_buffer_broadcast(),
            gradient_as_bucket_view=True,
            bucket_cap_mb=self._hook.bucket_mb,
        )
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._micro_batches = 0  # of this step so far
        self._zero_filled: list[int] = []  # indices in _trainable
        self._replica.register_comm_hook(self._hook, lambda hook, bucket: hook.send(bucket))
        self.model = self._replica

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        powersgd, crosses = config.engine.powersgd, context.world_size > 1
        if powersgd is None or not crosses:
            is_bf16 = config.engine.gradient_wire == "bf16" and crosses
            return EngineTraits(
                memory=replicated_memory(config, exchange=2.0 if is_bf16 else 0.0),
                other_rounding=("bf16 on the wire",) if is_bf16 else (),
            )
        notes = []
        if total_steps is not None and powersgd.start_step >= total_steps:
            notes.append(
                f"warning: gradients will never be sent as factors, because engine.powersgd.start_step={powersgd.start_step} is not below "
                f"the {total_steps} steps of this run"
            )
        return EngineTraits(
            # The old and the new error, and a copy of the gradient.
            memory=replicated_memory(config, exchange=3 * 4.0),
            other_algorithm=f"gradients of rank {powersgd.rank} from step {powersgd.start_step} on (engine.powersgd)",
            notes=tuple(notes),
        )

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return self._micro_batch(last=last)

    @contextmanager
    def _micro_batch(self, *, last: bool) -> Iterator[None]:
        self._micro_batches += 1
        if not last:
            with self._replica.no_sync(), self.autocast():
                yield
            return
        # In the first micro-batch of a step no parameter has a gradient.
        before = [_address(parameter) for parameter in self._trainable] if self._micro_batches > 1 else None
        self._micro_batches, self._hook.has_sent_all, self._zero_filled = 0, False, []
        with self.autocast():
            yield
        if not self._hook.has_sent_all:
            self._fill(before or [NO_GRADIENT] * len(self._trainable))

    def _fill(self, before: Sequence[int]) -> None:
        """Collective. Adds zeros to the gradients that the last backward pass left out, so that DDP sends their buckets.

        Args:
            before: address of each gradient before the last backward pass. DDP moves a gradient into its bucket when
                backward reaches the parameter, so the address of one that backward left out is unchanged.
        """
        missing = [index for index, address in enumerate(before) if _address(self._trainable[index]) == address]
        self._zero_filled = [index for index in missing if self._trainable[index].grad is None]
        parameters = [self._trainable[index] for index in missing]
        torch.autograd.backward(parameters, [parameter.new_zeros(()).expand_as(parameter) for parameter in parameters])
        assert self._hook.has_sent_all, "DDP did not send all buckets"

    @property
    def lacks_gradients(self) -> bool:
        return bool(self._zero_filled)

    def settle_missing_gradients(self, ranks: int) -> None:
        if ranks < self.context.world_size:
            return  # a gradient that nobody gave was filled on every rank
        # Error feedback of earlier steps is a gradient too.
        keep_nonzero = self._hook.extra_slots > 0
        drop_unused_gradients(self._trainable, self._zero_filled, self.context, keep_nonzero=keep_nonzero)

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        # DDP reorders its buckets after the first backward pass. From three ranks on, the order in which the ranks' parts
        # of a number are added depends on its place in a bucket, so a resumed run would differ in the last digit. Error
        # feedback of one bucket must not be added to another one either.
        if self.context.world_size < 3 and not self._hook.needs_warm_up:
            return
        with self.micro_batch(last=True):
            self.backward(loss() * 0.0)
        self._zero_filled = []
        self._optimizer.zero_grad(set_to_none=True)
        self._hook.begin(step)

    def step(self, weight: StepWeight, *, weighted_sq_norm: float = 0.0, discard: bool = False) -> StepResult:
        result = super().step(weight, discard=discard)
        if not result.applied:
            self._hook.reset()
        return result

    def _error_feedback(self) -> dict[str, dict[str, torch.Tensor]]:
        return self._hook.error_feedback()

    def _read_slots(self, name: str, shape: torch.Size, read: ReadSlots) -> dict[str, torch.Tensor]:
        slots = read(name, shape)
        self._hook.load_error_feedback(name, slots)
        return optimizer_slots(slots)

    def release(self) -> nn.Module:
        module = super().release()
        self.model = module
        del self._replica
        return module


def build_comm_hook(config: Config, context: RankContext, module: nn.Module) -> CommHook:
    """Returns the hook that the settings select; for one process the plain one, which sends nothing."""
    if context.world_size > 1 and config.engine.powersgd is not None:
        return PowerSgdCommHook(config, context, module)
    if context.world_size > 1 and config.engine.gradient_wire == "bf16":
        return Bf16CommHook(config, context)
    return CommHook(config, context)


def _address(parameter: nn.Parameter) -> int:
    return NO_GRADIENT if parameter.grad is None else parameter.grad.data_ptr()


def _without_buffer_broadcast() -> dict[str, Any]:
    """Returns the setting under this torch version's name: torch 2.13 renamed it, and warns of the old name."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}

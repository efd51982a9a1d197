"""A replica on every rank; torch's DistributedDataParallel averages the gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.comm_hooks import Bf16CommHook, CommHook
from dtrain.engine.powersgd import PowerSgdCommHook
from dtrain.engine.protocol import EngineTraits, ReadSlots, StepResult, StepWeight
from dtrain.engine.single import SingleEngine, replicated_memory
from dtrain.engine.state import optimizer_slots
from dtrain.errors import ConfigError


class DdpEngine(SingleEngine):
    """Extends the single engine: gradients are averaged over ranks in the last micro-batch of a step."""

    name = "ddp"

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        super().__init__(module, optimizer, config, context)
        device = next(module.parameters()).device
        if config.model.compile:
            # Splitting the graph at DDP's buckets fails with dynamic shapes in torch 2.13 ("'float' object has no
            # attribute 'meta'"). In one graph the averaging of gradients overlaps less with backward.
            torch._dynamo.config.optimize_ddp = False
        self._hook = build_comm_hook(config, context, module)
        self.extra_slots = self._hook.extra_slots
        # Buffers are not broadcast: running statistics are frozen or labeled inexact (docs/models.md), so a broadcast per
        # forward would cost a round trip and change nothing.
        self._replica = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            **_without_buffer_broadcast(),
            gradient_as_bucket_view=True,
            find_unused_parameters=config.engine.find_unused,
            bucket_cap_mb=self._hook.bucket_mb,
        )
        self._replica.register_comm_hook(self._hook, lambda hook, bucket: hook.average(bucket))
        trainable = sum(parameter.requires_grad for parameter in module.parameters())
        self._unused_map_bytes = 4 * trainable if config.engine.find_unused else 0
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
        try:
            if last:
                with self.autocast():
                    yield
                if self._unused_map_bytes:  # DDP's own all-reduce of which parameters were used
                    self.context.traffic.add(self._unused_map_bytes)
            else:
                with self._replica.no_sync(), self.autocast():
                    yield
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error):
                raise ConfigError(
                    "Some trainable parameters got no gradient in this step though they got one in the first: the model uses "
                    "different parts for different batches. Set engine.find_unused=true, or freeze those parts (freeze.modules)."
                ) from error
            raise

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        # DDP reorders its buckets after the first backward pass. From three ranks on, the order in which the ranks' parts
        # of a number are added depends on its place in a bucket, so a resumed run would differ in the last digit. Error
        # feedback of one bucket must not be added to another one either.
        if self.context.world_size < 3 and not self._hook.needs_warm_up:
            return
        with self.micro_batch(last=True):
            self.backward(loss() * 0.0)
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


def _without_buffer_broadcast() -> dict[str, Any]:
    """Returns the setting under this torch version's name: torch 2.13 renamed it, and warns of the old name."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}

"""FSDP2: parameters, gradients and optimizer state split over the ranks by rows, with torch alone.

The optimizer updates plain tensors, this rank's rows, instead of torch's DTensors: the same fused kernels run as on one
process, without DTensor's work in Python. Limits: Adafactor, fp16, model.compile and local steps are refused by the config.
Tested with torch 2.13; code that uses its private names is in fsdp_sharding.py and marked "private API".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.rank_context import RankContext
from dtrain.engine import fsdp_sharding
from dtrain.engine.clipping import is_clearly_below, total_norm
from dtrain.engine.missing_gradients import GradientRecord, drop_unused_gradients, refuse_layer_drop
from dtrain.engine.optim import slots_per_value
from dtrain.engine.protocol import (
    BytesPerNumber,
    EngineTraits,
    ParameterState,
    ReadSlots,
    Shard,
    StepResult,
    StepWeight,
)
from dtrain.engine.sharded_tensor import first_row, gather, local_rows, own_rows
from dtrain.engine.single import SingleEngine
from dtrain.engine.state import device_slots, host_copy, norms_by_name, optimizer_slots, replicated_shards, slot_tensors
from dtrain.errors import ConfigError


class FsdpEngine(SingleEngine):
    """A module sharded in place, and an optimizer over this rank's rows."""

    name = "fsdp"
    lock_step = True

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        super().__init__(module, optimizer, config, context)
        refuse_layer_drop(module, "FSDP2")
        self.decides_on_device = self.decides_on_device and not config.engine.offload
        self._named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._parts = [fsdp_sharding.updated_part(parameter) for _, parameter in self._named]
        self._record = GradientRecord(module, fsdp_sharding.gathered_parameter(module))
        self._calls = fsdp_sharding.LayerCalls(module)
        self._sends = True  # FSDP2's initial state
        # Ranks may use different parameters in a step, but must send the same ones.
        self._root().set_reduce_scatter_unused_params(True)

    def _root(self) -> Any:
        """Returns the module, which has FSDP2's methods."""
        return self.module

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        ranks, train = context.world_size, config.train
        accumulates = -(-train.global_batch_size // train.micro_batch_size) > ranks
        return EngineTraits(
            memory=BytesPerNumber(
                weights=4.0 / ranks,
                # Between the micro-batches of a step FSDP2 keeps complete gradients, so that they are sent once.
                gradients=4.0 / ranks + (4.0 if accumulates else 0.0),
                optimizer=4.0 * slots_per_value(config.optim) / ranks,
            ),
            detail="FSDP2, weights and moments on the host" if config.engine.offload else "FSDP2",
            is_sharded=True,
            lock_step=True,
            evaluation_note="FSDP2: 1e-6",
        )

    @classmethod
    def place(cls, module: nn.Module, config: Config, context: RankContext) -> nn.Module:
        return fsdp_sharding.shard(module, config, context)

    @staticmethod
    def updated_part(parameter: nn.Parameter) -> nn.Parameter:
        return fsdp_sharding.updated_part(parameter)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return self._micro_batch(last=last)

    @contextmanager
    def _micro_batch(self, *, last: bool) -> Iterator[None]:
        if last != self._sends:
            self._root().set_requires_gradient_sync(last)
            self._sends = last
        self._calls.clear()
        with self.autocast():
            yield
        if last:
            self._take_gradients()

    def backward(self, loss: torch.Tensor) -> None:
        if not loss.requires_grad:
            raise ConfigError(
                "A micro-batch of this step used no trainable parameter, but FSDP2 needs a backward pass on every rank. Freeze "
                "less (freeze.modules), or use engine.name=ddp."
            )
        self._calls.check()
        self._record.watch()
        super().backward(loss)

    @torch.no_grad()
    def _take_gradients(self) -> None:
        """Gives each part its rows of the gradient, which FSDP2 stores as a DTensor at the sharded parameter."""
        for (_, parameter), part in zip(self._named, self._parts, strict=True):
            gradient: Any = parameter.grad
            part.grad = None if gradient is None else gradient.to_local()
            parameter.grad = None

    @property
    def lacks_gradients(self) -> bool:
        return bool(self._record.missing)

    def settle_missing_gradients(self, ranks: int) -> None:
        if ranks == self.context.world_size:  # otherwise every parameter was used on some rank
            drop_unused_gradients(self._parts, self._record.missing, self.context)

    def gradient_norms(self) -> dict[str, float]:
        named = [(name, part.grad) for (name, _), part in zip(self._named, self._parts, strict=True)]
        local = norms_by_name(named, scale=1.0)
        squares = all_reduce_sum(
            torch.tensor([norm * norm for norm in local.values()], dtype=torch.float64), self.context
        )
        return {name: math.sqrt(square) for name, square in zip(local, squares.tolist(), strict=True)}

    def weighted_sq_norm(self, weight: StepWeight) -> float | None:
        norm = float(total_norm(self._gradients()))
        return norm * norm  # `**` would raise an error where this is infinite, on one rank only

    def step(self, weight: StepWeight, *, weighted_sq_norm: float = 0.0, discard: bool = False) -> StepResult:
        norm, limit = math.sqrt(weighted_sq_norm), self._max_grad_norm
        applied = not discard and math.isfinite(norm)
        if applied:
            if limit is not None and not is_clearly_below(norm, limit):
                nn.utils.clip_grads_with_norm_(self._parts, limit, self._parts[0].new_full((), norm))
            self._optimizer.step()
        self._clear_gradients()
        return StepResult(norm, applied)

    def step_on_device(self, skip: torch.Tensor) -> torch.Tensor:
        local = total_norm(self._gradients()).to(skip.device)
        square = local * local
        if self.context.world_size > 1:
            self.context.traffic.add(square.nbytes)
            dist.all_reduce(square)
        norm = square.sqrt()
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parts, self._max_grad_norm, norm)
        self._update_unless(skip | ~norm.isfinite())
        return norm

    def _gradients(self) -> list[torch.Tensor]:
        return [part.grad for part in self._parts if part.grad is not None]

    def _clear_gradients(self) -> None:
        super()._clear_gradients()
        self._record.clear()

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        fsdp_sharding.free_gathered(self.module)
        for name, parameter in self.module.named_parameters():
            value = gather(local_rows(parameter), parameter)
            yield name, host_copy(value) if self.context.is_main else None

    def named_state(self, *, here: bool) -> Iterator[ParameterState]:
        fsdp_sharding.free_gathered(self.module)
        for name, parameter in self.module.named_parameters():
            value = gather(local_rows(parameter), parameter)
            slots = {
                key: slot if slot.dim() == 0 else gather(slot, parameter)
                for key, slot in self._slots_of(parameter).items()
            }
            yield ParameterState(name, value if here else None, slots if here else {})
        for name, buffer in self.module.named_buffers():
            yield ParameterState(name, buffer if here else None, {})

    def _slots_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Returns this rank's rows of the optimizer's slots of a sharded parameter, in a fixed order."""
        state = self._optimizer.state.get(fsdp_sharding.updated_part(parameter), {}) if parameter.requires_grad else {}
        return dict(sorted(slot_tensors(state).items()))

    def load_named_slots(self, read: ReadSlots) -> None:
        for (name, parameter), part in zip(self._named, self._parts, strict=True):
            slots = optimizer_slots(read(name, parameter.shape))
            if slots:
                own = {key: slot if slot.dim() == 0 else own_rows(slot, parameter) for key, slot in slots.items()}
                self._optimizer.state[part] = device_slots(own, part, self._optimizer)

    def local_state(self) -> Iterator[Shard]:
        fsdp_sharding.free_gathered(self.module)
        for name, parameter in self.module.named_parameters():
            rows = local_rows(parameter)
            start = first_row(parameter) * (parameter.numel() // len(parameter))
            for slot, tensor in (None, rows), *self._slots_of(parameter).items():
                if tensor.dim() == 0:
                    if self.context.is_main:
                        yield Shard(name, slot, None, tensor)
                elif tensor.numel():
                    yield Shard(name, slot, start, tensor.reshape(-1))
        for name, buffer in self.module.named_buffers():
            yield from replicated_shards(name, buffer, {}, self.context)

    def release(self) -> nn.Module:
        module = super().release()
        for part in self._parts:
            part.grad = None
        self._record.remove()
        self._calls.remove()
        self._root().set_reduce_scatter_unused_params(False)  # a probe tells by it what gets no gradient
        self._root().set_requires_gradient_sync(True)
        fsdp_sharding.free_gathered(module)
        return module

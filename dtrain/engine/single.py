"""One process: the plain PyTorch step that every other engine is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.clipping import clip, clip_on_device
from dtrain.engine.forward_only import autocast
from dtrain.engine.optim import can_skip_on_device, slots_per_value
from dtrain.engine.protocol import (
    AveragesEveryStep,
    BytesPerNumber,
    EngineTraits,
    ParameterState,
    ReadSlots,
    Shard,
    StepResult,
    StepWeight,
)
from dtrain.engine.state import (
    device_slots,
    host_copy,
    load_scaler,
    norms_by_name,
    optimizer_slots,
    replicated_shards,
    scaler_scalars,
    slot_tensors,
)
from dtrain.models.placement import compute_device

DECIDING_DEVICES = ("cuda",)
"""Devices that work behind the host, which a fetch would stop."""


class SingleEngine(AveragesEveryStep):
    """Runs forward, backward, clipping and step in one process on one device."""

    name = "single"
    lock_step = False

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        self.context = context
        context.traffic.is_complete = True  # the engine before this one may have set it to False
        self.module = module
        self.model = module
        self._optimizer = optimizer
        self._max_grad_norm = config.optim.max_grad_norm
        self._device_type = compute_device(module).type
        self._precision = config.engine.precision
        # Only fp16 needs it: its gradients underflow without a scale.
        self._scaler = torch.amp.GradScaler(self._device_type, enabled=config.engine.precision == "fp16")
        self.decides_on_device = (
            self._device_type in DECIDING_DEVICES
            and not self._scaler.is_enabled()  # the host sets its scale
            and can_skip_on_device(optimizer)
        )

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        return EngineTraits(memory=replicated_memory(config))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def numel(self, parameter: nn.Parameter) -> int:
        return parameter.numel()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return self.autocast()

    def autocast(self) -> AbstractContextManager[None]:
        return autocast(self._precision, self._device_type)

    def backward(self, loss: torch.Tensor) -> None:
        if not loss.requires_grad:
            return  # this micro-batch used no trainable part
        if self._precision == "fp32":
            torch.autograd.backward(loss)
            return
        # Outside autocast, as PyTorch advises: backward runs in the types that forward chose.
        with torch.autocast(self._device_type, enabled=False):
            torch.autograd.backward(self._scaler.scale(loss))

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        """Does nothing: the first backward pass is like any other."""

    def gradient_norms(self) -> dict[str, float]:
        gradients = ((name, parameter.grad) for name, parameter in self.module.named_parameters())
        return norms_by_name(gradients, scale=float(self._scaler.get_scale()))

    def step(self, weight: StepWeight, *, weighted_sq_norm: float = 0.0, discard: bool = False) -> StepResult:
        self._scaler.unscale_(self._optimizer)
        grad_norm = clip(self._parameters(), self._max_grad_norm)
        applied = not discard and math.isfinite(grad_norm)
        if applied:
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._clear_gradients()
        return StepResult(grad_norm, applied)

    def step_on_device(self, skip: torch.Tensor) -> torch.Tensor:
        grad_norm = clip_on_device(self._parameters(), self._max_grad_norm).to(skip.device)
        self._update_unless(skip | ~grad_norm.isfinite())
        return grad_norm

    def _update_unless(self, skips: torch.Tensor) -> None:
        """Takes the optimizer's step, unless the device finds that it is to be skipped; clears the gradients."""
        optimizer: Any = self._optimizer
        optimizer.found_inf = skips.float()
        optimizer.step()
        del optimizer.found_inf
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for parameter in self._parameters():  # a fifth of the time of Optimizer.zero_grad, which opens a profiler range
            parameter.grad = None

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, parameter in self.module.named_parameters():
            yield name, host_copy(parameter) if self.context.is_main else None

    def named_state(self, *, here: bool) -> Iterator[ParameterState]:
        feedback = self._error_feedback()
        for name, parameter in self.module.named_parameters():
            slots = {**slot_tensors(self._optimizer.state.get(parameter, {})), **feedback.get(name, {})}
            yield ParameterState(name, parameter.detach() if here else None, slots if here else {})
        for name, buffer in self.module.named_buffers():
            yield ParameterState(name, buffer if here else None, {})

    def _error_feedback(self) -> dict[str, dict[str, torch.Tensor]]:
        """Collective. Returns the state that a communication hook keeps for each parameter, as further slots."""
        return {}

    def load_named_slots(self, read: ReadSlots) -> None:
        for name, parameter in self.module.named_parameters():
            slots = self._read_slots(name, parameter.shape, read) if parameter.requires_grad else {}
            if slots:
                self._optimizer.state[parameter] = device_slots(slots, parameter, self._optimizer)

    def _read_slots(self, name: str, shape: torch.Size, read: ReadSlots) -> dict[str, torch.Tensor]:
        """Collective. Returns the optimizer's slots."""
        return optimizer_slots(read(name, shape))

    def local_state(self) -> Iterator[Shard]:
        feedback = self._error_feedback()
        for name, parameter in self.module.named_parameters():
            slots = {**slot_tensors(self._optimizer.state.get(parameter, {})), **feedback.get(name, {})}
            yield from replicated_shards(name, parameter, slots, self.context)
        for name, buffer in self.module.named_buffers():
            yield from replicated_shards(name, buffer, {}, self.context)

    def scalars(self) -> dict[str, float]:
        return scaler_scalars(self._scaler) if self._scaler.is_enabled() else {}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        if self._scaler.is_enabled():
            load_scaler(self._scaler, scalars, self.context)

    def release(self) -> nn.Module:
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()
        return self.module


def replicated_memory(config: Config, *, exchange: float = 0.0) -> BytesPerNumber:
    """Returns the memory of an engine that keeps everything on every rank, in fp32.

    Args:
        exchange: bytes per trainable value while gradients are sent.
    """
    return BytesPerNumber(4.0, 4.0, 4.0 * slots_per_value(config.optim), exchange)

"""DeepSpeed, ZeRO 0 to 3 and offload, as a thin wrapper.

dtrain decides batch sizes, accumulation, clipping, precision and ZeRO stage; every other key of DeepSpeed's config comes
from `engine.deepspeed` untouched. Limits: fp16 with ZeRO >= 1 and clipping, and Adafactor with ZeRO >= 1, are refused by
the config. Tested with deepspeed 0.19.8; what leans on its inner names is marked "inner".
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import device_of
from dtrain.engine.forward_only import autocast
from dtrain.engine.protocol import Apart, ParameterState, ReadSlots, Shard, StepResult
from dtrain.engine.state import (
    STEP,
    device_slots,
    host_copy,
    load_scaler,
    norms_by_name,
    optimizers_own,
    replicated_shards,
    scaler_scalars,
    slot_tensors,
)


class DeepSpeedEngine:
    """One DeepSpeed engine over a plain module and a torch optimizer."""

    name = "deepspeed"
    local: Apart | None = None

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        self.context = context
        context.traffic.is_complete = context.world_size == 1  # DeepSpeed's own collectives pass us by
        self.stage = config.engine.zero_stage or 0
        # ZeRO 2 sends gradients in every backward pass, ZeRO 3 parameters in every forward pass as well.
        self.lock_step = self.stage >= 2
        self._max_grad_norm = config.optim.max_grad_norm
        self._device_type = device_of(context.topology).type
        self._precision = config.engine.precision
        if not dist.is_initialized():
            # One process: DeepSpeed wants a group even then. It keeps handles to it, so the group stays until the process ends.
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        deepspeed = _import_quietly()
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config, context), dist_init_required=False
        )
        self.model: nn.Module = self._engine
        self.module: nn.Module = self._engine.module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        return autocast(self._precision, self._device_type)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        """Nothing: its buckets are fixed when it is built."""

    def gradient_norms(self) -> dict[str, float]:
        from deepspeed.utils import safe_get_full_grad

        def gradient(parameter: nn.Parameter) -> torch.Tensor | None:
            if self.stage == 0:
                return parameter.grad  # reduced by now
            found: torch.Tensor | None = safe_get_full_grad(parameter)
            return found

        scaler = self._loss_scaler()
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        learning = ((name, gradient(p)) for name, p in self.module.named_parameters() if p.requires_grad)
        return norms_by_name(learning, scale=scale)

    def step(self, *, discard: bool = False) -> StepResult:
        if self.stage == 0:
            return self._step_unsharded(discard=discard)
        optimizer = self._engine.optimizer
        # inner: an invalid norm sends DeepSpeed down its own path for skipped steps, which clears every buffer it has.
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        if discard:
            spoiled = float("nan")
            setattr(optimizer, name, (lambda: [spoiled]) if self.stage == 3 else (lambda *_args, **_kwargs: spoiled))
        scaler = self._loss_scaler()
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        try:
            self._engine.step()
        finally:
            if discard:
                delattr(optimizer, name)
        norm = self._engine.get_global_grad_norm()
        if optimizer.overflow and scaler is not None and not discard:
            # DeepSpeed skips the step before torch's scaler hears of it, so the scale would never come down.
            scaler.update(scale * scaler.get_backoff_factor())
        # The norm is that of the scaled gradients.
        return StepResult(float("nan") if norm is None else float(norm) / scale, applied=not optimizer.overflow)

    def _step_unsharded(self, *, discard: bool) -> StepResult:
        """ZeRO 0: DeepSpeed neither reports the norm nor refuses a bad one, so dtrain clips (gradients are reduced by now)."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(self._engine.optimizer)
        gradients = [p for p in self.module.parameters() if p.grad is not None]
        limit = self._max_grad_norm if self._max_grad_norm is not None else float("inf")
        norm = float(nn.utils.clip_grad_norm_(gradients, limit)) if limit != float("inf") else _norm(gradients)
        applied = not discard and math.isfinite(norm)
        if applied:
            self._engine.step()
        else:
            if scaler is not None:
                scaler.update()
            self.module.zero_grad(set_to_none=True)
        return StepResult(norm, applied)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, parameter in self.module.named_parameters():
            with self._whole([parameter]):
                value = host_copy(parameter) if self.context.is_main else None
            yield name, value

    def named_state(self, *, here: bool) -> Iterator[ParameterState]:
        self._link_slots()
        for name, parameter in self.module.named_parameters():
            slots = self._slots_of(parameter)
            with self._whole([parameter]):
                yield ParameterState(name, parameter.detach() if here else None, slots if here else {})
        for name, buffer in self.module.named_buffers():
            yield ParameterState(name, buffer if here else None, {})

    def _whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Collective. The full values of ZeRO 3's sharded parameters, for reading."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
        return context

    def _slots_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Collective. The slots of one parameter, whole."""
        if not parameter.requires_grad:
            return {}
        if self.stage == 0:
            return slot_tensors(self._engine.optimizer.state.get(parameter, {}))
        from deepspeed.utils import safe_get_full_optimizer_state

        flat_state = self._inner_optimizer().state.get(self._flat_of(parameter), {})
        return {
            key: torch.as_tensor(value) if key == STEP else safe_get_full_optimizer_state(parameter, key)
            for key, value in flat_state.items()
        }

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer whose groups hold this rank's flat shards."""
        inner: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return inner

    def _flats(self) -> list[torch.Tensor]:
        """inner: this rank's flat fp32 shards, in the order that _flat_of indexes."""
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner_optimizer().param_groups for p in group["params"]]

    def _flat_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """inner: the flat shard that a parameter lies in, which is what the optimizer keeps state for."""
        optimizer = self._engine.optimizer
        if self.stage == 3:
            index: int = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
            return self._flats()[index]
        for index, members in enumerate(optimizer.bit16_groups):
            if any(member is parameter for member in members):
                return self._flats()[index]
        raise AssertionError("a trainable parameter lies in no group of DeepSpeed")

    def _link_slots(self) -> None:
        """inner: ZeRO 1/2 link a parameter to its slots once, after the first group's step, and miss the other groups."""
        if self.stage in (1, 2) and any(self._inner_optimizer().state.get(flat) for flat in self._flats()):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def load_named_slots(self, read: ReadSlots) -> None:
        def own(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
            return optimizers_own(read(name, shape))

        trainable = [(name, p, _whole_shape(p)) for name, p in self.module.named_parameters() if p.requires_grad]
        if self.stage > 0:
            keys = next((sorted(slots) for name, _, shape in trainable if (slots := own(name, shape))), [])
            if not keys:
                return
            self._create_slots(keys)
            self._link_slots()
        for name, parameter, shape in trainable:
            slots = own(name, shape)
            if self.stage > 0:
                self._set_slots(parameter, slots)
            elif slots:
                self._engine.optimizer.state[parameter] = device_slots(slots, parameter)

    def local_state(self) -> Iterator[Shard]:
        self._link_slots()
        for name, parameter in self.module.named_parameters():
            match self.stage:
                case 0:
                    slots = slot_tensors(self._engine.optimizer.state.get(parameter, {}))
                    yield from replicated_shards(name, parameter, slots, self.context)
                case 3:
                    yield from self._own_chunk(name, parameter)
                case _:
                    yield from replicated_shards(name, parameter, {}, self.context)
                    yield from self._own_fragment(name, parameter)
        for name, buffer in self.module.named_buffers():
            yield from replicated_shards(name, buffer, {}, self.context)

    def _own_fragment(self, name: str, parameter: nn.Parameter) -> Iterator[Shard]:
        """inner: ZeRO 1/2 keep the slots of one stretch of each flat group, which a parameter lies in whole, partly or not."""
        if not parameter.requires_grad:
            return
        state = self._inner_optimizer().state.get(self._flat_of(parameter), {})
        mapping = getattr(parameter, "_hp_mapping", None)
        for key in sorted(state):
            if key == STEP and self.context.is_main:
                yield Shard(name, key, None, torch.as_tensor(state[key]))
            elif key != STEP and mapping is not None:
                start = int(mapping.lp_fragment_address.start)
                yield Shard(name, key, start, mapping.get_optim_state_fragment(key).reshape(-1))

    def _own_chunk(self, name: str, parameter: nn.Parameter) -> Iterator[Shard]:
        """inner: ZeRO 3 keeps an equal chunk of every parameter, the last ones padded."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        shard, total = parameter.ds_tensor, int(parameter.ds_numel)  # type: ignore[attr-defined]
        start = min(self.context.rank * shard.numel(), total)
        count = min(shard.numel(), total - start)
        state = self._inner_optimizer().state.get(self._flat_of(parameter), {}) if parameter.requires_grad else {}
        value = safe_get_local_fp32_param(parameter) if parameter.requires_grad else shard
        if count:
            yield Shard(name, None, start, value.reshape(-1)[:count])
        for key in sorted(state):
            if key == STEP and self.context.is_main:
                yield Shard(name, key, None, torch.as_tensor(state[key]))
            elif key != STEP and count:
                yield Shard(name, key, start, safe_get_local_optimizer_state(parameter, key).reshape(-1)[:count])

    def _create_slots(self, keys: Sequence[str]) -> None:
        """Zero slots for every flat shard: what a parameter without slots starts from anyway."""
        for flat in self._flats():
            self._inner_optimizer().state[flat] = {
                key: torch.zeros(()) if key == STEP else torch.zeros_like(flat.data) for key in keys
            }

    def _set_slots(self, parameter: nn.Parameter, slots: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for key, value in slots.items():
            if key == STEP:
                self._inner_optimizer().state[self._flat_of(parameter)][key] = value.clone()
            elif self.stage == 3:
                # safe_set_full_* fails on the last rank when the size does not divide by the ranks.
                shard: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                size = shard.numel()
                padded = F.pad(value.flatten(), (0, size * self.context.world_size - value.numel()))
                mine = padded[self.context.rank * size : (self.context.rank + 1) * size]
                safe_set_local_optimizer_state(parameter, mine.to(shard.device), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def scalars(self) -> dict[str, float]:
        scaler = self._loss_scaler()
        return {} if scaler is None else scaler_scalars(scaler)

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        scaler = self._loss_scaler()
        if scaler is not None:
            load_scaler(scaler, scalars, self.context)

    def _loss_scaler(self) -> Any:
        """inner: torch's GradScaler of an fp16 run; None in other precisions."""
        if self.stage == 0:
            return self._engine.torch_autocast_z0_gradscaler
        return self._engine.optimizer.torch_autocast_gradscaler

    def release(self) -> nn.Module:
        module = self.module
        if self.stage == 3:
            _replace_by_plain_parameters(module, self._engine.optimizer)
        self._engine.destroy()
        module.zero_grad(set_to_none=True)
        del self._engine, self.model
        return module


def deepspeed_config(config: Config, context: RankContext) -> dict[str, Any]:
    """What DeepSpeed is told: the keys that dtrain owns over those that the user passes through."""
    passed = dict(config.engine.deepspeed)
    stage = config.engine.zero_stage or 0
    owned: dict[str, Any] = {
        # Only one of its three batch keys is needed; dtrain marks the accumulation boundary itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": config.optim.max_grad_norm or 0.0 if stage > 0 else 0.0,
        "zero_optimization": {**passed.pop("zero_optimization", {}), "stage": stage},
    }
    if config.engine.precision != "fp32":
        owned["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16" if config.engine.precision == "bf16" else "float16",
            # Otherwise gradients of most layers travel in the lower precision, which single and ddp do not do.
            "lower_precision_safe_modules": ["torch.nn.Identity"],
        }
    if config.engine.gradient_wire == "bf16" and context.world_size > 1:
        owned["communication_data_type"] = "bf16"
    # Offload insists on DeepSpeed's own CPU Adam, which it compiles; torch's optimizer gives the same answer without.
    defaults = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    return {**defaults, **passed, **owned}


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of a parameter that ZeRO 3 may have sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _import_quietly() -> Any:
    """DeepSpeed without its greetings, and without compiling a shared-memory extension that gloo does not need (27 s)."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger
    finally:
        logging.disable(level)
    logger.setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by names that torch 2.13 is about to drop, and is told so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _norm(parameters: list[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _replace_by_plain_parameters(module: nn.Module, optimizer: Any) -> None:
    """Collective. Gives a ZeRO 3 module ordinary, whole parameters again and removes the hooks that gathered them."""
    import deepspeed

    names = {id(p): p for p in module.parameters()}
    with deepspeed.zero.GatheredParameters(list(names.values())):
        plain = {key: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for key, p in names.items()}
    offload = optimizer.parameter_offload
    for hook in offload.forward_hooks + offload.backward_hooks:
        hook.remove()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = plain[id(parameter)]

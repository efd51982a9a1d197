"""DeepSpeed, ZeRO 0 to 3 and offload, as a thin wrapper.

dtrain decides batch sizes, accumulation, clipping, precision and ZeRO stage; every other key of DeepSpeed's config comes
from `engine.deepspeed` untouched. Limits: fp16 with ZeRO >= 1 and clipping, and Adafactor with ZeRO >= 1, are refused by
the config. Tested with deepspeed 0.19.8; code that uses its private names is marked "private API".
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
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.clipping import clip
from dtrain.engine.deepspeed_config import deepspeed_config, deepspeed_traits, explain_refused_config, needs_lock_step
from dtrain.engine.forward_only import autocast
from dtrain.engine.missing_gradients import GradientRecord, drop_unused_gradients, refuse_before, refuse_layer_drop
from dtrain.engine.protocol import (
    AveragesEveryStep,
    EngineTraits,
    ParameterState,
    ReadSlots,
    Shard,
    StepResult,
    StepWeight,
)
from dtrain.engine.state import (
    STEP,
    device_slots,
    host_copy,
    load_scaler,
    norms_by_name,
    optimizer_slots,
    place_count,
    replicated_shards,
    scaler_scalars,
    slot_tensors,
)

HOOK_STATE = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")
"""Attributes that ZeRO 3's hooks set on a module: functions of their engine, and counters. A new engine would reuse both.
Private API."""


class DeepSpeedEngine(AveragesEveryStep):
    """One DeepSpeed engine over a plain module and a torch optimizer."""

    name = "deepspeed"
    needs_torchs_optimizer = True  # DeepSpeed warns of every other class

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        self.context = context
        context.traffic.is_complete = context.world_size == 1  # DeepSpeed's collectives are not counted
        self.stage = config.engine.zero_stage or 0
        self.lock_step = needs_lock_step(self.stage)
        refuse_layer_drop(module, f"DeepSpeed with ZeRO {self.stage}")
        self._max_grad_norm = config.optim.max_grad_norm
        self._device_type = device_of(context.topology).type
        self._precision = config.engine.precision
        if not dist.is_initialized():
            # DeepSpeed needs a group even for one process. It keeps handles to it, so the group stays until the process ends.
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        deepspeed = _import_quietly()
        with explain_refused_config():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(config, world_size=context.world_size),
                dist_init_required=False,
            )
        self.model: nn.Module = self._engine
        self.module: nn.Module = self._engine.module
        self._record = GradientRecord(module)
        if self.stage > 0:
            refuse_before(self._engine, self._record, self.stage)

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        return deepspeed_traits(config, world_size=context.world_size)

    @classmethod
    def place(cls, module: nn.Module, config: Config, context: RankContext) -> nn.Module:
        # ZeRO 3 takes the module from the host, and shards it when the engine is built.
        return module if config.engine.zero_stage == 3 else super().place(module, config, context)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def numel(self, parameter: nn.Parameter) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        return autocast(self._precision, self._device_type)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        """Does nothing: DeepSpeed's buckets are fixed when it is built."""

    @property
    def lacks_gradients(self) -> bool:
        return self.stage == 0 and bool(self._record.missing)

    def settle_missing_gradients(self, ranks: int) -> None:
        if ranks == self.context.world_size:  # otherwise every parameter was used on some rank
            drop_unused_gradients(self._record.parameters, self._record.missing, self.context)

    def gradient_norms(self) -> dict[str, float]:
        from deepspeed.utils import safe_get_full_grad

        def gradient(parameter: nn.Parameter) -> torch.Tensor | None:
            if self.stage == 0:
                return parameter.grad  # already reduced
            full: torch.Tensor | None = safe_get_full_grad(parameter)
            return full

        scaler = self._loss_scaler()
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        gradients = ((name, gradient(p)) for name, p in self.module.named_parameters() if p.requires_grad)
        return norms_by_name(gradients, scale=scale)

    def step(self, weight: StepWeight, *, weighted_sq_norm: float = 0.0, discard: bool = False) -> StepResult:
        self._record.clear()
        if self.stage == 0:
            return self._step_unsharded(discard=discard)
        optimizer = self._engine.optimizer
        # private API: an invalid norm makes DeepSpeed skip the step, which clears all of its buffers.
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        if discard:
            nan = float("nan")
            setattr(optimizer, name, (lambda: [nan]) if self.stage == 3 else (lambda *_args, **_kwargs: nan))
        scaler = self._loss_scaler()
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        try:
            self._engine.step()
        finally:
            if discard:
                delattr(optimizer, name)
        norm = self._engine.get_global_grad_norm()
        if optimizer.overflow and scaler is not None and not discard:
            # DeepSpeed skips the step without telling torch's scaler, so the scale would never decrease.
            scaler.update(scale * scaler.get_backoff_factor())
        # This is the norm of the scaled gradients.
        return StepResult(float("nan") if norm is None else float(norm) / scale, applied=not optimizer.overflow)

    def _step_unsharded(self, *, discard: bool) -> StepResult:
        """Clips the reduced gradients. With ZeRO 0, DeepSpeed does not report the norm and accepts an invalid one."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(self._engine.optimizer)
        norm = clip(self.module.parameters(), self._max_grad_norm)
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
            with self._gathered([parameter]):
                value = host_copy(parameter) if self.context.is_main else None
            yield name, value

    def named_state(self, *, here: bool) -> Iterator[ParameterState]:
        self._link_slots()
        for name, parameter in self.module.named_parameters():
            slots = self._slots_of(parameter)
            with self._gathered([parameter]):
                yield ParameterState(name, parameter.detach() if here else None, slots if here else {})
        for name, buffer in self.module.named_buffers():
            yield ParameterState(name, buffer if here else None, {})

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Collective. Gathers ZeRO 3's sharded parameters, for reading."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
        return gathered

    def _slots_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Collective. Returns the complete slots of one parameter."""
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
        """Returns the torch optimizer whose groups hold this rank's flat shards."""
        inner: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return inner

    def _flats(self) -> list[torch.Tensor]:
        """Returns this rank's flat fp32 shards, in the order that _flat_of indexes. Private API."""
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner_optimizer().param_groups for p in group["params"]]

    def _flat_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Returns the flat shard that holds a parameter; the optimizer keeps its state per shard. Private API."""
        optimizer = self._engine.optimizer
        if self.stage == 3:
            index: int = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
            return self._flats()[index]
        for index, members in enumerate(optimizer.bit16_groups):
            if any(member is parameter for member in members):
                return self._flats()[index]
        raise AssertionError("a trainable parameter is in no group of DeepSpeed")

    def _link_slots(self) -> None:
        """Links parameters to their slots: ZeRO 1/2 do so once, after the first group's step, and miss the others. Private API."""
        if self.stage in (1, 2) and any(self._inner_optimizer().state.get(flat) for flat in self._flats()):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def load_named_slots(self, read: ReadSlots) -> None:
        def read_slots(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
            return optimizer_slots(read(name, shape))

        trainable = [(name, p, _full_shape(p)) for name, p in self.module.named_parameters() if p.requires_grad]
        if self.stage > 0:
            keys = next((sorted(slots) for name, _, shape in trainable if (slots := read_slots(name, shape))), [])
            if not keys:
                return
            self._create_slots(keys)
            self._link_slots()
        for name, parameter, shape in trainable:
            slots = read_slots(name, shape)
            if self.stage > 0:
                self._set_slots(parameter, slots)
            elif slots:
                self._engine.optimizer.state[parameter] = device_slots(slots, parameter, self._optimizer)

    def local_state(self) -> Iterator[Shard]:
        self._link_slots()
        for name, parameter in self.module.named_parameters():
            match self.stage:
                case 0:
                    slots = slot_tensors(self._engine.optimizer.state.get(parameter, {}))
                    yield from replicated_shards(name, parameter, slots, self.context)
                case 3:
                    yield from self._local_chunk(name, parameter)
                case _:
                    yield from replicated_shards(name, parameter, {}, self.context)
                    yield from self._local_fragment(name, parameter)
        for name, buffer in self.module.named_buffers():
            yield from replicated_shards(name, buffer, {}, self.context)

    def _local_fragment(self, name: str, parameter: nn.Parameter) -> Iterator[Shard]:
        """Yields this rank's slots: ZeRO 1/2 keep a range of each flat group, with all, part or none of a parameter. Private API."""
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

    def _local_chunk(self, name: str, parameter: nn.Parameter) -> Iterator[Shard]:
        """Yields this rank's chunk: ZeRO 3 splits every parameter into equal chunks and pads the last ones. Private API."""
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
        """Makes zero slots for every flat shard, the initial state of a parameter without slots."""
        optimizer = self._inner_optimizer()
        for flat in self._flats():
            optimizer.state[flat] = {
                key: place_count(torch.zeros(()), flat, optimizer) if key == STEP else torch.zeros_like(flat.data)
                for key in keys
            }

    def _set_slots(self, parameter: nn.Parameter, slots: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for key, value in slots.items():
            if key == STEP:
                flat, optimizer = self._flat_of(parameter), self._inner_optimizer()
                optimizer.state[flat][key] = place_count(value, flat, optimizer)
            elif self.stage == 3:
                # safe_set_full_* fails on the last rank when the size does not divide by the ranks.
                shard: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                size = shard.numel()
                padded = F.pad(value.flatten(), (0, size * self.context.world_size - value.numel()))
                chunk = padded[self.context.rank * size : (self.context.rank + 1) * size]
                safe_set_local_optimizer_state(parameter, chunk.to(shard.device), key)
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
        """Returns torch's GradScaler of an fp16 run; None in other precisions. Private API."""
        if self.stage == 0:
            return self._engine.torch_autocast_z0_gradscaler
        return self._engine.optimizer.torch_autocast_gradscaler

    def release(self) -> nn.Module:
        module = self.module
        self._record.remove()
        if self.stage == 3:
            _replace_by_plain_parameters(module, self._engine.optimizer)
        self._engine.destroy()
        module.zero_grad(set_to_none=True)
        del self._engine, self.model
        return module


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of a parameter that ZeRO 3 may have sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _import_quietly() -> Any:
    """Imports DeepSpeed without its log lines, and without compiling an extension that gloo does not need (27 s)."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger
    finally:
        logging.disable(level)
    logger.setLevel(logging.ERROR)
    # DeepSpeed uses names of torch's collectives that torch 2.13 deprecates, with a warning at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _replace_by_plain_parameters(module: nn.Module, optimizer: Any) -> None:
    """Collective. Restores plain, complete parameters in a ZeRO 3 module, and removes the hooks that gathered them."""
    import deepspeed

    names = {id(p): p for p in module.parameters()}
    with deepspeed.zero.GatheredParameters(list(names.values())):
        plain = {key: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for key, p in names.items()}
    offload = optimizer.parameter_offload
    for hook in offload.forward_hooks + offload.backward_hooks:
        hook.remove()
    for part in module.modules():
        for left_over in HOOK_STATE:
            part.__dict__.pop(left_over, None)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = plain[id(parameter)]

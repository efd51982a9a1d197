"""Shards a module over the ranks with FSDP2 (`torch.distributed.fsdp.fully_shard`), layer by layer, in place.

Each layer of a list of layers is gathered before it computes and freed afterwards; what is outside them (embeddings, head) is
the root, gathered for a whole pass. The layers come from the model's torch.nn.ModuleLists instead of a list of class names:
this also serves a user's own module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from dtrain.config.schema import Config
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.traffic import Traffic
from dtrain.engine.parameter_groups import layer_stacks
from dtrain.engine.sharded_tensor import local_rows
from dtrain.errors import ConfigError
from dtrain.models.placement import DEVICE_ATTRIBUTE, GATHER_ATTRIBUTE, PASSED_BY_ATTRIBUTE

PART_ATTRIBUTE = "_dtrain_updated_part"
"""Attribute of a sharded parameter: this rank's rows, as the parameter that the optimizer updates."""

NEEDED = "set_reduce_scatter_unused_params"
"""A method of FSDP2 without which ranks that used different parameters would wait for each other forever."""


def shard(module: nn.Module, config: Config, context: RankContext) -> nn.Module:
    """Collective. Shards a module, unless it is sharded already; returns it.

    Raises:
        ConfigError: FSDP2 cannot shard it.
    """
    if isinstance(module, FSDPModule):
        return module
    _check(module)
    device = device_of(context.topology)
    if not dist.is_initialized():  # FSDP2 needs a group even for one process
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    offload = config.engine.offload
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (context.world_size,)),
        # None: as True, but the root stays whole until its backward pass, which needs it at once.
        "reshard_after_forward": None if config.engine.reshard_after_forward else False,
        "mp_policy": MixedPrecisionPolicy(),  # autocast sets the precision, as on the other engines
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    }
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    for layer in [*_layers(module), module]:
        fully_shard(layer, **options)
        _keep_names(layer)
    for part in sharded_parts(module):
        part.set_custom_all_gather(_AllGather(context.traffic))  # type: ignore[arg-type]
        part.set_custom_reduce_scatter(_ReduceScatter(context.traffic))  # type: ignore[arg-type]
    if offload:
        for submodule in module.modules():
            submodule.__dict__[DEVICE_ATTRIBUTE] = device
    _free_after_evaluation(module)
    return module


def updated_part(parameter: nn.Parameter) -> nn.Parameter:
    """Returns this rank's rows of a sharded parameter, as a parameter that shares its memory; always the same object."""
    part: nn.Parameter | None = parameter.__dict__.get(PART_ATTRIBUTE)
    rows = local_rows(parameter)
    if part is None or part.data_ptr() != rows.data_ptr():
        part = nn.Parameter(rows)
        parameter.__dict__[PART_ATTRIBUTE] = part
    return part


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """Returns the layers and the root."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def free_gathered(module: nn.Module) -> None:
    """Frees gathered weights, so that every parameter of the module is this rank's part. Not a collective."""
    for part in sharded_parts(module):
        part.reshard()


def gathered_parameter(module: nn.Module) -> Callable[[nn.Parameter], nn.Parameter | None]:
    """Returns a function from a sharded parameter to the gathered one, which receives its gradients. Private API.

    FSDP2 makes that when it gathers the parameter for the first time; until then the function returns None.
    """
    groups = [group for part in sharded_parts(module) for group in part._get_fsdp_state()._fsdp_param_groups]
    states = {id(state.sharded_param): state for group in groups for state in group.fsdp_params}
    return lambda parameter: getattr(states.get(id(parameter)), "_unsharded_param", None)


class LayerCalls:
    """Records which layers the model has called since the last `clear`."""

    def __init__(self, module: nn.Module) -> None:
        layers: dict[str, Any] = {
            name: part for name, part in module.named_modules() if name and isinstance(part, FSDPModule)
        }
        self._names = set(layers)
        self._called: set[str] = set()
        self._handles = [
            layer.register_forward_pre_hook(lambda *_, name=name: self._called.add(name))
            for name, layer in layers.items()
        ]

    def clear(self) -> None:
        """Begins a new micro-batch: evaluations, and backward passes with checkpointing, call layers as well."""
        self._called.clear()

    def check(self) -> None:
        """Refuses a forward pass that left a layer out: other ranks have gathered it, and taken another one's weights for it.

        Raises:
            ConfigError: on this rank, before anything of the step is used.
        """
        missing = sorted(self._names - self._called)
        if missing:
            raise ConfigError(
                f"A micro-batch of this step did not use {', '.join(missing[:3])}, but FSDP2 gathers every layer on every rank. Use "
                "engine.name=ddp."
            )

    def remove(self) -> None:
        """Removes the hooks from the layers."""
        for handle in self._handles:
            handle.remove()


def _check(module: nn.Module) -> None:
    """Raises ConfigError if FSDP2 cannot shard the module."""
    if not hasattr(FSDPModule, NEEDED):
        raise ConfigError(
            f"engine.name=fsdp needs torch 2.13 or newer, but torch {torch.__version__} is installed: its FSDP2 has no "
            f"{NEEDED}. Install a newer torch, or use engine.name=deepspeed engine.zero_stage=3."
        )
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ConfigError(
            f"engine.name=fsdp shards parameters by rows, but {', '.join(scalars[:3])} of this model is a single number. Use "
            "engine.name=ddp, or engine.name=deepspeed engine.zero_stage=3."
        )
    empty = [name for name, parameter in module.named_parameters() if not parameter.numel()]
    if empty:
        raise ConfigError(
            f"engine.name=fsdp shards parameters by rows, but {', '.join(empty[:3])} of this model has no number at all, and torch "
            "averages no such gradient. Remove it from the model, or use engine.name=ddp."
        )


def _layers(module: nn.Module) -> list[nn.Module]:
    """Returns the modules to gather one at a time: the entries of the model's lists of layers, also of lists in lists.

    Those that share a parameter with another part are left to the root, because FSDP2 keeps a parameter in one place; so are
    those that the model does not call, because FSDP2 gathers a layer's weights when it is called.
    """
    everywhere = _uses(module)
    entries = [entry for name in layer_stacks(module) for entry in _entries(module.get_submodule(name))]
    return [
        entry
        for entry in dict.fromkeys(entries)
        if not entry.__dict__.get(PASSED_BY_ATTRIBUTE)
        and (inside := _uses(entry))
        and all(everywhere[parameter] == count for parameter, count in inside.items())
    ]


def _entries(listed: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules in a list that have a forward pass of their own."""
    for entry in listed.children():
        if isinstance(entry, nn.ModuleList | nn.ModuleDict):
            yield from _entries(entry)
        else:
            yield entry


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Returns how many modules have each parameter."""
    return Counter(
        parameter for part in module.modules() for parameter in part._parameters.values() if parameter is not None
    )


def _keep_names(module: nn.Module) -> None:
    """Gives FSDP2's class of a module the name of the class it extends: names choose what fits a model, and are exported."""
    sharded, _fsdp_module, original, *_ = type(module).__mro__
    sharded.__name__, sharded.__qualname__ = original.__name__, original.__qualname__
    sharded.__module__ = original.__module__


def _free_after_evaluation(module: Any) -> None:
    """Makes a forward pass without gradients free the root as well, which FSDP2 keeps for a backward pass.

    Otherwise a later call on one rank alone (`state_dict` frees it) would make the next gather a collective of the others only.
    Inside of `gathered` the root stays: `generate` calls the model for each token, and an encoder by itself.
    """
    depth = 0

    @contextmanager
    def gather() -> Iterator[None]:
        nonlocal depth
        depth += 1
        module.unshard()
        try:
            yield
        finally:
            depth -= 1
            if not depth:
                free_gathered(module)

    def free(*_: Any) -> None:
        if not depth and not torch.is_grad_enabled():
            free_gathered(module)

    module._get_fsdp_state()._lazy_init()  # private API: a part that runs first would take itself for the root
    module.register_forward_hook(free)
    for part in module.modules():
        part.__dict__[GATHER_ATTRIBUTE] = gather
    if hasattr(module, "generate"):
        generate: Callable[..., Any] = module.generate

        @wraps(generate)
        def generate_gathered(*args: Any, **kwargs: Any) -> Any:
            with gather():
                return generate(*args, **kwargs)

        module.generate = generate_gathered


class _Counted:
    """A collective of FSDP2, counted in this rank's traffic."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Counted):
    """Gathers parameters."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self._traffic.add(output_tensor.nbytes)
        return _ALL_GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Counted):
    """Averages gradients; each rank gets its part."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        self._traffic.add(input_tensor.nbytes)
        return _REDUCE_SCATTER(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


# torch 2.13 renamed both, and warns of the old names.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

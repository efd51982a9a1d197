"""Parameter groups: which weight decay and which learning rate each parameter trains with.

`optim.groups` and `optim.layer_decay` set them by path and by depth. A group's learning rate is stored as a factor of
`optim.learning_rate` (`FACTOR`), so that one schedule drives all groups and nothing has to be saved.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models.paths import resolve

FACTOR = "learning_rate_factor"
"""Key of an optimizer's group: its learning rate as a factor of the schedule's."""


class _Rates(NamedTuple):
    """What one parameter trains with.

    Attributes:
        factor: learning rate as a factor of the schedule's.
        weight_decay: decoupled weight decay.
    """

    factor: float
    weight_decay: float


def parameter_groups(
    model: nn.Module, settings: schema.Optim, *, stages: Sequence[Sequence[str]] = ()
) -> list[dict[str, Any]]:
    """Returns the trainable parameters in groups of equal learning rate and weight decay.

    Biases and norm layers have no weight decay.

    Args:
        model: the bare, unsharded model.
        settings: the optim section.
        stages: names of parameters that began to learn later, one list per thaw. Each stage gets separate groups, since
            ZeRO counts Adam's steps per group and these have taken fewer.

    Returns:
        Groups in a fixed order, none empty (ZeRO cannot take an empty one).

    Raises:
        ConfigError: `optim.groups` selects nothing, or a parameter twice; `optim.layer_decay` finds no layers.
    """
    stage_of = {name: number for number, names in enumerate(stages, start=1) for name in names}
    plain = _without_decay(model)
    rates = _rates(model, settings)
    groups: dict[tuple[int, bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name in plain else rates[name].weight_decay
            key = (stage_of.get(name, 0), name in plain, -rates[name].factor, decay)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, FACTOR: -negative_factor}
        for (_, _, negative_factor, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def set_learning_rate(groups: Sequence[dict[str, Any]], learning_rate: float) -> None:
    """Sets the learning rate of every group for the next step.

    Args:
        groups: an optimizer's groups, as `parameter_groups` made them.
        learning_rate: the schedule's value.
    """
    for group in groups:
        group["lr"] = learning_rate * group[FACTOR]


def _without_decay(model: nn.Module) -> set[str]:
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    prefixes = tuple(f"{name}." for name in norms)
    return {name for name, _ in model.named_parameters() if name.endswith("bias") or name.startswith(prefixes)}


def _rates(model: nn.Module, settings: schema.Optim) -> dict[str, _Rates]:
    """Returns the learning rate factor and the weight decay of every parameter by name, without the rule for biases."""
    factors = _layer_factors(model, settings.layer_decay) if settings.layer_decay is not None else {}
    rates = {name: _Rates(factors.get(name, 1.0), settings.weight_decay) for name, _ in model.named_parameters()}
    group_of: dict[str, int] = {}
    for number, group in enumerate(settings.groups):
        for name in resolve(model, group.modules, setting=f"optim.groups[{number}].modules").parameters:
            if name not in rates:
                continue  # another name of a tied parameter
            if name in group_of:
                raise ConfigError(
                    f"optim.groups: {name} is in group {group_of[name]} ({list(settings.groups[group_of[name]].modules)}) "
                    f"and in group {number} ({list(group.modules)}), but a parameter trains with one learning rate. "
                    "Make the paths of one of them narrower. Groups are counted from 0."
                )
            group_of[name] = number
            given = group.learning_rate
            factor = rates[name].factor if given is None else given / settings.learning_rate
            decay = settings.weight_decay if group.weight_decay is None else group.weight_decay
            rates[name] = _Rates(factor, decay)
    return rates


def _layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Returns the factor of each parameter by its depth, as in ELECTRA's and BEiT's fine-tuning.

    With L layers, layer i of 0..L-1 gets decay ** (L - i), the embeddings below them decay ** (L + 1), and what follows
    them (the last norm, the pooler, the head) 1. An encoder and a decoder count their own layers.

    Source: Clark et al. 2020, ELECTRA, https://arxiv.org/abs/2003.10555 (layerwise learning rate decay).
    """
    stacks = layer_stacks(model)
    if not stacks:
        raise ConfigError(
            f"optim.layer_decay={decay}: {type(model).__name__} has no list of layers (torch.nn.ModuleList), so there is no "
            "depth to count. Remove optim.layer_decay, or set the learning rates with optim.groups."
        )
    deepest = max(stacks.values())
    factors: dict[str, float] = {}
    for name, _ in model.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is not None:
            layer = int(name[len(stack) + 1 :].split(".")[0])
            factors[name] = decay ** (stacks[stack] - layer)
        else:
            factors[name] = decay ** (deepest + 1) if _is_embedding(model, name) else 1.0
    return factors


def layer_stacks(model: nn.Module) -> dict[str, int]:
    """Returns the number of layers of each list of layers by its name; lists inside a layer do not count.

    A model may keep small lists besides (heads, adapters), so only lists whose layers hold the most parameters count: those with
    at least a tenth of the parameters of the largest one.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outer.items()}
    largest = max(sizes.values(), default=0)
    return {name: len(outer[name]) for name, size in sizes.items() if size and size * 10 >= largest}


def _is_embedding(model: nn.Module, name: str) -> bool:
    """Returns whether a parameter outside the layers belongs to the embeddings, which lie below them."""
    owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    return isinstance(owner, nn.Embedding) or bool(
        re.search(r"(^|[._])(embed|embeddings|embedding|wte|wpe)([._]|$)", name)
    )

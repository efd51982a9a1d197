"""Freezing by path, thawing by epoch, and the train and eval modes that go with it.

`freeze` records what it froze on the model itself, so that a later epoch can undo exactly that. Engines are built after
freezing and rebuilt after thawing. paths.py explains paths.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any, Literal

import torch
from torch import nn

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models.paths import parameter_names, resolve

FROZEN_ATTRIBUTE = "_dtrain_frozen"
"""Attribute of a model under which `freeze` stores the names of the parameters that it froze."""


def freeze(
    model: nn.Module, settings: schema.Freeze, *, epoch: int = 0, keep_frozen: Collection[str] = ()
) -> list[str]:
    """Freezes and thaws a model's parameters as an epoch requires. Can be called repeatedly.

    Switches `requires_grad` off for the parameters that `settings` or `keep_frozen` names. Switches it on again for those
    that an earlier call froze and that are no longer named. Leaves all others as they are. With method no_grad, the
    forward of fully frozen modules also runs without gradients.

    Args:
        model: the bare, unsharded model, not wrapped by an engine.
        settings: the freeze section of the config.
        epoch: 0-based; the thaw stages up to and including it apply.
        keep_frozen: names of parameters that stay frozen regardless of `settings` (no gradient reaches them).

    Returns:
        Names of all frozen parameters in the model's order. A tied parameter appears under each of its names.

    Raises:
        ConfigError: a path matches nothing, a thaw stage thaws nothing, or nothing is left to train.
    """
    check(model, settings)
    named = dict(model.named_parameters(remove_duplicate=False))
    selected = resolve(model, settings.modules)
    thawed = {id(named[name]) for name in _thawed(model, settings, epoch)}
    frozen = {name for name in selected.parameters if id(named[name]) not in thawed}
    frozen_ids = {id(named[name]) for name in (*frozen, *keep_frozen)}
    before: frozenset[str] = getattr(model, FROZEN_ATTRIBUTE, frozenset())
    # A parameter that was already frozen by other code is not recorded, so it is never thawed here.
    recorded = frozenset(n for n, p in named.items() if id(p) in frozen_ids and (n in before or p.requires_grad))
    for name in before | recorded:
        named[name].requires_grad_(id(named[name]) not in frozen_ids)
    setattr(model, FROZEN_ATTRIBUTE, recorded)
    names = frozen_parameters(model)
    if len(names) == len(named):
        raise ConfigError(
            f"freeze.modules={list(settings.modules)}: nothing is left to train in epoch {epoch}, because all "
            f"{len(named)} tensors of the model are frozen. Freeze less, e.g. base_model, which leaves the head."
        )
    no_grad_modules = _fully_frozen(model, selected.modules, frozen) if settings.method == "no_grad" else ()
    _set_no_grad_modules(model, set(no_grad_modules))
    return names


def check(model: nn.Module, settings: schema.Freeze) -> None:
    """Raises ConfigError for paths that match nothing and for thaw stages that have no effect, before training starts."""
    named = dict(model.named_parameters(remove_duplicate=False))
    selected = {id(named[name]) for name in resolve(model, settings.modules).parameters}
    frozen = set(selected)
    for stage in sorted(settings.thaw, key=lambda stage: stage.epoch):
        for entry in stage.modules:
            thawed = {id(named[name]) for name in resolve(model, [entry], setting="freeze.thaw").parameters}
            if not thawed & frozen:
                when = "no longer" if thawed & selected else "not"
                raise ConfigError(
                    f"freeze.thaw: {entry!r} is {when} frozen when epoch {stage.epoch} begins, so there is nothing to "
                    f"thaw. freeze.modules is {list(settings.modules)}."
                )
            frozen -= thawed


def train_mode(model: nn.Module, *, batch_norm: Literal["eval", "train"] = "eval") -> None:
    """Puts trainable modules in train mode, frozen modules (no dropout) and, by default, running statistics in eval mode.

    A module is frozen if it has parameters and none of them trains; this includes its submodules.

    Args:
        model: the bare model, after `freeze`.
        batch_norm: "train" lets layers update running statistics from this process's batches, so the statistics depend
            on the world size. Frozen layers never update them.
    """
    model.train()
    for module in model.modules():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        has_statistics = getattr(module, "running_mean", None) is not None
        if (learns and not any(learns)) or (has_statistics and batch_norm == "eval"):
            module.eval()


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keeps running statistics unchanged during a forward pass, regardless of `model.batch_norm`."""
    updating = [m for m in model.modules() if m.training and getattr(m, "running_mean", None) is not None]
    for module in updating:
        module.eval()
    try:
        yield
    finally:
        for module in updating:
            module.train()


def frozen_parameters(model: nn.Module) -> list[str]:
    """Returns the names of frozen parameters in the model's order; a tied one appears under each of its names."""
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]


def summary(names: Iterable[str]) -> str:
    """Shortens a list of names for display: `bert.embeddings (5 tensors), bert.encoder.layer.0-1 (32 tensors)`, or `none`."""
    counts = Counter(map(_split_layer, names))
    runs: list[tuple[str, int | None, int | None, int]] = []
    for (stem, number), count in counts.items():
        if runs and number is not None and runs[-1][0] == stem and runs[-1][2] == number - 1:
            _, first, _, total = runs.pop()
            runs.append((stem, first, number, total + count))
        else:
            runs.append((stem, number, number, count))
    return ", ".join(_format_run(*run) for run in runs) or "none"


def _format_run(stem: str, first: int | None, last: int | None, count: int) -> str:
    where = stem if first is None else f"{stem}.{first}" if first == last else f"{stem}.{first}-{last}"
    return f"{where} ({count} tensor{'s' if count > 1 else ''})"


def layer_group(name: str) -> str:
    """Returns the part of the model that a parameter belongs to, as in `summary`: `bert.encoder.layer.3`."""
    stem, number = _split_layer(name)
    return stem if number is None else f"{stem}.{number}"


def _split_layer(name: str) -> tuple[str, int | None]:
    """Splits `a.layer.3.b.weight` into (a.layer, 3); `a.embeddings.b.weight` is a.embeddings; `head.weight` is head."""
    if numbered := re.match(r"(.+?)\.(\d+)(?:\.|$)", name):
        return numbered[1], int(numbered[2])
    parts = name.split(".")
    return ".".join(parts[: max(1, min(2, len(parts) - 1))]), None


def _thawed(model: nn.Module, settings: schema.Freeze, epoch: int) -> set[str]:
    entries = [entry for stage in settings.thaw if stage.epoch <= epoch for entry in stage.modules]
    return set(resolve(model, entries, setting="freeze.thaw").parameters)


def _fully_frozen(model: nn.Module, names: Iterable[str], frozen: set[str]) -> Iterator[str]:
    """Yields the given modules, or else their submodules, that have a forward and only frozen parameters.

    A list or dict of layers has no forward, so its members are used instead.
    """
    for name in names:
        module = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        inside = [prefix + parameter for parameter in parameter_names(module)]
        if inside and frozen.issuperset(inside) and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield name
        else:
            yield from _fully_frozen(model, [prefix + child for child, _ in module.named_children()], frozen)


def _set_no_grad_modules(model: nn.Module, names: Collection[str]) -> None:
    """Makes the forward of these modules, and of no others, run without recording gradients."""
    no_grad = {model.get_submodule(name) for name in names}
    for module in model.modules():
        forward = module.__dict__.get("forward")
        is_wrapped = isinstance(forward, partial) and forward.func is _without_gradient
        if module in no_grad and not is_wrapped:
            # A partial, not a closure: copy.deepcopy then binds the copy to the copied module.
            module.forward = update_wrapper(partial(_without_gradient, module.forward), module.forward)
        elif is_wrapped and module not in no_grad:
            del module.forward
            assert isinstance(forward, partial)
            if getattr(forward.args[0], "__func__", None) is not type(module).forward:
                module.forward = forward.args[0]  # another wrapper that was there before


def _without_gradient(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return forward(*args, **kwargs)

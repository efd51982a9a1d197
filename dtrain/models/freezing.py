"""What does not learn: freezing by path, thawing by epoch, and the modes that go with it.

What `freeze` has done is kept on the model itself, so that a later epoch can undo that and nothing else. Engines are
built after freezing and built anew after thawing. Paths are explained in paths.py.
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

RECORD = "_dtrain_frozen"
"""The attribute of a model under which `freeze` keeps the names of the parameters that it has switched off."""


def freeze(
    model: nn.Module, settings: schema.Freeze, *, epoch: int = 0, keep_frozen: Collection[str] = ()
) -> list[str]:
    """Puts a model in the state that holds in an epoch. May be called any number of times.

    Switches `requires_grad` off for the parameters that `settings` or `keep_frozen` names, and on again for those that
    an earlier call switched off and neither names any more; others are left alone. With method no_grad the forward of
    modules that are frozen whole is wrapped as well.

    Args:
        model: the bare model, whole on this process, in no engine.
        settings: the freeze section of the config.
        epoch: 0-based; thaw stages up to and including it have happened.
        keep_frozen: names of parameters that stay frozen whatever `settings` says (no gradient reaches them).

    Returns:
        Names of all frozen parameters, in the model's order, tied ones under each of their names.

    Raises:
        ConfigError: a path that matches nothing, a thaw stage that thaws nothing, or nothing left to learn.
    """
    check(model, settings)
    named = dict(model.named_parameters(remove_duplicate=False))
    asked = resolve(model, settings.modules)
    thawed = {id(named[name]) for name in _thawed(model, settings, epoch)}
    frozen = {name for name in asked.parameters if id(named[name]) not in thawed}
    off = {id(named[name]) for name in (*frozen, *keep_frozen)}
    before: frozenset[str] = getattr(model, RECORD, frozenset())
    # A parameter that was off before we came is not ours to switch on later.
    ours = frozenset(n for n, p in named.items() if id(p) in off and (n in before or p.requires_grad))
    for name in before | ours:
        named[name].requires_grad_(id(named[name]) not in off)
    setattr(model, RECORD, ours)
    names = frozen_parameters(model)
    if len(names) == len(named):
        raise ConfigError(
            f"freeze.modules={list(settings.modules)}: nothing is left to learn in epoch {epoch}, for all {len(named)} "
            "tensors of the model are frozen. Freeze less, e.g. base_model, which leaves the head."
        )
    _cut_gradients(model, set(_whole(model, asked.modules, frozen)) if settings.method == "no_grad" else set())
    return names


def check(model: nn.Module, settings: schema.Freeze) -> None:
    """Refuses paths that match nothing and thaw stages that would do nothing, before the epoch when they are due."""
    named = dict(model.named_parameters(remove_duplicate=False))
    asked = {id(named[name]) for name in resolve(model, settings.modules).parameters}
    frozen = set(asked)
    for stage in sorted(settings.thaw, key=lambda stage: stage.epoch):
        for entry in stage.modules:
            found = {id(named[name]) for name in resolve(model, [entry], setting="freeze.thaw").parameters}
            if not found & frozen:
                when = "no longer" if found & asked else "not"
                raise ConfigError(
                    f"freeze.thaw: {entry!r} is {when} frozen when epoch {stage.epoch} begins, so there is nothing to "
                    f"thaw. freeze.modules is {list(settings.modules)}."
                )
            frozen -= found


def train_mode(model: nn.Module, *, batch_norm: Literal["eval", "train"] = "eval") -> None:
    """Train mode for what learns; eval mode for frozen modules (no dropout) and, by default, for running statistics.

    A module is frozen when it has parameters and none of them learns; what is below it goes with it.

    Args:
        model: the bare model, after `freeze`.
        batch_norm: "train" lets layers with running statistics update them from this process's batches, so that they
            differ between world sizes. Frozen layers never do.
    """
    model.train()
    for module in model.modules():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        has_statistics = getattr(module, "running_mean", None) is not None
        if (learns and not any(learns)) or (has_statistics and batch_norm == "eval"):
            module.eval()


@contextmanager
def held_statistics(model: nn.Module) -> Iterator[None]:
    """Around a forward pass that must leave running statistics alone, whatever `model.batch_norm` says."""
    moving = [m for m in model.modules() if m.training and getattr(m, "running_mean", None) is not None]
    for module in moving:
        module.eval()
    try:
        yield
    finally:
        for module in moving:
            module.train()


def frozen_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that do not learn, in the model's order; a tied one under each of its names."""
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]


def summary(names: Iterable[str]) -> str:
    """Names collapsed for the eye: `bert.embeddings (5 tensors), bert.encoder.layer.0-1 (32 tensors)`, or `none`."""
    counts = Counter(map(_group, names))
    runs: list[tuple[str, int | None, int | None, int]] = []
    for (stem, number), count in counts.items():
        if runs and number is not None and runs[-1][0] == stem and runs[-1][2] == number - 1:
            _, first, _, total = runs.pop()
            runs.append((stem, first, number, total + count))
        else:
            runs.append((stem, number, number, count))
    return ", ".join(_written(*run) for run in runs) or "none"


def _written(stem: str, first: int | None, last: int | None, count: int) -> str:
    where = stem if first is None else f"{stem}.{first}" if first == last else f"{stem}.{first}-{last}"
    return f"{where} ({count} tensor{'s' if count > 1 else ''})"


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to, as `summary` tells them apart: `bert.encoder.layer.3`."""
    stem, number = _group(name)
    return stem if number is None else f"{stem}.{number}"


def _group(name: str) -> tuple[str, int | None]:
    """`a.layer.3.b.weight` is layer 3 of a.layer; `a.embeddings.b.weight` is a.embeddings; `head.weight` is head."""
    if numbered := re.match(r"(.+?)\.(\d+)(?:\.|$)", name):
        return numbered[1], int(numbered[2])
    parts = name.split(".")
    return ".".join(parts[: max(1, min(2, len(parts) - 1))]), None


def _thawed(model: nn.Module, settings: schema.Freeze, epoch: int) -> set[str]:
    entries = [entry for stage in settings.thaw if stage.epoch <= epoch for entry in stage.modules]
    return set(resolve(model, entries, setting="freeze.thaw").parameters)


def _whole(model: nn.Module, names: Iterable[str], frozen: set[str]) -> Iterator[str]:
    """The modules among these, or else below them, that have a forward and parameters, all of them frozen.

    A list of layers has no forward, so its members stand for it.
    """
    for name in names:
        module = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        held = [prefix + parameter for parameter in parameter_names(module)]
        if held and frozen.issuperset(held) and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield name
        else:
            yield from _whole(model, [prefix + child for child, _ in module.named_children()], frozen)


def _cut_gradients(model: nn.Module, names: Collection[str]) -> None:
    """Runs the forward of these modules, and of no others, without recording a gradient."""
    cut = {model.get_submodule(name) for name in names}
    for module in model.modules():
        forward = module.__dict__.get("forward")
        is_cut = isinstance(forward, partial) and forward.func is _without_gradient
        if module in cut and not is_cut:
            # A partial, not a closure: copy.deepcopy then binds the copy to the copied module.
            module.forward = update_wrapper(partial(_without_gradient, module.forward), module.forward)
        elif is_cut and module not in cut:
            del module.forward
            assert isinstance(forward, partial)
            if getattr(forward.args[0], "__func__", None) is not type(module).forward:
                module.forward = forward.args[0]  # another wrapper was there before ours


def _without_gradient(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return forward(*args, **kwargs)

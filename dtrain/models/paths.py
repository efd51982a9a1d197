"""Selects modules and parameters by path: `embeddings`, `encoder.layer[:2]`, `base_model`, `*.bias`.

A path is looked up in the model and in its base model (`bert` in a BertForSequenceClassification), so one setting works
with every head. Slices follow Python's rules and select from the numbered children of a module. `*` and `?` match any
characters of the full dotted name, including dots, as in fnmatch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from dtrain.errors import ConfigError


@dataclass(frozen=True)
class ResolvedPaths:
    """The modules and parameters that a list of paths selects, in the model's order, without duplicates.

    Attributes:
        modules: names of modules that hold parameters; "" is the model itself.
        parameters: names of the parameters inside those modules or selected directly. A tied parameter appears under each
            of its names.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def resolve(model: nn.Module, entries: Sequence[str], *, setting: str = "freeze.modules") -> ResolvedPaths:
    """Finds the modules and parameters that the paths select.

    Args:
        model: the bare, unsharded model.
        entries: paths.
        setting: the setting that gave the paths, for messages.

    Raises:
        ConfigError: an entry is not a path, or matches nothing that has parameters.
    """
    modules: set[str] = set()
    parameters: set[str] = set()
    all_parameters = set(parameter_names(model))
    for entry in entries:
        matches = _find(model, entry, setting)
        useful = [name for name in matches if name in all_parameters or any(parameter_names(model.get_submodule(name)))]
        if not useful:
            raise _no_match_error(model, entry, setting, has_matches=bool(matches))
        parameters.update(name for name in useful if name in all_parameters)
        modules.update(name for name in useful if name not in all_parameters)
    inside = tuple(f"{name}." if name else "" for name in modules)
    identities = {id(p) for n, p in _named(model) if n in parameters or (inside and n.startswith(inside))}
    return ResolvedPaths(
        tuple(name for name, _ in model.named_modules(remove_duplicate=False) if name in modules),
        tuple(name for name, parameter in _named(model) if id(parameter) in identities),
    )


def parameter_names(model: nn.Module) -> list[str]:
    """Returns every name of every parameter; a tied parameter has more than one."""
    return [name for name, _ in _named(model)]


def base_prefix(model: nn.Module) -> str:
    """Returns the name of the base model inside a model with a head; "" for a model without a separate base."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def _find(model: nn.Module, entry: str, setting: str) -> set[str]:
    """Returns the names of the modules and parameters that one entry matches."""
    if not re.fullmatch(r"[\w*?]+(\[[-\d:]+\])?(\.[\w*?]+(\[[-\d:]+\])?)*", entry):
        raise ConfigError(
            f"{setting}: {entry!r} is not a path. Write names joined by dots, optionally with slices and * or ?: "
            "embeddings, encoder.layer[:2], encoder.layer[-1].attention, *.bias."
        )
    base = base_prefix(model)
    head, _, rest = entry.partition(".")
    if head == "base_model":
        return _expand(model, f"{base}.{rest}".strip(".") if rest else base, entry, setting)
    return _expand(model, entry, entry, setting) | (
        _expand(model, f"{base}.{entry}", entry, setting) if base else set()
    )


def _expand(model: nn.Module, path: str, entry: str, setting: str) -> set[str]:
    """Resolves the first slice, then the rest, until only names and wildcards are left."""
    sliced = re.match(r"(?P<before>[^\[]+)\[(?P<slice>[^\]]+)\](?P<after>.*)", path)
    if sliced is None:
        pattern = re.compile("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in path))
        return {name for name in _all_names(model) if pattern.fullmatch(name)}
    names: set[str] = set()
    for parent in _expand(model, sliced["before"], entry, setting):
        module = model.get_submodule(parent) if parent not in parameter_names(model) else nn.Module()
        children = [name for name, _ in module.named_children() if name.isdecimal()]
        for child in _select_children(children, sliced["slice"], entry, setting):
            names |= _expand(model, f"{parent}.{child}{sliced['after']}", entry, setting)
    return names


def _select_children(children: list[str], text: str, entry: str, setting: str) -> list[str]:
    """Applies an index or a slice, with Python's rules."""
    parts = text.split(":")
    if len(parts) > 3 or any(part and not re.fullmatch(r"-?\d+", part) for part in parts) or parts[2:] == ["0"]:
        raise ConfigError(
            f"{setting}: [{text}] in {entry!r} is not an index or a slice. Write [3], [-1], [:2], [2:4] or [::2]."
        )
    numbers = [int(part) if part else None for part in parts]
    if len(parts) > 1:
        return children[slice(*numbers)]
    index = numbers[0]
    assert index is not None
    return [children[index]] if -len(children) <= index < len(children) else []


def _all_names(model: nn.Module) -> list[str]:
    return [*(name for name, _ in model.named_modules(remove_duplicate=False)), *parameter_names(model)]


def _no_match_error(model: nn.Module, entry: str, setting: str, *, has_matches: bool) -> ConfigError:
    if has_matches:
        return ConfigError(f"{setting}: {entry!r} matches something without parameters, so there is nothing to freeze.")
    base = base_prefix(model)
    names = {
        re.sub(r"\.\d+(?=\.|$)", "[:]", name.removeprefix(f"{base}.") if base else name) for name in _all_names(model)
    }
    plain = {re.sub(r"\[[^\]]*\]", "", name): name.removesuffix("[:]") for name in sorted(names) if name}
    wanted = re.sub(r"\[[^\]]*\]", "", entry).removeprefix("base_model.").removeprefix(f"{base}.")
    near = [plain[match] for match in difflib.get_close_matches(wanted, list(plain), n=3)]
    counts = _counts(model)
    hint = (
        f"Did you mean {', '.join(near)}?" if near else f"The model has: {', '.join(n for n, _ in _children(model))}."
    )
    sizes = f" ({', '.join(f'{n} has {c} entries' for n, c in counts)})" if "[" in entry and counts else ""
    return ConfigError(f"{setting}: {entry!r} matches no module and no parameter. {hint}{sizes}")


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from model.named_children()
    if base := base_prefix(model):
        yield from model.get_submodule(base).named_children()


def _counts(model: nn.Module) -> list[tuple[str, int]]:
    """Returns the lists of layers, named without the base model's prefix, and the length of each."""
    base = base_prefix(model)
    lists = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    return [(name.removeprefix(f"{base}.") if base else name, len(m)) for name, m in lists]

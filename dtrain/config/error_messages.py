"""Names and error messages of settings in plain words, derived from the pydantic models that declare them.

Depends on no particular setting and no file format: load.py passes the models, the values and their locations.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]
"""The path to a setting: ("freeze", "thaw", 0, "epoch")."""

COMMAND_LINE = "command line"
"""The location of a setting that no file has."""

ABSENT = object()
"""Returned by `value_at` where there is no value."""

_NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
    Any: "any value",
}
_LIMITS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "min_length": "not empty"}


class Difference(NamedTuple):
    """A setting on which two configs differ."""

    key: str
    """Its dotted name."""
    old: str
    """The old value as YAML."""
    new: str
    """The new value as YAML."""
    resume: Literal["free", "warn", "refuse"]
    """How a resumed run treats the change: see `fields.setting`."""


def dotted_name(key: KeyPath) -> str:
    """Returns the name as a user writes it: `freeze.thaw[0].epoch`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def value_at(values: Any, key: KeyPath) -> Any:
    """Returns the value at `key` in nested mappings and lists, or `ABSENT`."""
    for part in key:
        is_list_item = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not is_list_item and not (isinstance(values, Mapping) and part in values):
            return ABSENT
        values = values[part]
    return values


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Returns the pydantic models among the alternatives of an annotation."""
    return [kind for kind in _alternatives(annotation) if _is_model(kind)]


def _is_model(kind: Any) -> bool:
    # In Python 3.10, isinstance(dict[str, str], type) is true as well.
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)


def child_annotation(annotation: Any, part: str | int) -> Any:
    """Returns the annotation of the item or field `part` of such a value; None where there can be none."""
    children = []
    for kind in _alternatives(annotation):
        arguments = get_args(kind)
        if get_origin(kind) is dict:
            children.append(arguments[1])
        elif get_origin(kind) is tuple:
            children.append(arguments[0])
        elif _is_model(kind) and part in kind.model_fields:
            children.append(kind.model_fields[part].rebuild_annotation())
    return Union[tuple(children)] if children else None  # noqa: UP007 - the members are only known here


def annotation_at(root: type[BaseModel], key: KeyPath) -> Any:
    """Returns the annotation of the setting at `key`; None where there is none."""
    annotation: Any = root
    for part in key:
        annotation = child_annotation(annotation, part)
    return annotation


def takes_text_only(annotation: Any) -> bool:
    """Returns whether a setting takes only text (or a path, or one of several words), or null."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not NoneType and kind is not None]
    return bool(kinds) and all(
        kind in (str, Path) or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)) for kind in kinds
    )


def takes_mapping_only(annotation: Any) -> bool:
    """Returns whether a setting is a section or a mapping that may not be null."""
    kinds = _alternatives(annotation)
    return all(get_origin(kind) is dict or _is_model(kind) for kind in kinds)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _alternatives(member))
    return (annotation,)


def expected_value(annotation: Any, limits: str = "") -> str:
    """Describes what a setting takes: `a whole number, at least 1, or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        # A Field() holds its constraints in a list.
        nested = [getattr(part, "metadata", [part]) for part in annotation.__metadata__]
        more = [
            text.format(getattr(constraint, name))
            for constraint in (part for parts in nested for part in parts)
            for name, text in _LIMITS.items()
            if hasattr(constraint, name)
        ]
        return expected_value(arguments[0], "".join(f", {text}" for text in more))
    if origin in (Union, UnionType):
        choices = [text for member in arguments if get_origin(member) is Literal for text in get_args(member)]
        others = [expected_value(member, limits) for member in arguments if get_origin(member) is not Literal]
        return ", or ".join(dict.fromkeys([_one_of(choices)] * bool(choices) + others))
    if origin is Literal:
        return _one_of(arguments)
    if origin is dict:
        return f"a mapping {{name: {expected_value(arguments[1])}}}"
    if origin is tuple:
        size = "" if arguments[-1] is ... else f" of {len(arguments)}"
        return f"a list{size}{limits}, each item {expected_value(arguments[0])}"
    if _is_model(annotation):
        return "a section with " + ", ".join(annotation.model_fields)
    return _NOUNS[annotation] + (limits if annotation is not NoneType else "")


def _one_of(choices: Any) -> str:
    texts = [str(choice) for choice in dict.fromkeys(choices)]
    return texts[0] if len(texts) == 1 else f"one of {', '.join(texts)}"


def error_lines(
    error: ValidationError,
    root: type[BaseModel],
    values: Mapping[str, Any],
    *,
    locate: Callable[[KeyPath], str],
    show: Callable[[Any], str],
    explain: Callable[[KeyPath], str | None],
) -> list[str]:
    """Returns one line per pydantic error: location, setting, value found, value expected, nearest valid name.

    Args:
        error: from validating `values` as `root`.
        root: the outermost model. In a union of models, the field `name` selects the member.
        values: nested plain values.
        locate: returns the location of a setting, such as `cola.yaml, line 3`.
        show: formats a value as the user would write it.
        explain: returns the message for an unknown key that has a known meaning elsewhere, without its location; else None.
    """
    details_by_key = [(_key(details["loc"], root, values), details) for details in error.errors(include_url=False)]
    lines = []
    for key, details in details_by_key:
        # For a union such as `balanced` or a mapping, only the member that matched deepest is reported.
        is_outer = any(len(other) > len(key) and other[: len(key)] == key for other, _ in details_by_key)
        if is_outer and details["type"].endswith(("_type", "literal_error")):
            continue
        lines += list(_lines(key, details, root, values, locate=locate, show=show, explain=explain))
    return list(dict.fromkeys(lines))


def _key(loc: KeyPath, root: type[BaseModel], values: Any) -> KeyPath:
    """Returns pydantic's location without the labels of union members."""
    key: KeyPath = ()
    annotation: Any = root
    for part in loc:
        is_field = any(part in model.model_fields for model in models_in(annotation))
        if is_field or value_at(values, (*key, part)) is not ABSENT:
            key, annotation = (*key, part), child_annotation(annotation, part)
    return key


def _lines(
    key: KeyPath,
    details: ErrorDetails,
    root: type[BaseModel],
    values: Mapping[str, Any],
    *,
    locate: Callable[[KeyPath], str],
    show: Callable[[Any], str],
    explain: Callable[[KeyPath], str | None],
) -> Iterator[str]:
    annotation = annotation_at(root, key)
    if details["type"] == "extra_forbidden":
        names = [key]
        section = value_at(values, key)
        if isinstance(section, Mapping) and not difflib.get_close_matches(str(key[-1]), root.model_fields, 1):
            names += [(*key, name) for name in section]  # a section of another trainer, such as training_args
        explained = [f"{locate(name)}: {text}" for name in names if (text := explain(name)) is not None]
        yield from explained or [f"{locate(key)}: {_unknown(key, root, values)}"]
        return
    if details["type"] == "value_error" and (key == () or models_in(annotation)):
        for text in str(details["ctx"]["error"]).splitlines():
            mentioned = [tuple(name.split(".")) for name in re.findall(r"[a-z_]+(?:\.\w+)+", text)]
            locations = [locate(name) for name in mentioned if value_at(values, name) is not ABSENT] or [locate(key)]
            yield f"{' and '.join(dict.fromkeys(locations))}: {text if text.endswith('?') else text.removesuffix('.') + '.'}"
        return
    if len(models_in(annotation)) > 1 and (
        value_at(values, key) is ABSENT or isinstance(value_at(values, key), Mapping)
    ):
        key = (*key, "name")
        annotation = annotation_at(root, key)
    value = value_at(values, key)
    if models_in(annotation) and value is not ABSENT and not isinstance(value, Mapping):
        yield f"{locate(key)}: {_not_a_section(key, value, annotation, show, on_command_line=locate(key) == COMMAND_LINE)}"
        return
    found = f"{dotted_name(key)} is not set" if value is ABSENT else f"{dotted_name(key)}={show(value)}"
    is_ours = details["type"] == "value_error"
    reason = str(details["ctx"]["error"]) if is_ours else f"it must be {expected_value(annotation)}"
    choices = [
        str(text) for kind in _alternatives(annotation) if get_origin(kind) is Literal for text in get_args(kind)
    ]
    nearest = difflib.get_close_matches(str(value), choices, 1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    yield f"{locate(key)}: {found}: {reason.removesuffix('.')}.{hint}"


def _not_a_section(
    key: KeyPath, value: Any, annotation: Any, show: Callable[[Any], str], *, on_command_line: bool
) -> str:
    """Returns the message for a list, a text or a number where a section stands, with the right form."""
    fields = list(dict.fromkeys(field for model in models_in(annotation) for field in model.model_fields))
    name, items = dotted_name(key), value if isinstance(value, list) else [value]
    first = next((field for field in ("name", "name_or_path", "metric") if field in fields), None)
    section: dict[str, Any] = {}
    if items and all(isinstance(item, Mapping) for item in items):  # each line has a dash
        section = {field: inner for item in items for field, inner in item.items()}
    elif len(items) == 1 and isinstance(items[0], str) and first is not None:
        section = {first: items[0]}
    found = f"{name} is a list" if isinstance(value, list) else f"{name}={show(value)}"
    text = f"{found}: it must be a section{', or null' if NoneType in _alternatives(annotation) else ''}"
    if not section:
        return f"{text}, with settings of its own: {', '.join(fields[:5])}{', ...' if len(fields) > 5 else '.'}"
    if not on_command_line or any(isinstance(part, int) for part in key):
        return f"{text}. Write '{key[-1]}: {show(section)}'."
    return (
        f"{text}. Write {' '.join(shlex.quote(f'{name}.{field}={show(inner)}') for field, inner in section.items())}."
    )


def unknown_setting(name: str, root: type[BaseModel], values: Mapping[str, Any]) -> str:
    """Returns the message for a name without a setting: `train.epoch is not a setting. Did you mean train.epochs?`"""
    return _unknown(tuple(name.split(".")), root, values)


def _unknown(key: KeyPath, root: type[BaseModel], values: Mapping[str, Any]) -> str:
    parent, last = key[:-1], str(key[-1])
    if "." in last:
        first, _, rest = last.partition(".")
        return f"{last!r} is a single key with a dot: write '{first}:' and, indented below it, '{rest}: ...'."
    siblings = _fields(parent, root, values)
    everywhere = [(section, field) for section in root.model_fields for field in _fields((section,), root, {})]
    if key in everywhere:
        selector = (*parent, "name")
        value = value_at(values, selector)
        return (
            f"{dotted_name(key)} is not a setting of {dotted_name(selector)}={value}, which has {', '.join(siblings)}."
        )
    nearest = [(*parent, field) for field in difflib.get_close_matches(last, siblings, 1, 0.7)]
    nearest = nearest or [pair for pair in everywhere if pair[1] == last]
    nearest = nearest or [(*parent, field) for field in difflib.get_close_matches(last, siblings, 1)]
    if nearest:
        return f"{dotted_name(key)} is not a setting. Did you mean {dotted_name(nearest[0])}?"
    return f"{dotted_name(key)} is not a setting: {dotted_name(parent) or 'the config'} has {', '.join(siblings)}."


def _fields(key: KeyPath, root: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Returns the names of the settings at `key`; in a union of models, those of the member that `name` selects."""
    models = models_in(annotation_at(root, key))
    name = value_at(values, (*key, "name"))
    selected = [
        model for model in models if len(models) > 1 and name in get_args(model.model_fields["name"].annotation)
    ]
    return list(dict.fromkeys(field for model in selected or models for field in model.model_fields))

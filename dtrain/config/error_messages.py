"""What a setting is called and what it takes, in plain words, read off the pydantic models that declare it.

Knows no particular setting and no file format: config.py passes the models, the values and where each value stands.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Key = tuple[str | int, ...]
"""The way to a setting: ("freeze", "thaw", 0, "epoch")."""

ABSENT = object()
"""What `value_at` finds where nothing was written."""

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
    """A setting that two configs disagree on; `old` and `new` as YAML shows them; `resume` as schema.py means it."""

    key: str
    old: str
    new: str
    resume: Literal["free", "warn", "refuse"]


def name_of(key: Key) -> str:
    """`freeze.thaw[0].epoch`, as a user would write it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def value_at(values: Any, key: Key) -> Any:
    """The value at `key` in nested mappings and lists, or `ABSENT`."""
    for part in key:
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not in_list and not (isinstance(values, Mapping) and part in values):
            return ABSENT
        values = values[part]
    return values


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models among the alternatives of an annotation."""
    return [kind for kind in _alternatives(annotation) if _is_model(kind)]


def _is_model(kind: Any) -> bool:
    # Python 3.10 takes dict[str, str] for a type, too.
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)


def inside(annotation: Any, part: str | int) -> Any:
    """The annotation of what stands at `part` inside a value of this annotation; None where nothing may stand."""
    found = []
    for kind in _alternatives(annotation):
        arguments = get_args(kind)
        if get_origin(kind) is dict:
            found.append(arguments[1])
        elif get_origin(kind) is tuple:
            found.append(arguments[0])
        elif _is_model(kind) and part in kind.model_fields:
            found.append(kind.model_fields[part].rebuild_annotation())
    return Union[tuple(found)] if found else None  # noqa: UP007 - the members are only known here


def takes_text_only(annotation: Any) -> bool:
    """Whether a setting takes text (or a path, or one of some words) and nothing else but null."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not NoneType and kind is not None]
    return bool(kinds) and all(
        kind in (str, Path) or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)) for kind in kinds
    )


def takes_mapping_only(annotation: Any) -> bool:
    """Whether a setting is a section or a mapping, and may not be null."""
    kinds = _alternatives(annotation)
    return all(get_origin(kind) is dict or _is_model(kind) for kind in kinds)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _alternatives(member))
    return (annotation,)


def expected(annotation: Any, limits: str = "") -> str:
    """`a whole number, at least 1, or null`: what a setting of this annotation takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        nested = [getattr(part, "metadata", [part]) for part in annotation.__metadata__]  # a Field() holds its own list
        more = [
            text.format(getattr(constraint, name))
            for constraint in (part for parts in nested for part in parts)
            for name, text in _LIMITS.items()
            if hasattr(constraint, name)
        ]
        return expected(arguments[0], "".join(f", {text}" for text in more))
    if origin in (Union, UnionType):
        words = [text for member in arguments if get_origin(member) is Literal for text in get_args(member)]
        others = [expected(member, limits) for member in arguments if get_origin(member) is not Literal]
        return ", or ".join(dict.fromkeys([_one_of(words)] * bool(words) + others))
    if origin is Literal:
        return _one_of(arguments)
    if origin is dict:
        return f"a mapping {{name: {expected(arguments[1])}}}"
    if origin is tuple:
        size = "" if arguments[-1] is ... else f" of {len(arguments)}"
        return f"a list{size}{limits}, each item {expected(arguments[0])}"
    if _is_model(annotation):
        return "a section with " + ", ".join(annotation.model_fields)
    return _NOUNS[annotation] + (limits if annotation is not NoneType else "")


def _one_of(words: Any) -> str:
    texts = [str(word) for word in dict.fromkeys(words)]
    return texts[0] if len(texts) == 1 else f"one of {', '.join(texts)}"


def complaints(
    error: ValidationError,
    root: type[BaseModel],
    values: Mapping[str, Any],
    *,
    place: Callable[[Key], str],
    show: Callable[[Any], str],
) -> list[str]:
    """One line for each thing that pydantic found wrong: place, setting, value found, what is expected, nearest name.

    Args:
        error: from validating `values` as `root`.
        root: the outermost model. A union of models in it is told apart by the field `name`.
        values: nested plain values.
        place: says where a setting stands, for people.
        show: words a value as the user would write it.
    """
    found = [(_key(details["loc"], root, values), details) for details in error.errors(include_url=False)]
    lines = []
    for key, details in found:
        # Of a union such as `balanced` or a mapping, the member that came furthest says what is wrong.
        is_outer = any(len(other) > len(key) and other[: len(key)] == key for other, _ in found)
        if is_outer and details["type"].endswith(("_type", "literal_error")):
            continue
        lines += list(_lines(key, details, root, values, place=place, show=show))
    return list(dict.fromkeys(lines))


def _key(loc: Key, root: type[BaseModel], values: Any) -> Key:
    """pydantic's location without the labels of union members in it."""
    key: Key = ()
    annotation: Any = root
    for part in loc:
        is_field = any(part in model.model_fields for model in models_in(annotation))
        if is_field or value_at(values, (*key, part)) is not ABSENT:
            key, annotation = (*key, part), inside(annotation, part)
    return key


def _lines(
    key: Key,
    details: ErrorDetails,
    root: type[BaseModel],
    values: Mapping[str, Any],
    *,
    place: Callable[[Key], str],
    show: Callable[[Any], str],
) -> Iterator[str]:
    annotation = at(root, key)
    if details["type"] == "extra_forbidden":
        yield f"{place(key)}: {_unknown(key, root, values)}"
        return
    if details["type"] == "value_error" and (key == () or models_in(annotation)):
        for text in str(details["ctx"]["error"]).splitlines():
            mentioned = [tuple(name.split(".")) for name in re.findall(r"[a-z_]+(?:\.\w+)+", text)]
            places = [place(name) for name in mentioned if value_at(values, name) is not ABSENT] or [place(key)]
            yield f"{' and '.join(dict.fromkeys(places))}: {text.removesuffix('.')}."
        return
    if len(models_in(annotation)) > 1 and (
        value_at(values, key) is ABSENT or isinstance(value_at(values, key), Mapping)
    ):
        key = (*key, "name")
        annotation = at(root, key)
    value = value_at(values, key)
    is_set = f"{name_of(key)} is not set" if value is ABSENT else f"{name_of(key)}={show(value)}"
    why = str(details["ctx"]["error"]) if details["type"] == "value_error" else f"it must be {expected(annotation)}"
    words = [str(word) for kind in _alternatives(annotation) if get_origin(kind) is Literal for word in get_args(kind)]
    near = difflib.get_close_matches(str(value), words, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    yield f"{place(key)}: {is_set}: {why.removesuffix('.')}.{hint}"


def not_a_setting(name: str, root: type[BaseModel], values: Mapping[str, Any]) -> str:
    """`optim.learning_rat is not a setting. Did you mean optim.learning_rate?`"""
    return _unknown(tuple(name.split(".")), root, values)


def _unknown(key: Key, root: type[BaseModel], values: Mapping[str, Any]) -> str:
    parent, last = key[:-1], str(key[-1])
    if "." in last:
        first, _, rest = last.partition(".")
        return f"{last!r} is one key: in a file, write '{first}:' and, indented below it, '{rest}: ...'."
    siblings = _fields(parent, root, values)
    everywhere = [(section, field) for section in root.model_fields for field in _fields((section,), root, {})]
    if key in everywhere:
        chosen = name_of((*parent, "name"))
        value = value_at(values, (*parent, "name"))
        return f"{name_of(key)} is not a setting of {chosen}={value}, which has {', '.join(siblings)}."
    near = [(*parent, field) for field in difflib.get_close_matches(last, siblings, 1, 0.7)]
    near = near or [pair for pair in everywhere if pair[1] == last]
    near = near or [(*parent, field) for field in difflib.get_close_matches(last, siblings, 1)]
    if near:
        return f"{name_of(key)} is not a setting. Did you mean {name_of(near[0])}?"
    return f"{name_of(key)} is not a setting: {name_of(parent) or 'the config'} has {', '.join(siblings)}."


def _fields(key: Key, root: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Names of the settings that may stand at `key`; in a union of models, those of the one that `name` chooses."""
    models = models_in(at(root, key))
    name = value_at(values, (*key, "name"))
    chosen = [model for model in models if len(models) > 1 and name in get_args(model.model_fields["name"].annotation)]
    return list(dict.fromkeys(field for model in chosen or models for field in model.model_fields))


def at(root: type[BaseModel], key: Key) -> Any:
    """The annotation of the setting at `key`; None where there is none."""
    annotation: Any = root
    for part in key:
        annotation = inside(annotation, part)
    return annotation

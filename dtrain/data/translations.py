"""Pairs of texts: a sentence and its translation, a document and its summary.

Two columns of a table, or the two sides of a column `translation`, as in `{"translation": {"en": ..., "ro": ...}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Values
from dtrain.data.tables import Layout, Origin, Shape, checked_text, given_columns, missing_column, text_of, value_of
from dtrain.errors import ConfigError, DataError

SIDES = "translation"
"""The column that holds one text for each language."""

PAIRS = (
    ("source", "target"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "summary"),
    ("text", "summary"),
    ("input", "output"),
)


def translations(source: str | None, target: str | None) -> Shape:
    """Rows with `source` and, where the split has them, `target`. An empty text is a text.

    Args:
        source: side of `translation`, or column; None: the usual names.
        target: the same.
    """

    def layout(first: Values, origin: Origin) -> Layout:
        given = given_columns(list(first), origin, ("source", "target"))
        if SIDES in first and not given:
            return _sides(first, origin, source, target)
        return _columns(first, origin, given.get("source", source), given.get("target", target))

    return Shape("translations", layout)


def _sides(first: Values, origin: Origin, source: str | None, target: str | None) -> Layout:
    if source is None or target is None:
        sides = first[SIDES]
        listed = list(sides) if isinstance(sides, Mapping) else []
        example = listed if len(listed) == 2 else ["en", "ro"]
        raise ConfigError(
            f"{origin.name} has translations{' (' + ', '.join(listed) + ')' if listed else ''}: say from which "
            f"language into which, e.g. task.source={example[0]} task.target={example[1]}"
        )
    has_target = origin.needs_label or _side(first, target, None) is not None

    def convert(values: Values, place: str) -> dict[str, str]:
        row = {"source": _text_of_side(values, source, place)}
        return {**row, "target": _text_of_side(values, target, place)} if has_target else row

    return Layout(_schema(has_target=has_target), convert)


def _side(values: Values, side: str, default: Any) -> Any:
    sides = values.get(SIDES)
    return sides.get(side, default) if isinstance(sides, Mapping) else default


def _text_of_side(values: Values, side: str, place: str) -> str:
    sides = value_of(values, SIDES, place)
    if not isinstance(sides, Mapping):
        raise DataError(
            f'{place}: {SIDES} must hold a text for each language, as in {{"en": ..., "ro": ...}}, found {sides!r}'
        )
    if side not in sides:
        raise DataError(f"{place}: {SIDES} lacks the side {side!r}; it has {', '.join(map(str, sides)) or 'none'}")
    return checked_text(sides[side], f"{SIDES}.{side}", place)


def _columns(first: Values, origin: Origin, source: str | None, target: str | None) -> Layout:
    found = list(first)
    source, target = _by_usual_names(found, source, target)
    if source is None or (target is None and origin.needs_label):
        what, ours, place = ("the source", "source", 0) if source is None else ("the target", "target", 1)
        raise missing_column(what, ours, list(dict.fromkeys(pair[place] for pair in PAIRS)), found, origin)
    for name, setting in ((source, "source"), (target, "target")):
        if name is not None and name not in found and (setting == "source" or origin.needs_label):
            raise DataError(
                f"{origin.name} has no column {name!r}, which task.{setting} names, and no column {SIDES!r} with such a "
                f"side. Its columns: {', '.join(found)}"
            )
    source_column = source
    target_column = target if origin.needs_label or first.get(target or "") is not None else None

    def convert(values: Values, place: str) -> dict[str, str]:
        row = {"source": text_of(values, source_column, place)}
        return row if target_column is None else {**row, "target": text_of(values, target_column, place)}

    return Layout(_schema(has_target=target_column is not None), convert)


def _by_usual_names(found: Sequence[str], source: str | None, target: str | None) -> tuple[str | None, str | None]:
    """What is not said, from the first pair of usual names that fits; a lone source where there is no such pair."""
    for one, other in PAIRS:
        if one in found and other in found and source in (None, one) and target in (None, other):
            return one, other
    alone = next((one for one, _ in PAIRS if one in found and one != target), None)
    return source or alone, target


def _schema(*, has_target: bool) -> pa.Schema:
    names = ("source", "target") if has_target else ("source",)
    return pa.schema([(name, pa.string()) for name in names])

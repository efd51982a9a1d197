"""The names of classes: one name for one class, and what cannot be classes."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dtrain.errors import DataError

MOST_NUMBERED_CLASSES = 20
"""More classes than this that are numbers are checked for being a quantity."""


def label_text(value: Any, location: str) -> str | None:
    """Returns a label's name; None for an empty label or NaN.

    One class has one name: blanks around it are removed, its accents are composed (NFC), and `1.0` is `1`, because pandas
    writes integers like this when another row has none.

    Raises:
        DataError: the value is not a name or a number, or it is the text `nan`, a missing value written as text.
    """
    if isinstance(value, str):
        name, is_missing = _read_name(value)
        if is_missing:
            raise DataError(
                f"{location}: the label is the text {value!r}, which pandas writes for a missing value. Correct or remove the "
                "row, or rename the class if there is one of this name"
            )
        return name or None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int | float):
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)
    raise DataError(f"{location}: a label is a name or a number, found {value!r}")


@lru_cache(maxsize=1024)  # a column has few labels and many rows
def _read_name(value: str) -> tuple[str, bool]:
    """Returns the name that a text stands for, and whether it is a missing value written as text."""
    name = unicodedata.normalize("NFC", value).strip()
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", name), name.casefold() in ("nan", "<na>")


def check_classes(counts: Mapping[str, int], origin: str) -> list[str]:
    """Returns what is odd about classes that were read from training rows, one line each.

    Args:
        counts: label -> number of training rows.

    Raises:
        DataError: they cannot be classes: there is only one, or they are measured numbers.
    """
    names = list(counts)
    if len(names) == 1:
        raise DataError(
            f"{origin}: all {counts[names[0]]} training rows have the label {names[0]!r}, so there is nothing to learn. Add rows "
            "of another class, or name the right column in data.columns.label"
        )
    numbers = [number for name in names if (number := _number(name)) is not None]
    listed = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    if len(numbers) == len(names) > 2:
        has_fractions = any(not number.is_integer() for number in numbers)
        if has_fractions and len(names) > MOST_NUMBERED_CLASSES:
            raise DataError(
                f"{origin}: the labels are {len(names)} different numbers ({listed}), which is a quantity and not classes: set "
                "task.name=regression. If they are classes, write them as names, e.g. c1.5"
            )
        has_gaps = max(numbers) - min(numbers) >= len(names) > MOST_NUMBERED_CLASSES
        if has_fractions or has_gaps:
            return [
                f"{origin}: the labels are {len(names)} different numbers ({listed}) and are learned as {len(names)} classes. "
                "For a quantity set task.name=regression"
            ]
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_folded(name), []).append(name)
    lines = [
        f"{origin}: {' and '.join(map(repr, same))} are different classes ({', '.join(str(counts[n]) for n in same)} rows). If "
        "they are the same, correct the rows"
        for same in alike.values()
        if len(same) > 1
    ]
    if len(names) > MOST_NUMBERED_CLASSES and sum(counts.values()) < 2 * len(names):
        lines.append(
            f"{origin}: {len(names)} classes for {sum(counts.values())} training rows ({listed}). Is data.columns.label the right "
            "column?"
        )
    return lines


def _number(name: str) -> float | None:
    return float(name) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", name) else None


def _folded(name: str) -> str:
    """Returns a form that is equal for names that look the same: case, width, blanks and zeros of numbers are ignored."""
    folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    number = _number(folded)
    return folded if number is None else repr(number)

"""Rows of a multiple choice, in the layout of SWAG: two sentences, the second's endings, which of them is right.

Columns sent1, sent2, ending0, ending1, ... and label, the right ending's number from 0 on; other names by
`data.columns`. How many endings there are is read from the columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Values
from dtrain.data.tables import Layout, Origin, Shape, given_columns, label_text, text_of, value_of
from dtrain.errors import DataError


def _layout(first: Values, origin: Origin) -> Layout:
    found = list(first)
    numbers = [int(name[6:]) for name in (*found, *origin.given) if re.fullmatch(r"ending\d{1,3}", name)]
    ours = ("sent1", "sent2", *(f"ending{number}" for number in range(max(numbers, default=1) + 1)), "label")
    given = given_columns(found, origin, ours)
    names = {our: given.get(our, our) for our in ours}
    endings = [names[our] for our in _endings(found, names, origin)]
    for our in ("sent1", "sent2"):
        if names[our] not in found:
            raise _no_column(our, found, origin)
    label: str | None = names["label"] if names["label"] in found else None
    if label is None and origin.needs_label:
        raise _no_column("label", found, origin)
    if label is not None and not origin.needs_label and label_text(first[label], origin.name) is None:
        label = None  # a test file with an empty column

    def convert(values: Values, place: str) -> dict[str, Any]:
        row: dict[str, Any] = {
            "sent1": text_of(values, names["sent1"], place),
            "sent2": text_of(values, names["sent2"], place),
            "endings": [_ending(values, name, place, choices=len(endings)) for name in endings],
        }
        if label is not None:
            row["label"] = _number(value_of(values, label, place), label, place, choices=len(endings))
        return row

    schema = [("sent1", pa.string()), ("sent2", pa.string()), ("endings", pa.list_(pa.string()))]
    return Layout(pa.schema(schema + ([("label", pa.int64())] if label is not None else [])), convert)


def _endings(found: Sequence[str], names: dict[str, str], origin: Origin) -> list[str]:
    """Our names of the endings that the file has, of which none may be left out in between."""
    there = [our for our in names if our.startswith("ending") and names[our] in found]
    wanted = [f"ending{number}" for number, _ in zip(count(), there, strict=False)]
    if len(there) < 2 or there != wanted:
        missing = next((our for our in wanted if our not in there), f"ending{len(there)}")
        raise _no_column(missing, found, origin)
    return there


def _no_column(ours: str, found: Sequence[str], origin: Origin) -> DataError:
    return DataError(
        f"{origin.name} has no column {ours}. A multiple choice has sent1, sent2, ending0, ending1 (two endings at "
        f"least) and label. Its columns: {', '.join(found)}. Say which it is: data.columns={{{ours}: ...}}"
    )


def _ending(values: Values, name: str, place: str, *, choices: int) -> str:
    if values.get(name) in (None, ""):
        raise DataError(f"{place}: {name} is missing: each of the {choices} endings needs a text")
    return text_of(values, name, place)


def _number(value: Any, name: str, place: str, *, choices: int) -> int:
    text = label_text(value, place)
    if text is None:
        raise DataError(f"{place}: no label ({name} is {value!r}). Every row to learn or to judge needs one")
    if not re.fullmatch(r"\d{1,3}(\.0+)?", text.strip()) or int(float(text)) >= choices:
        raise DataError(
            f"{place}: {name} is {value!r}, expected the number of the right ending, 0 to {choices - 1} "
            f"for {choices} endings"
        )
    return int(float(text))


CHOICES = Shape("choices", _layout)

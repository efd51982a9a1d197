"""Multiple choice rows in the layout of SWAG: two texts, possible endings of the second, and the right ending.

The columns are sent1, sent2, ending0, ending1, ... and label, the 0-based number of the right ending. `data.columns`
can name other columns. The number of endings is read from the columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

import pyarrow as pa

from dtrain.data.label_names import label_text
from dtrain.data.readers import Values
from dtrain.data.tables import Origin, RowConverter, RowFormat, configured_columns, get_text, get_value
from dtrain.errors import DataError


def _converter(first: Values, origin: Origin) -> RowConverter:
    columns = list(first)
    numbers = [int(name[6:]) for name in (*columns, *origin.columns) if re.fullmatch(r"ending\d{1,3}", name)]
    ours = ("sent1", "sent2", *(f"ending{number}" for number in range(max(numbers, default=1) + 1)), "label")
    configured = configured_columns(columns, origin, ours)
    names = {our: configured.get(our, our) for our in ours}
    endings = [names[our] for our in _endings(columns, names, origin)]
    for our in ("sent1", "sent2"):
        if names[our] not in columns:
            raise _no_column(our, columns, origin)
    label: str | None = names["label"] if names["label"] in columns else None
    if label is None and origin.needs_label:
        raise _no_column("label", columns, origin)
    if label is not None and not origin.needs_label and label_text(first[label], origin.name) is None:
        label = None  # a test file with an empty label column

    def convert(values: Values, location: str) -> dict[str, Any]:
        row: dict[str, Any] = {
            "sent1": get_text(values, names["sent1"], location),
            "sent2": get_text(values, names["sent2"], location),
            "endings": [_ending(values, name, location, choices=len(endings)) for name in endings],
        }
        if label is not None:
            row["label"] = _number(get_value(values, label, location), label, location, choices=len(endings))
        return row

    schema = [("sent1", pa.string()), ("sent2", pa.string()), ("endings", pa.list_(pa.string()))]
    return RowConverter(pa.schema(schema + ([("label", pa.int64())] if label is not None else [])), convert)


def _endings(columns: Sequence[str], names: dict[str, str], origin: Origin) -> list[str]:
    """Returns our names of the endings in the file: ending0, ending1, ... without a gap."""
    present = [our for our in names if our.startswith("ending") and names[our] in columns]
    wanted = [f"ending{number}" for number, _ in zip(count(), present, strict=False)]
    if len(present) < 2 or present != wanted:
        missing = next((our for our in wanted if our not in present), f"ending{len(present)}")
        raise _no_column(missing, columns, origin)
    return present


def _no_column(ours: str, columns: Sequence[str], origin: Origin) -> DataError:
    return DataError(
        f"{origin.name} has no column {ours}. A multiple choice has sent1, sent2, ending0, ending1 (at least two endings) "
        f"and label. Its columns: {', '.join(columns)}. Name the right one: data.columns.{ours}=COLUMN"
    )


def _ending(values: Values, name: str, location: str, *, choices: int) -> str:
    if values.get(name) in (None, ""):
        raise DataError(f"{location}: {name} is missing: each of the {choices} endings needs a text")
    return get_text(values, name, location)


def _number(value: Any, name: str, location: str, *, choices: int) -> int:
    text = label_text(value, location)
    if text is None:
        raise DataError(f"{location}: no label ({name} is {value!r}). Every training or evaluation row needs one")
    if not re.fullmatch(r"\d{1,3}(\.0+)?", text.strip()) or int(float(text)) >= choices:
        raise DataError(
            f"{location}: {name} is {value!r}, expected the number of the right ending, 0 to {choices - 1} "
            f"for {choices} endings"
        )
    return int(float(text))


CHOICES = RowFormat("choices", _converter)

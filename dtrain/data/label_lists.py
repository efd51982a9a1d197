"""Rows with a text, or two, and a list of labels, which may be empty.

A list is a list of names in JSON, Parquet and on the hub. In CSV and TSV it is a text: names with a separator between them,
or a list as JSON (`["sport", "politics"]`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa

from dtrain.config import bounded_json
from dtrain.data.column_names import LABELS
from dtrain.data.label_names import label_text
from dtrain.data.readers import Values
from dtrain.data.tables import Origin, RowConverter, RowFormat, labeled_converter
from dtrain.errors import DataError

LIST_COLUMNS = ("labels", "label", "tags", "classes", "categories", "topics", "genres", *LABELS[2:])


def label_lists(separator: str) -> RowFormat:
    """Returns the format of rows with a column `label` that is a list of names.

    Args:
        separator: text between two labels of a text column.
    """

    def converter(first: Values, origin: Origin) -> RowConverter:
        read = partial(read_labels, separator=separator)
        kind = pa.list_(pa.string())
        return labeled_converter(first, origin, label_type=kind, read_label=read, usual_labels=LIST_COLUMNS)

    return RowFormat(f"label-lists {separator}", converter)


def read_labels(value: Any, location: str, *, separator: str) -> list[str] | None:
    """Returns the names of a row's labels, each once, in their order; None if the row has no list.

    Raises:
        DataError: the value is no list, or an item of it is no label.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = _json_list(value, location) if value.lstrip().startswith("[") else value.split(separator)
        value = [name.strip() if isinstance(name, str) else name for name in value]
        value = [name for name in value if name != ""]
    if not isinstance(value, list):
        raise DataError(
            f"{location}: the labels must be a list, or a text with {separator!r} between them (task.separator), found {value!r:.80}"
        )
    names = [label_text(name, location) for name in value]
    if None in names:
        raise DataError(f"{location}: label {names.index(None) + 1} of {value!r:.80} is empty")
    return list(dict.fromkeys(name for name in names if name is not None))


def _json_list(text: str, location: str) -> list[Any]:
    try:
        names = bounded_json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{location}: the labels {text!r:.80} start with [ but are not a list in JSON: {error}"
        ) from None
    assert isinstance(names, list), "it starts with ["
    return names

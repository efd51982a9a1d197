"""Rows with a text, or two, and a list of labels, which may be empty.

A list is a list of names in JSON, Parquet and on the hub. In CSV and TSV it is a text: names with a separator between them,
or a list as JSON (`["sport", "politics"]`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from dtrain.data.column_names import LABELS
from dtrain.data.label_names import label_text
from dtrain.data.readers import Values
from dtrain.data.sources import Source, fixed_label_names, label_order
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
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location}: the labels {text!r:.80} start with [ but are not a list in JSON: {error}"
        ) from None
    assert isinstance(names, list), "it starts with ["
    return names


def listed_label_names(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Returns the labels in the order of their ids: those that the source defines, else the sorted training labels.

    Raises:
        DataError: a row has another label, or there is no train split to take the labels from.
    """
    names = fixed_label_names(sources)
    if names is None and "train" in sources:
        rows = sources["train"].rows
        names = tuple(sorted({name for labels in rows["label"] for name in labels}, key=label_order))
    if names is None:
        raise DataError("there is no train split to take the labels from: name one in data.splits")
    check_listed_labels(sources, names)
    return names


def check_listed_labels(sources: Mapping[str, Source], names: tuple[str, ...]) -> None:
    """Checks that every label of every split is one of `names`.

    Raises:
        DataError: with file, line and label of the first row that has another label, and the known labels.
    """
    known = set(names)
    for source in sources.values():
        if "label" not in source.rows.column_names:
            continue
        for line, labels in zip(source.rows["line"], source.rows["label"], strict=True):
            if unknown := [label for label in labels if label not in known]:
                raise DataError(
                    f"{source.origin}, {source.unit} {line}: {unknown[0]!r} is not one of the known labels: "
                    f"{', '.join(names[:50])}{', ...' if len(names) > 50 else ''}. They come from the training rows, the data "
                    "set or the model: correct the row, or add a training row with this label"
                )

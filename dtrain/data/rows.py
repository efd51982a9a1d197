"""From rows of any source to one table: which column is the text, the second text, the label; checked, kept as Arrow.

Where rows come from is the business of readers.py, glue.py and hub.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from dtrain.data.readers import Row
from dtrain.errors import ConfigError, DataError

Kind = Literal["labelled", "text"]
Unit = Literal["line", "row"]

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
TEXTS = ("text", "sentence", "content", "review", "comment", "document", "utterance", "question", "query")
LABELS = ("label", "labels", "class", "category", "target", "gold_label", "is_duplicate", "sentiment", "intent")

BATCH_ROWS = 1000


class Example(NamedTuple):
    """One row as every source ends up. `text_pair` and `label` are None for all rows of a split, or for none."""

    line: int
    text: str
    text_pair: str | None
    label: str | None


@dataclass(frozen=True)
class Columns:
    """The source's names for our columns; None where there is no such column."""

    text: str
    text_pair: str | None
    label: str | None


def find_columns(
    found: Sequence[str], given: Mapping[str, str], *, kind: Kind, origin: str, needs_label: bool
) -> Columns:
    """Which of the columns found are ours: as `data.columns` says, else by the usual names.

    Raises:
        ConfigError: `data.columns` names a column of ours that does not exist.
        DataError: a column is not in the source, or none of the usual names is; the message lists what is there.
    """
    if unknown := [name for name in given if name not in ("text", "text_pair", "label")]:
        raise ConfigError(
            f"data.columns.{unknown[0]} is not a column that is read. Those are text, text_pair and label"
        )
    listed = ", ".join(found)
    for ours, theirs in given.items():
        if theirs not in found:
            raise DataError(
                f"{origin} has no column {theirs!r}, which data.columns.{ours} names. Its columns: {listed}"
            )
    text, pair, label = given.get("text"), given.get("text_pair"), given.get("label")
    if text is None:
        pairs = (names for names in PAIRS if set(names) <= set(found) and pair in (None, names[1]))
        text, pair = next(pairs, (None, pair))
    text = text or next((name for name in TEXTS if name in found and name not in (label, pair)), None)
    if text is None:
        raise DataError(
            f"{origin} has no column with a usual name for text ({', '.join(TEXTS)}). Its columns: {listed}. "
            f"Say which it is: data.columns={{text: {found[0] if found else '...'}}}"
        )
    if kind == "text":
        return Columns(text, None, None)
    label = label or next((name for name in LABELS if name in found and name not in (text, pair)), None)
    if label is None and needs_label:
        raise DataError(
            f"{origin} has no column with a usual name for the label ({', '.join(LABELS)}). Its columns: {listed}. "
            f"Say which it is: data.columns={{label: {found[-1]}}}"
        )
    return Columns(text, pair, label)


def to_examples(
    rows: Iterable[Row],
    given: Mapping[str, str],
    *,
    kind: Kind,
    origin: str,
    unit: Unit,
    needs_label: bool,
    label_of: Callable[[Any], str | None] | None = None,
) -> Iterator[Example]:
    """Rows as examples; the first row's columns stand for all.

    Args:
        origin: file or hub name, for messages.
        unit: what a row's number counts.
        needs_label: False for a split that is only predicted: then an absent or empty label column is left out.
        label_of: names a label (None: has none); default: its text.

    Raises:
        DataError: a row without one of the columns, or a value that is no text or label.
    """
    columns: Columns | None = None
    labelled = needs_label
    for line, values in rows:
        first = columns is None
        columns = columns or find_columns(list(values), given, kind=kind, origin=origin, needs_label=needs_label)
        place = f"{origin}, {unit} {line}"
        label = None
        if columns.label is not None and (first or labelled):
            value = _value(values, columns.label, place)
            label = _label_text(value, place) if label_of is None else label_of(value)
            labelled = labelled or label is not None
            if label is None and labelled:
                raise DataError(
                    f"{place}: no label ({columns.label} is {value!r}). Every row to learn or to judge needs one"
                )
        pair = None if columns.text_pair is None else _text(values, columns.text_pair, place)
        yield Example(line, _text(values, columns.text, place), pair, label)


def _value(values: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in values:
        raise DataError(f"{place}: the column {name!r} is missing; the row has {', '.join(values) or 'no columns'}")
    return values[name]


def _text(values: Mapping[str, Any], name: str, place: str) -> str:
    value = _value(values, name, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be text, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no text holds
        raise DataError(
            f"{place}: {name} has the character {value[error.start]!a}, half of a surrogate pair, at {error.start}"
        ) from None
    return value


def _label_text(value: Any, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool | int | float):
        return str(value)
    raise DataError(f"{place}: a label is a name or a number, found {value!r}")


def to_table(examples: Iterator[Example], *, origin: str, file: Path | None = None) -> datasets.Dataset:
    """Examples as a data set with columns text, text_pair and label (if there), and line.

    Written a batch at a time as Arrow, in memory or to `file`, which is then mapped: never a Python list of all rows.

    Raises:
        DataError: there is no example.
    """
    first = next(examples, None)
    if first is None:
        raise DataError(f"{origin} has no rows: a split needs at least one")
    used = [name for name in ("text", "text_pair", "label") if getattr(first, name) is not None]
    schema = pa.schema([*((name, pa.string()) for name in used), ("line", pa.int64())])
    rows = chain([first], examples)
    sink = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(rows, BATCH_ROWS)):
            columns = [
                pa.array([getattr(example, name) for example in batch], schema.field(name).type)
                for name in schema.names
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    if file:
        return datasets.Dataset.from_file(str(file))
    return datasets.Dataset(InMemoryTable(pa.ipc.open_stream(sink.getvalue()).read_all()))

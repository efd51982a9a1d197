"""Converts rows of any source into an Arrow table with the columns that a task needs.

A task describes these columns as a RowFormat. TEXT and LABELED are defined here, others in neighboring files. The rows
come from readers.py, glue.py and hub.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from dtrain.console import log
from dtrain.data.column_names import LABELS, PAIRS, TEXTS, cure, looks_like_a_value, propose_column
from dtrain.data.delimiters import likely_delimiter
from dtrain.data.label_names import label_text
from dtrain.data.readers import Row, Values
from dtrain.errors import ConfigError, DataError

Unit = Literal["line", "row"]

BATCH_ROWS = 1000
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Origin:
    """The source of the rows of one split.

    Attributes:
        name: file or hub name, for messages.
        unit: unit that row numbers count.
        needs_label: False for a split that is only predicted.
        columns: `data.columns`: our column name -> the source's.
        class_names: the labels in order, for columns whose labels the source defines.
    """

    name: str
    unit: Unit = "line"
    needs_label: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RowConverter:
    """Converts the rows of one split.

    Attributes:
        schema: the columns of a converted row.
        convert: makes a row of `schema` from a source row and its location ("a.csv, line 3"). Raises DataError for a row
            that cannot be used.
        label_names: the labels in the order of their ids if the source defines them.
        columns: our column -> the source's, where they are columns of a table.
    """

    schema: pa.Schema
    convert: Callable[[Values, str], Mapping[str, Any]]
    label_names: tuple[str, ...] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowFormat:
    """The rows that a task needs.

    Attributes:
        name: part of the cache key. Change it (e.g. add a number) when the meaning of the rows changes.
        converter: returns the converter of a split, given its first row.
        text_rows: reads rows from a plain text file in `data.encoding`; None: this task has no such rows.
        unnest: turns source rows that hold several of this task's rows into single rows.
        is_whole_text: whether a plain text file is one text, for language models.
        usual_draw: default of `data.split`. Only rows with a class as `label` can be stratified.
    """

    name: str
    converter: Callable[[Values, Origin], RowConverter]
    text_rows: Callable[[Path, str | None], Iterator[Row]] | None = None
    unnest: Callable[[Iterable[Row], Origin], Iterator[Row]] | None = None
    is_whole_text: bool = False
    usual_draw: Literal["stratified", "mixed", "end"] = "mixed"


class BadRows:
    """Counts the bad rows of a split. Skips as many as data.max_bad_rows allows, with a warning."""

    def __init__(self, limit: int, *, skipped: int = 0) -> None:
        self.skipped = skipped
        self._limit = limit

    def add(self, error: DataError) -> None:
        """Counts one more bad row.

        Raises:
            DataError: the row's error, if no more are allowed.
        """
        if self.skipped == self._limit:
            more = f" (data.max_bad_rows={self._limit} were skipped before it)" if self._limit else ""
            raise DataError(f"{error}{more}") from error
        self.skipped += 1
        if self.skipped <= SHOWN_BAD_ROWS:
            log.warning("data: skipped: %s", error)


@dataclass(frozen=True)
class Table:
    """The converted rows of one split.

    Attributes:
        rows: the columns of the converter's schema, and `line`.
        label_names: the labels in the order of their ids if the source defines them.
        bad: the count of skipped rows.
        columns: our column -> the source's.
        read: number of rows before any draw.
    """

    rows: datasets.Dataset
    label_names: tuple[str, ...] | None
    bad: BadRows
    columns: Mapping[str, str] = field(default_factory=dict)
    read: int = 0


def to_table(
    rows: Iterable[Row], row_format: RowFormat, origin: Origin, *, file: Path | None = None, max_bad_rows: int = 0
) -> Table:
    """Converts the rows to the task's format. The columns of the first row apply to all rows.

    Writes Arrow in batches, to memory or to `file`, which is then memory-mapped. Never holds all rows as Python objects.

    Raises:
        DataError: there are no rows, or more than max_bad_rows cannot be used; the message names the first of these.
    """
    converter, bad = None, BadRows(max_bad_rows)

    def converted_rows() -> Iterator[Mapping[str, Any]]:
        nonlocal converter
        for line, values in rows:
            if isinstance(values, DataError):
                bad.add(values)
                continue
            try:
                converter = converter or row_format.converter(values, origin)
                yield {**converter.convert(values, f"{origin.name}, {origin.unit} {line}"), "line": line}
            except DataError as error:
                bad.add(error)

    remaining = converted_rows()
    batch = list(islice(remaining, BATCH_ROWS))
    if not batch:
        raise DataError(f"{origin.name} has no rows: a split needs at least one")
    assert converter is not None
    schema = converter.schema.append(pa.field("line", pa.int64()))
    sink = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            batch = list(islice(remaining, BATCH_ROWS))
    table = (
        datasets.Dataset.from_file(str(file))
        if file
        else datasets.Dataset(InMemoryTable(pa.ipc.open_stream(sink.getvalue()).read_all()))
    )
    return Table(table, converter.label_names, bad, converter.columns, len(table))


# For all row formats


def configured_columns(columns: Sequence[str], origin: Origin, ours: Sequence[str]) -> dict[str, str]:
    """Returns `data.columns` after checking it. The label may be missing in a split that needs none.

    Args:
        columns: the columns of the source.
        ours: our column names that `data.columns` may have.

    Raises:
        ConfigError: `data.columns` has a name that is not one of ours.
        DataError: the source has no such column.
    """
    if unknown := [name for name in origin.columns if name not in ours]:
        raise ConfigError(
            f"data.columns.{unknown[0]} is not a column that this task reads. Those are {', '.join(ours[:-1])}"
            f"{' and ' if len(ours) > 1 else ''}{ours[-1]}"
        )
    present = {our: column for our, column in origin.columns.items() if column in columns}
    for our, column in origin.columns.items():
        if our not in present and (our != "label" or origin.needs_label):
            raise DataError(
                f"{origin.name} has no column {column!r}, which data.columns.{our} names. Its columns: "
                f"{', '.join(columns)}"
            )
    return present


def missing_column(
    meaning: str,
    ours: str,
    usual: Sequence[str],
    columns: Sequence[str],
    origin: Origin,
    *,
    taken: Iterable[str | None] = (),
    first: Values | None = None,
) -> DataError:
    """Returns the error for a column that has none of the usual names.

    Args:
        taken: columns that are already used for something else.
        first: the first row, to propose the column with the longest text for a text.
    """
    found = f"{origin.name} has no column with a usual name for {meaning} ({', '.join(usual)}). Its columns: "
    found += ", ".join(map(repr, columns)) if any(name != name.strip() for name in columns) else ", ".join(columns)
    if mark := likely_delimiter(columns):
        return DataError(f"{found}. These look separated by {mark!r}: {cure('data.delimiter', mark)}")
    if columns and Path(origin.name).suffix.lower() in (".csv", ".tsv") and all(map(looks_like_a_value, columns)):
        return DataError(
            f"{found}. If this line is a row, there is no header: data.header=false {cure(f'data.columns.{ours}', '0')}"
        )
    example = propose_column(ours, usual, columns, {*taken, *origin.columns.values()}, first)
    if example is None:
        return DataError(f"{found}. Name the right one, if there is one: data.columns.{ours}=NAME")
    return DataError(f"{found}. Name the right one: {cure(f'data.columns.{ours}', example)}")


def get_value(values: Values, name: str, location: str) -> Any:
    """Returns the row's value in a column."""
    if name not in values:
        raise DataError(f"{location}: the column {name!r} is missing; the row has {', '.join(values) or 'no columns'}")
    return values[name]


def get_text(values: Values, name: str, location: str) -> str:
    """Returns the row's text in a column."""
    return require_text(get_value(values, name, location), name, location)


def require_text(value: Any, name: str, location: str) -> str:
    """Returns the value after checking that it is text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise DataError(f"{location}: {name} must be text, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can encode half of a surrogate pair, which is not valid text
        raise DataError(
            f"{location}: {name} has the character {value[error.start]!a}, half of a surrogate pair, at {error.start}"
        ) from None
    return value


# Text, and text with a label


@dataclass(frozen=True)
class TextColumns:
    """The source's names for our columns; None if there is no such column."""

    text: str
    text_pair: str | None
    label: str | None


def find_text_columns(
    columns: Sequence[str],
    origin: Origin,
    *,
    is_labeled: bool,
    usual_labels: Sequence[str] = LABELS,
    first: Values | None = None,
) -> TextColumns:
    """Finds the text and label columns by `data.columns`, or else by their usual names.

    Args:
        first: the first row, to propose a column that has texts.

    Raises:
        ConfigError: `data.columns` has a name that is not one of ours.
        DataError: the source lacks a column or has none of the usual names; the message lists its columns.
    """
    configured = configured_columns(columns, origin, ("text", "text_pair", "label"))
    text, pair, label = configured.get("text"), configured.get("text_pair"), configured.get("label")
    if text is None:
        pairs = (names for names in PAIRS if set(names) <= set(columns) and pair in (None, names[1]))
        text, pair = next(pairs, (None, pair))
    text = text or next((name for name in TEXTS if name in columns and name not in (label, pair)), None)
    if text is None:
        labels = [name for name in columns if name.strip().casefold() in usual_labels]
        raise missing_column("text", "text", TEXTS, columns, origin, taken=(label, pair, *labels), first=first)
    if not is_labeled:
        return TextColumns(text, None, None)
    if "label" not in origin.columns:
        label = next((name for name in usual_labels if name in columns and name not in (text, pair)), None)
    if label is None and origin.needs_label:
        raise missing_column("the label", "label", usual_labels, columns, origin, taken=(text, pair))
    return TextColumns(text, pair, label)


def _text_converter(first: Values, origin: Origin) -> RowConverter:
    columns = find_text_columns(list(first), origin, is_labeled=False, first=first)

    def convert(values: Values, location: str) -> dict[str, str]:
        return {"text": get_text(values, columns.text, location)}

    return RowConverter(pa.schema([("text", pa.string())]), convert, columns={"text": columns.text})


def labeled_converter(
    first: Values,
    origin: Origin,
    *,
    label_type: pa.DataType,
    read_label: Callable[[Any, str], Any],
    usual_labels: Sequence[str] = LABELS,
) -> RowConverter:
    """Converts to text, text_pair (if there are pairs) and label. Without needs_label, all rows have labels or none."""
    columns = find_text_columns(list(first), origin, is_labeled=True, usual_labels=usual_labels, first=first)
    label = columns.label
    if label is not None and not origin.needs_label and read_label(first.get(label), origin.name) is None:
        label = None
    is_defined = label in origin.class_names and pa.types.is_string(label_type)
    types = {"text": pa.string(), "text_pair": pa.string(), "label": label_type}
    names = {"text": columns.text, "text_pair": columns.text_pair, "label": label}

    def convert(values: Values, location: str) -> dict[str, Any]:
        row: dict[str, Any] = {"text": get_text(values, columns.text, location)}
        if columns.text_pair is not None:
            row["text_pair"] = get_text(values, columns.text_pair, location)
        if label is not None:
            value = get_value(values, label, location)
            # Names that the source defines are exact.
            row["label"] = value if is_defined and isinstance(value, str) else read_label(value, location)
            if row["label"] is None:
                raise DataError(
                    f"{location}: no label ({label} is {value!r}). Every training or evaluation row needs one"
                )
        return row

    schema = pa.schema([(name, arrow_type) for name, arrow_type in types.items() if names[name] is not None])
    used = {ours: name for ours, name in names.items() if name is not None}
    return RowConverter(schema, convert, origin.class_names.get(columns.label or "label"), used)


def _class_converter(first: Values, origin: Origin) -> RowConverter:
    return labeled_converter(first, origin, label_type=pa.string(), read_label=label_text)


TEXT = RowFormat("text", _text_converter, is_whole_text=True, usual_draw="end")
LABELED = RowFormat("labeled", _class_converter, usual_draw="stratified")

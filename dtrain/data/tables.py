"""From rows of any source to one table of what a task learns from: which columns count, checked, kept as Arrow.

A task says what it wants as a Shape; TEXT and LABELLED are here, others beside this file. Where rows come from is the
business of readers.py, glue.py and hub.py.
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
from dtrain.data.readers import Row, Values
from dtrain.errors import ConfigError, DataError

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
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Origin:
    """Where the rows of one split come from.

    name: file or hub name, for messages. unit: what the number of a row counts. needs_label: False for a split that is
    only predicted. given: `data.columns`. class_names: of the columns for which the source fixes the labels and their
    order.
    """

    name: str
    unit: Unit = "line"
    needs_label: bool = True
    given: Mapping[str, str] = field(default_factory=dict)
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """What one split gives: `convert` makes a row of `schema` of a row of the source and its place ("a.csv, line 3").

    It raises DataError for a row that cannot be used. label_names: the labels in the order of their ids, where the
    source fixes them.
    """

    schema: pa.Schema
    convert: Callable[[Values, str], Mapping[str, Any]]
    label_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Shape:
    """What a task wants of its rows.

    name: tells caches apart; raised with a number when the meaning changes. layout: from a split's first row.
    text_rows: how a plain text file is rows; None: it is none for this task. unnest: the source's rows as rows of
    this task, where one may hold several. is_whole_text: a plain text file is one text, for language models.
    """

    name: str
    layout: Callable[[Values, Origin], Layout]
    text_rows: Callable[[Path], Iterator[Row]] | None = None
    unnest: Callable[[Iterable[Row], Origin], Iterator[Row]] | None = None
    is_whole_text: bool = False


class BadRows:
    """Counts the rows of a split that cannot be used: as many as data.max_bad_rows are passed over, with a warning."""

    def __init__(self, most: int, *, passed_over: int = 0) -> None:
        self.passed_over = passed_over
        self._most = most

    def add(self, error: DataError) -> None:
        """One more.

        Raises:
            DataError: that error, if no more are allowed.
        """
        if self.passed_over == self._most:
            more = f" (data.max_bad_rows={self._most} were passed over before it)" if self._most else ""
            raise DataError(f"{error}{more}") from error
        self.passed_over += 1
        if self.passed_over <= SHOWN_BAD_ROWS:
            log.warning("data: passed over: %s", error)


@dataclass(frozen=True)
class Table:
    """The rows of one split, with `line`, and how many bad ones were passed over."""

    rows: datasets.Dataset
    label_names: tuple[str, ...] | None
    bad: BadRows


def to_table(
    rows: Iterable[Row], shape: Shape, origin: Origin, *, file: Path | None = None, max_bad_rows: int = 0
) -> Table:
    """The rows in that shape; the first row's columns stand for all.

    Written a batch at a time as Arrow, in memory or to `file`, which is then mapped: never a Python list of all rows.

    Raises:
        DataError: there is no row, or more than max_bad_rows cannot be used; the first of those is named.
    """
    layout, bad = None, BadRows(max_bad_rows)

    def converted() -> Iterator[Mapping[str, Any]]:
        nonlocal layout
        for line, values in rows:
            if isinstance(values, DataError):
                bad.add(values)
                continue
            try:
                layout = layout or shape.layout(values, origin)
                yield {**layout.convert(values, f"{origin.name}, {origin.unit} {line}"), "line": line}
            except DataError as error:
                bad.add(error)

    found = converted()
    first = list(islice(found, BATCH_ROWS))
    if not first:
        raise DataError(f"{origin.name} has no rows: a split needs at least one")
    assert layout is not None
    schema = layout.schema.append(pa.field("line", pa.int64()))
    sink = pa.OSFile(str(file), "wb") if file else pa.BufferOutputStream()
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        batch = first
        while batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            batch = list(islice(found, BATCH_ROWS))
    table = (
        datasets.Dataset.from_file(str(file))
        if file
        else datasets.Dataset(InMemoryTable(pa.ipc.open_stream(sink.getvalue()).read_all()))
    )
    return Table(table, layout.label_names, bad)


# What every shape is made of


def given_columns(found: Sequence[str], origin: Origin, ours: Sequence[str]) -> dict[str, str]:
    """`data.columns`, of which each must be a column of ours and be there, but for the label of a split without one.

    Raises:
        ConfigError: `data.columns` names a column of ours that does not exist.
        DataError: the source has no such column.
    """
    if unknown := [name for name in origin.given if name not in ours]:
        raise ConfigError(
            f"data.columns.{unknown[0]} is not a column that is read. Those are {', '.join(ours[:-1])}"
            f"{' and ' if len(ours) > 1 else ''}{ours[-1]}"
        )
    there = {our: theirs for our, theirs in origin.given.items() if theirs in found}
    for our, theirs in origin.given.items():
        if our not in there and (our != "label" or origin.needs_label):
            raise DataError(
                f"{origin.name} has no column {theirs!r}, which data.columns.{our} names. Its columns: "
                f"{', '.join(found)}"
            )
    return there


def missing_column(what: str, ours: str, usual: Sequence[str], found: Sequence[str], origin: Origin) -> DataError:
    """The error for a column that none of the usual names gives."""
    return DataError(
        f"{origin.name} has no column with a usual name for {what} ({', '.join(usual)}). Its columns: "
        f"{', '.join(found)}. Say which it is: data.columns={{{ours}: {found[0 if ours == 'text' else -1] if found else '...'}}}"
    )


def value_of(values: Values, name: str, place: str) -> Any:
    """A row's value in that column."""
    if name not in values:
        raise DataError(f"{place}: the column {name!r} is missing; the row has {', '.join(values) or 'no columns'}")
    return values[name]


def text_of(values: Values, name: str, place: str) -> str:
    """A row's text in that column."""
    return checked_text(value_of(values, name, place), name, place)


def checked_text(value: Any, name: str, place: str) -> str:
    """The value, if it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be text, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no text holds
        raise DataError(
            f"{place}: {name} has the character {value[error.start]!a}, half of a surrogate pair, at {error.start}"
        ) from None
    return value


def label_text(value: Any, place: str) -> str | None:
    """A label's name; None where there is none."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool | int | float):
        return str(value)
    raise DataError(f"{place}: a label is a name or a number, found {value!r}")


# Text, and text with a label


@dataclass(frozen=True)
class Columns:
    """The source's names for our columns; None where there is no such column."""

    text: str
    text_pair: str | None
    label: str | None


def find_columns(
    found: Sequence[str], origin: Origin, *, labelled: bool, usual_labels: Sequence[str] = LABELS
) -> Columns:
    """Which of the columns found are ours: as `data.columns` says, else by the usual names.

    Raises:
        ConfigError: `data.columns` names a column of ours that does not exist.
        DataError: a column is not in the source, or none of the usual names is; the message lists what is there.
    """
    given = given_columns(found, origin, ("text", "text_pair", "label"))
    text, pair, label = given.get("text"), given.get("text_pair"), given.get("label")
    if text is None:
        pairs = (names for names in PAIRS if set(names) <= set(found) and pair in (None, names[1]))
        text, pair = next(pairs, (None, pair))
    text = text or next((name for name in TEXTS if name in found and name not in (label, pair)), None)
    if text is None:
        raise missing_column("text", "text", TEXTS, found, origin)
    if not labelled:
        return Columns(text, None, None)
    if "label" not in origin.given:
        label = next((name for name in usual_labels if name in found and name not in (text, pair)), None)
    if label is None and origin.needs_label:
        raise missing_column("the label", "label", usual_labels, found, origin)
    return Columns(text, pair, label)


def _text_layout(first: Values, origin: Origin) -> Layout:
    columns = find_columns(list(first), origin, labelled=False)

    def convert(values: Values, place: str) -> dict[str, str]:
        return {"text": text_of(values, columns.text, place)}

    return Layout(pa.schema([("text", pa.string())]), convert)


def labelled_layout(
    first: Values,
    origin: Origin,
    *,
    label_type: pa.DataType,
    read_label: Callable[[Any, str], Any],
    usual_labels: Sequence[str] = LABELS,
) -> Layout:
    """text, text_pair where there are pairs, and label. A split that needs none has labels in all rows or in none."""
    columns = find_columns(list(first), origin, labelled=True, usual_labels=usual_labels)
    label = columns.label
    if label is not None and not origin.needs_label and read_label(first.get(label), origin.name) is None:
        label = None
    used = {"text": pa.string(), "text_pair": pa.string(), "label": label_type}
    there = {"text": columns.text, "text_pair": columns.text_pair, "label": label}

    def convert(values: Values, place: str) -> dict[str, Any]:
        row: dict[str, Any] = {"text": text_of(values, columns.text, place)}
        if columns.text_pair is not None:
            row["text_pair"] = text_of(values, columns.text_pair, place)
        if label is not None:
            value = value_of(values, label, place)
            row["label"] = read_label(value, place)
            if row["label"] is None:
                raise DataError(f"{place}: no label ({label} is {value!r}). Every row to learn or to judge needs one")
        return row

    schema = pa.schema([(name, kind) for name, kind in used.items() if there[name] is not None])
    return Layout(schema, convert, origin.class_names.get(columns.label or "label"))


def _classes_layout(first: Values, origin: Origin) -> Layout:
    return labelled_layout(first, origin, label_type=pa.string(), read_label=label_text)


TEXT = Shape("text", _text_layout, is_whole_text=True)
LABELLED = Shape("labelled", _classes_layout)

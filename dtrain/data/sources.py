"""Loads the examples of every kind of source: the columns of each row of each split, with line numbers.

The cuts (limit, validation_fraction) and checks (empty splits, labels) are the same for all kinds of sources, which are in
split_readers.py. Tasks tokenize the rows, and cache.py stores the result.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from dtrain.config.schema import Data
from dtrain.data import hub
from dtrain.data.columns import column_values, value_counts
from dtrain.data.draws import Indices, Method, draw
from dtrain.data.label_names import check_classes
from dtrain.data.readers import Row
from dtrain.data.resolve_source import file_hashes, source_kind
from dtrain.data.split_readers import SplitReader, hub_name, open_splits, python_docs
from dtrain.data.tables import BadRows, RowFormat, Table, Unit, to_table
from dtrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """One split of the data, before tokenization.

    Attributes:
        split: train, validation, test, validation_mismatched, ...
        rows: the columns of the task's RowFormat (text, label, ...) and `line` (1-based, counts `unit`).
        origin: file or hub name, for messages.
        label_names: the labels in the order of their ids if the source defines them; None: the sorted training labels.
        bad: counts the bad rows that data.max_bad_rows allows; encoding the rows continues the count.
        unit: unit that `line` counts: lines of a file, or rows if there are no lines.
        needs_label: False for a split that is only predicted, whose rows need no targets.
        unused: a line about splits of the source that are not used; None if there are none.
        columns: our column -> the source's, where they are columns of a table.
        read: number of usable rows in the source, before `validation_fraction` and `limit`.
    """

    split: str
    rows: datasets.Dataset
    origin: str
    label_names: tuple[str, ...] | None
    bad: BadRows
    unit: Unit = "line"
    needs_label: bool = True
    unused: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    read: int = 0

    @property
    def skipped(self) -> int:
        """Number of bad rows skipped so far."""
        return self.bad.skipped


def source_key(data: Data) -> dict[str, Any]:
    """Returns what identifies the rows that `load_sources` would load (in any format), without loading them.

    Files are identified by name and hash, data sets on the hub by commit. Paths are left out: nodes may mount differently.

    Raises:
        DataError: there is no such source.
    """
    settings = data.model_dump(
        mode="json",
        include={
            "columns",
            "delimiter",
            "header",
            "encoding",
            "splits",
            "limit",
            "validation_fraction",
            "split",
            "split_seed",
            "max_bad_rows",
        },
    )
    match source_kind(data):
        case "python_docs":
            identity: Any = hashlib.sha256(python_docs().encode()).hexdigest()
        case "hub":
            name, config = hub_name(data)
            identity = {"name": name, "config": config, "revision": hub.revision(name, config)}
        case kind:
            identity = file_hashes(data, kind)
    return {"name": data.name, "identity": identity, **settings}


def source_notes(sources: Mapping[str, Source]) -> list[str]:
    """Returns what users should know about the splits and their classes, one line each.

    Raises:
        DataError: the training labels cannot be classes.
    """
    unused = list(dict.fromkeys(source.unused for source in sources.values() if source.unused))
    train = sources.get("train")
    if train is None or not _has_classes(train.rows):
        return unused
    odd = check_classes(value_counts(train.rows, "label"), train.origin) if train.label_names is None else []
    return [*unused, *odd, *_missing_classes(sources)]


def _missing_classes(sources: Mapping[str, Source]) -> list[str]:
    """Returns a line for each split that lacks classes of the training split, or has classes that it lacks."""
    rows = {split: source.rows for split, source in sources.items() if _has_classes(source.rows)}
    known = value_counts(rows["train"], "label")
    lines = []
    for split in [name for name in rows if name != "train"]:
        counts = value_counts(rows[split], "label")
        for name, other, lacking in ((split, "train", known - counts), ("train", split, counts - known)):
            lost = {
                label: count for label, count in lacking.items() if label not in (counts if name == split else known)
            }
            if lost:
                shown = ", ".join(f"{label} ({count} rows)" for label, count in list(lost.items())[:10])
                more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
                lines.append(f"the split {name} has no row of {len(lost)} class(es) that {other} has: {shown}{more}")
    return lines


def _has_classes(rows: datasets.Dataset) -> bool:
    return "label" in rows.column_names and rows.features["label"] == datasets.Value("string")


def load_sources(data: Data, row_format: RowFormat, *, scratch: Path | None = None) -> dict[str, Source]:
    """Loads all splits that the config names, train first. Test splits are included only if `data.splits` has them.

    A plain text file is one row with the complete text: `data.validation_fraction` cuts off the last part of its
    characters, and `data.limit` keeps the first n lines of each split. In tables, both count rows, which `data.split`
    draws. The limit applies after the cut.

    Args:
        row_format: the rows that the task needs.
        scratch: existing folder for temporary files with the rows; None: rows are kept in memory.

    Raises:
        DataError: a file, split or column is missing, a row cannot be read, or a split has no rows.
        ConfigError: settings do not go together.
    """
    readers = open_splits(data, row_format)
    if data.validation_fraction is not None and list(readers) != ["train"]:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction} splits a single split in two, but the source has "
            f"{', '.join(readers)}. Set data.validation_fraction=null, or name only train in data.splits"
        )
    sources = {}
    for split, reader in readers.items():
        for name, table in _tables(split, reader, data, row_format, scratch).items():
            # Two splits that were cut from one table continue the count separately.
            bad = BadRows(data.max_bad_rows, skipped=table.bad.skipped)
            sources[name] = Source(
                split=name,
                rows=table.rows,
                origin=reader.origin.name,
                label_names=table.label_names,
                bad=bad,
                unit=reader.origin.unit,
                needs_label=reader.origin.needs_label,
                unused=reader.unused,
                columns=table.columns,
                read=table.read,
            )
    if data.validation_fraction is not None and (lost := _unlearned(sources)):
        raise DataError(
            f"{sources['train'].origin}: data.validation_fraction={data.validation_fraction} puts all rows of the label(s) "
            f"{', '.join(lost[:10])} into the validation split, so they cannot be learned. Rows in random order or sorted by "
            "label: data.split=stratified takes some of each"
        )
    return sources


def _unlearned(sources: Mapping[str, Source]) -> list[str]:
    """Returns the labels of the validation rows that no training row has, unless the source defines the labels."""
    train, validation = sources["train"], sources["validation"]
    if train.label_names is not None or not (_has_classes(train.rows) and _has_classes(validation.rows)):
        return []
    known = set(train.rows.unique("label"))
    return [label for label in validation.rows.unique("label") if label not in known]


def label_names(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Returns the labels in the order of their ids: those that the source defines, else the sorted training labels.

    Raises:
        DataError: a row has another label, or there is no train split to take the labels from.
    """
    names = fixed_label_names(sources)
    if names is None and "train" in sources:
        names = tuple(sorted(distinct_labels(sources["train"].rows), key=label_order))
    if names is None:
        raise DataError("there is no train split to take the labels from: name one in data.splits")
    check_labels(sources, names)
    return names


def fixed_label_names(sources: Mapping[str, Source]) -> tuple[str, ...] | None:
    """Returns the labels that the source defines; None if it defines none.

    Raises:
        DataError: its splits define different labels.
    """
    fixed = {source.label_names: source.origin for source in sources.values() if source.label_names is not None}
    if len(fixed) > 1:
        listed = "; ".join(f"{origin}: {', '.join(names)}" for names, origin in fixed.items())
        raise DataError(f"the splits do not have the same labels in the same order: {listed}")
    return next(iter(fixed), None)


def distinct_labels(rows: datasets.Dataset) -> set[str]:
    """Returns the labels that occur in the column `label`, which holds one label for each row, or a list of labels."""
    if _has_classes(rows):
        return set(rows.unique("label"))
    return {label for labels in column_values(rows, "label") for label in labels}


def check_labels(sources: Mapping[str, Source], names: Iterable[str]) -> None:
    """Checks that every label of every split is one of `names`.

    Raises:
        DataError: with file, line and label of the first row that has another label, and the known labels.
    """
    known = tuple(names)
    for source in sources.values():
        if "label" not in source.rows.column_names or distinct_labels(source.rows) <= set(known):
            continue
        cells = zip(column_values(source.rows, "line"), column_values(source.rows, "label"), strict=True)
        labels = ((line, label) for line, cell in cells for label in ([cell] if isinstance(cell, str) else cell))
        line, label = next((line, label) for line, label in labels if label not in known)
        raise DataError(
            f"{source.origin}, {source.unit} {line}: {label!r} is not one of the known labels: {', '.join(known[:50])}"
            f"{', ...' if len(known) > 50 else ''}. They come from the training rows, the data set or the model: correct "
            "the row, or add a training row with this label"
        )


def label_order(name: str) -> tuple[bool, float, str]:
    """Returns the sort key of a label: numbers by value, then names."""
    is_number = re.fullmatch(r"-?\d+(\.\d+)?", name) is not None
    return (not is_number, float(name) if is_number else 0.0, name)


def _tables(
    split: str, reader: SplitReader, data: Data, row_format: RowFormat, scratch: Path | None
) -> dict[str, Table]:
    """Returns the split's rows as a table; or two tables by split with `data.validation_fraction`."""

    def table(rows: Iterable[Row], name: str) -> Table:
        file = scratch / f"{name}.arrow" if scratch else None
        return to_table(rows, row_format, reader.origin, file=file, max_bad_rows=data.max_bad_rows)

    fraction, limit = data.validation_fraction, data.limit
    method = _method(data, row_format, reader)
    if reader.is_text:
        ((_, values),) = reader.rows
        assert not isinstance(values, DataError)
        text = str(values["text"])
        texts = _cut_text(text, fraction) if fraction is not None else {split: (1, text)}
        for name, (_, text) in texts.items():
            if not text.strip():
                raise DataError(f"{reader.origin.name}: the split {name} is empty: it has no text")
        return {
            name: table([(line, {"text": _first_lines(text, limit)})], name) for name, (line, text) in texts.items()
        }
    if fraction is None:
        if method == "end" or limit is None:
            return {split: table(islice(reader.rows, limit), split)}
        full = table(reader.rows, split)
        return {split: replace(full, rows=_limited(full.rows, data, method))}
    full = table(reader.rows, "all")
    number = len(full.rows)
    cut = min(int(number * (1 - fraction)), number - 1)
    if cut < 1:
        raise DataError(
            f"{reader.origin.name} has {number} rows, of which data.validation_fraction={fraction} leaves none to train on"
        )
    if method == "end":
        parts = {"train": full.rows.select(range(cut)), "validation": full.rows.select(range(cut, number))}
    else:
        drawn = _drawn(full.rows, number - cut, data, method, keeps_each=True)
        if not len(drawn):
            check_classes(value_counts(full.rows, "label"), reader.origin.name)  # a quantity is the likelier fault
            raise DataError(
                f"{reader.origin.name} has {number} rows, each with another label: data.validation_fraction={fraction} "
                "leaves none to evaluate. Name the right column in data.columns.label"
            )
        rest = np.setdiff1d(np.arange(number), drawn)
        parts = {"train": full.rows.select(rest), "validation": full.rows.select(drawn)}
    return {name: replace(full, rows=_limited(rows, data, method)) for name, rows in parts.items()}


def _method(data: Data, row_format: RowFormat, reader: SplitReader) -> Method:
    """Returns how rows are drawn: `data.split`, or the usual method of these rows.

    Raises:
        ConfigError: the rows cannot be drawn like this.
    """
    if data.split not in (None, "end") and reader.is_text:
        raise ConfigError(
            f"data.split={data.split}: {reader.origin.name} is one text, whose last part is the validation split. Remove "
            "data.split, or set it to end"
        )
    if data.split == "stratified" and row_format.usual_draw != "stratified":
        raise ConfigError(
            "data.split=stratified needs rows with one class each, as in classification: set data.split=mixed"
        )
    return data.split or row_format.usual_draw


def _limited(rows: datasets.Dataset, data: Data, method: Method) -> datasets.Dataset:
    """Returns the rows that `data.limit` keeps."""
    if data.limit is None or data.limit >= len(rows):
        return rows
    return rows.select(range(data.limit) if method == "end" else _drawn(rows, data.limit, data, method))


def _drawn(rows: datasets.Dataset, count: int, data: Data, method: Method, *, keeps_each: bool = False) -> Indices:
    has_classes = method == "stratified" and "label" in rows.column_names  # a test split may have no labels
    classes = rows["label"][:] if has_classes else None
    return draw(rows["line"][:], count, seed=data.split_seed, classes=classes, keeps_each=keeps_each)


def _cut_text(text: str, fraction: float) -> dict[str, tuple[int, str]]:
    """Returns both parts, each with the number of its first line."""
    cut = int(len(text) * (1 - fraction))
    train, validation = text[:cut], text[cut:]
    return {"train": (1, train), "validation": (train.count("\n") + 1, validation)}


def _first_lines(text: str, limit: int | None) -> str:
    return text if limit is None else "".join(islice(re.findall(r"[^\n]*\n|[^\n]+", text), limit))

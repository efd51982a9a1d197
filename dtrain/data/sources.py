"""The examples as they come: text, second text and label of every row of each split, with the line it stood on.

What is cut (limit, validation_fraction) and checked (empty splits, labels) is the same for every kind of source; the
kinds are in parts.py. Tokenising is the task's business, keeping the tokenised rows prepared.py's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from dtrain.config.schema import Data
from dtrain.data import hub
from dtrain.data.readers import Row
from dtrain.data.resolve_source import file_hashes, form_of
from dtrain.data.split_readers import Part, hub_name, python_docs, read_parts
from dtrain.data.tables import BadRows, Shape, Table, Unit, to_table
from dtrain.errors import ConfigError, DataError

Json = Any
"""What json.dumps takes."""


@dataclass(frozen=True)
class Source:
    """One split of the data, before tokenising.

    split: train, validation, test, validation_mismatched, ...
    rows: the columns of the task's Shape (text, label, ...) and line (1-based; what `unit` says).
    origin: file or hub name, for messages.
    label_names: the labels in the order of their ids, where the source fixes them; None: the training labels, sorted.
    bad: the count of bad rows passed over, as data.max_bad_rows allows; it goes on while the rows are encoded.
    unit: what `line` counts: lines of a file, or rows where there are no lines.
    """

    split: str
    rows: datasets.Dataset
    origin: str
    label_names: tuple[str, ...] | None
    bad: BadRows
    unit: Unit = "line"

    @property
    def skipped(self) -> int:
        """Bad rows passed over so far."""
        return self.bad.passed_over


def source_key(data: Data) -> dict[str, Json]:
    """What identifies the rows that `load_sources` would give (of any shape), without reading them into memory.

    Files count by name and hash, data sets on the hub by commit; no path is in it, since nodes may mount differently.

    Raises:
        DataError: there is no such source.
    """
    shape = data.model_dump(
        mode="json",
        include={"columns", "delimiter", "header", "splits", "limit", "validation_fraction", "max_bad_rows"},
    )
    match form_of(data):
        case "python_docs":
            identity: Json = hashlib.sha256(python_docs().encode()).hexdigest()
        case "hub":
            name, config = hub_name(data)
            identity = {"name": name, "config": config, "revision": hub.revision(name, config)}
        case form:
            identity = file_hashes(data, form)
    return {"name": data.name, "identity": identity, **shape}


def load_sources(data: Data, shape: Shape, *, scratch: Path | None = None) -> dict[str, Source]:
    """All splits that the config names, train first; a test split only where `data.splits` asks for it.

    A plain text file is one row with the whole text: `data.validation_fraction` cuts the last part of its characters
    and `data.limit` keeps the first n lines of each split. In tables both count rows. The cut comes before the limit.

    Args:
        shape: what the task wants of a row.
        scratch: existing folder for the rows while they are used; None: they stay in memory.

    Raises:
        DataError: a missing file, split or column, a row that cannot be read, a split without rows.
        ConfigError: settings that do not go together.
    """
    parts = read_parts(data, shape)
    if data.validation_fraction is not None and list(parts) != ["train"]:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction} cuts the validation split off the only split, but "
            f"the source "
            f"has {', '.join(parts)}. Say data.validation_fraction=null, or name only train in data.splits"
        )
    sources = {}
    for split, part in parts.items():
        for name, table in _tables(split, part, data, shape, scratch).items():
            # A count for each split: two that were cut from one table go on apart.
            bad = BadRows(data.max_bad_rows, passed_over=table.bad.passed_over)
            sources[name] = Source(name, table.rows, part.origin.name, table.label_names, bad, part.origin.unit)
    return sources


def label_names(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """The labels in the order of their ids: fixed by the source, else those of the training rows, sorted.

    Raises:
        DataError: a label outside that set; or no train split to take them from.
    """
    names = fixed_label_names(sources)
    if names is None and "train" in sources:
        names = tuple(sorted(sources["train"].rows.unique("label"), key=label_order))
    if names is None:
        raise DataError("there is no train split to take the labels from: name one in data.splits")
    check_labels(sources, names)
    return names


def fixed_label_names(sources: Mapping[str, Source]) -> tuple[str, ...] | None:
    """The labels that the source fixes; None where it does not.

    Raises:
        DataError: its splits do not have the same.
    """
    fixed = {source.label_names: source.origin for source in sources.values() if source.label_names is not None}
    if len(fixed) > 1:
        listed = "; ".join(f"{origin}: {', '.join(names)}" for names, origin in fixed.items())
        raise DataError(f"the splits do not have the same labels in the same order: {listed}")
    return next(iter(fixed), None)


def check_labels(sources: Mapping[str, Source], names: Iterable[str]) -> None:
    """Every label of every split is one of `names`.

    Raises:
        DataError: file, line and label of the first that is not, and the set.
    """
    known = tuple(names)
    for source in sources.values():
        if "label" not in source.rows.column_names or set(source.rows.unique("label")) <= set(known):
            continue
        labels = zip(source.rows["line"], source.rows["label"], strict=True)
        line, label = next((line, label) for line, label in labels if label not in known)
        raise DataError(
            f"{source.origin}, {source.unit} {line}: {label!r} is not one of the known labels: {', '.join(known[:50])}"
            f"{', ...' if len(known) > 50 else ''}. They come from the training rows, the data set or the model: "
            f"correct the "
            "row, or add a training row with this label"
        )


def label_order(name: str) -> tuple[bool, float, str]:
    """Sorts labels: numbers by their value, then names."""
    is_number = re.fullmatch(r"-?\d+(\.\d+)?", name) is not None
    return (not is_number, float(name) if is_number else 0.0, name)


def _tables(split: str, part: Part, data: Data, shape: Shape, scratch: Path | None) -> dict[str, Table]:
    """The part as tables by split: one, or with `data.validation_fraction` two."""

    def table(rows: Iterable[Row], name: str) -> Table:
        file = scratch / f"{name}.arrow" if scratch else None
        return to_table(rows, shape, part.origin, file=file, max_bad_rows=data.max_bad_rows)

    fraction, limit = data.validation_fraction, data.limit
    if part.is_text:
        ((_, values),) = part.rows
        assert not isinstance(values, DataError)
        pieces = _cut_text(str(values["text"]), fraction) if fraction is not None else {split: (1, str(values["text"]))}
        for name, (_, text) in pieces.items():
            if not text.strip():
                raise DataError(f"{part.origin.name}: the split {name} is empty: there is no text in it")
        return {
            name: table([(line, {"text": _first_lines(text, limit)})], name) for name, (line, text) in pieces.items()
        }
    if fraction is None:
        return {split: table(islice(part.rows, limit), split)}
    whole = table(part.rows, "all")
    number = len(whole.rows)
    cut = min(int(number * (1 - fraction)), number - 1)
    if cut < 1:
        raise DataError(
            f"{part.origin.name} has {number} rows, of which data.validation_fraction={fraction} leaves none to train on"
        )
    ranges = {"train": range(cut), "validation": range(cut, number)}
    return {
        name: replace(whole, rows=whole.rows.select(places[: limit or len(places)])) for name, places in ranges.items()
    }


def _cut_text(whole: str, fraction: float) -> dict[str, tuple[int, str]]:
    """Both pieces, each with the line it begins on."""
    cut = int(len(whole) * (1 - fraction))
    train, validation = whole[:cut], whole[cut:]
    return {"train": (1, train), "validation": (train.count("\n") + 1, validation)}


def _first_lines(text: str, limit: int | None) -> str:
    return text if limit is None else "".join(islice(re.findall(r"[^\n]*\n|[^\n]+", text), limit))

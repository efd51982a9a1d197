"""The splits of each kind of source, ready to be read: where its rows come from and what is known of them before.

One function per kind: GLUE files, files by suffix, folders of save_to_disk, the hub, Python's own documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from dtrain.data import glue, hub
from dtrain.data.locate import PYTHON_DOCS, form_of, pick_splits, place_of, split_files
from dtrain.data.readers import TEXT_SUFFIXES, Row, read_rows, whole_text
from dtrain.data.rows import Example, Kind, Unit, find_columns, to_examples
from dtrain.errors import ConfigError, DataError
from dtrain.schema import Data


@dataclass(frozen=True)
class Part:
    """One split of the source, not yet read.

    is_text: its only example is a whole text, which is cut as text and not as rows.
    """

    origin: str
    examples: Iterable[Example]
    unit: Unit = "line"
    label_names: tuple[str, ...] | None = None
    is_text: bool = False


def read_parts(data: Data, kind: Kind) -> dict[str, Part]:
    match form_of(data):
        case "python_docs":
            _refuse_labels(kind, f"data.name={PYTHON_DOCS}")
            return {"train": Part(PYTHON_DOCS, [Example(1, python_docs(), None, None)], is_text=True)}
        case "glue":
            return _glue_parts(data, kind)
        case "files":
            return {split: _file_part(split, file, data, kind) for split, file in split_files(data, "files").items()}
        case "saved":
            return _dataset_parts(_load_saved(data), str(data.path), data, kind)
        case "hub":
            name, config = hub_name(data)
            return _dataset_parts(
                hub.load(name, config, data.splits), name + (f"/{config}" if config else ""), data, kind
            )


def _glue_parts(data: Data, kind: Kind) -> dict[str, Part]:
    task = glue.find_task(str(data.name))
    names = tuple(task.labels.values()) if kind == "labelled" else None
    parts = {}
    for split, file in split_files(data, "glue").items():
        rows = glue.GlueRows(file, task, kind=kind, is_test=_is_test(split))
        parts[split] = Part(str(file), rows, label_names=names)
    return parts


def _file_part(split: str, file: Path, data: Data, kind: Kind) -> Part:
    if file.suffix.lower() in TEXT_SUFFIXES:
        _refuse_labels(kind, str(file))
        return Part(str(file), (Example(1, whole_text(path), None, None) for path in [file]), is_text=True)
    unit: Unit = "row" if file.suffix.lower() in (".json", ".parquet") else "line"
    rows = read_rows(file, delimiter=data.delimiter, header=data.header)
    needs_label = kind == "labelled" and not _is_test(split)
    examples = to_examples(rows, data.columns, kind=kind, origin=str(file), unit=unit, needs_label=needs_label)
    return Part(str(file), examples, unit)


def _dataset_parts(found: Mapping[str, datasets.Dataset], origin: str, data: Data, kind: Kind) -> dict[str, Part]:
    """Splits that the datasets library loaded; integer labels get the names the data set has for them.

    Args:
        found: by our names where `data.splits` says which are ours, else by the source's.
    """
    parts = {}
    for split, theirs in pick_splits(list(found), data, origin=origin).items():
        rows = found[split if data.splits else theirs]
        place = f"{origin} ({theirs})"
        needs_label = kind == "labelled" and not _is_test(split)
        columns = find_columns(rows.column_names, data.columns, kind=kind, origin=place, needs_label=needs_label)
        feature = None if columns.label is None else rows.features[columns.label]
        names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        examples = to_examples(
            _dataset_rows(rows),
            data.columns,
            kind=kind,
            origin=place,
            unit="row",
            needs_label=needs_label,
            label_of=None if names is None else _namer(names),
        )
        parts[split] = Part(place, examples, "row", label_names=names)
    return parts


def _namer(names: Sequence[str]) -> Callable[[int | None], str | None]:
    """Class number -> its name; -1 is the datasets library's mark for a row without a label."""

    def name(number: int | None) -> str | None:
        if number is None or number == -1:
            return None
        return names[number] if 0 <= number < len(names) else str(number)

    return name


def _dataset_rows(rows: datasets.Dataset) -> Iterator[Row]:
    number = 0
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for values in batch.to_pylist():
            number += 1
            yield number, values


def _load_saved(data: Data) -> dict[str, datasets.Dataset]:
    place = place_of(data)
    try:
        found = datasets.load_from_disk(str(place))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"data.path={data.path} was written by save_to_disk but cannot be loaded: {error}. Save it again"
        ) from None
    splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    if missing := [theirs for theirs in data.splits.values() if theirs not in splits]:
        raise DataError(
            f"data.path={data.path} has no split {missing[0]!r}, which data.splits names. Its splits: "
            f"{', '.join(splits)}"
        )
    return {ours: splits[theirs] for ours, theirs in data.splits.items()} or splits


def hub_name(data: Data) -> tuple[str, str | None]:
    name = str(data.name)
    if name in glue.NAMES:
        glue.find_task(name)
        return glue.HUB_NAME, name
    return name, data.config


def python_docs() -> str:
    """The language reference that every Python carries: 0.5 MB of English text, in the order of its topics' names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _refuse_labels(kind: Kind, origin: str) -> None:
    if kind == "labelled":
        raise ConfigError(
            f"{origin} is plain text without labels: task.name=causal_lm learns from it, classification needs a table"
        )


def _is_test(split: str) -> bool:
    return split.startswith("test")

"""Opens the splits of each kind of source: where their rows come from, and what is known before reading them.

There is one function per kind: GLUE files, files by suffix, folders of save_to_disk, the hub, Python's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from dtrain.config.schema import Data
from dtrain.data import glue, hub
from dtrain.data.encodings import read_text
from dtrain.data.images import class_folder_rows
from dtrain.data.readers import TEXT_SUFFIXES, Row, read_rows, read_schema, row_unit
from dtrain.data.resolve_source import (
    PYTHON_DOCS,
    SWAG,
    choose_splits,
    class_folders,
    source_kind,
    source_path,
    split_files,
    unused_files,
    unused_splits,
)
from dtrain.data.tables import Origin, RowFormat
from dtrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class SplitReader:
    """One split of the source, ready to be read.

    Attributes:
        origin: where the rows come from.
        rows: the rows.
        is_text: the only row is a complete text, which is cut by characters instead of rows.
        unused: a line about splits of the source that are not used; None if there are none.
    """

    origin: Origin
    rows: Iterable[Row]
    is_text: bool = False
    unused: str | None = None


def open_splits(data: Data, row_format: RowFormat) -> dict[str, SplitReader]:
    """Returns a reader for each split, train first."""
    readers = _open_splits(data, row_format)
    if row_format.unnest is None:
        return readers
    return {
        split: replace(reader, rows=row_format.unnest(reader.rows, reader.origin)) for split, reader in readers.items()
    }


def _open_splits(data: Data, row_format: RowFormat) -> dict[str, SplitReader]:
    match source_kind(data):
        case "python_docs":
            _refuse_plain_text(row_format, f"data.name={PYTHON_DOCS}")
            return {"train": SplitReader(Origin(PYTHON_DOCS), [(1, {"text": python_docs()})], is_text=True)}
        case "glue":
            return _glue_splits(data)
        case "files":
            files = split_files(data, "files")
            readers = {split: _file_split(split, file, data, row_format) for split, file in files.items()}
            unused = unused_files(data, files)
            return {split: replace(reader, unused=unused) for split, reader in readers.items()}
        case "class_folders":
            return {
                split: SplitReader(
                    Origin(str(folder), "row", needs_label=not _is_test(split)), class_folder_rows(folder)
                )
                for split, folder in class_folders(data).items()
            }
        case "saved":
            return _dataset_splits(_load_saved(data), str(data.path), data)
        case "hub":
            name, config = hub_name(data)
            return _dataset_splits(hub.load(name, config, data.splits), name + (f"/{config}" if config else ""), data)


def _glue_splits(data: Data) -> dict[str, SplitReader]:
    task = glue.find_task(str(data.name))
    names = {"label": tuple(task.labels.values())} if task.labels else {}
    readers = {}
    for split, file in split_files(data, "glue").items():
        is_test = _is_test(split)
        origin = Origin(str(file), needs_label=not is_test, class_names=names)
        readers[split] = SplitReader(origin, glue.GlueRows(file, task, is_test=is_test))
    return readers


def _file_split(split: str, file: Path, data: Data, row_format: RowFormat) -> SplitReader:
    needs_label = not _is_test(split)
    if file.suffix.lower() in TEXT_SUFFIXES:
        if row_format.text_rows is not None:
            return SplitReader(Origin(str(file), needs_label=needs_label), row_format.text_rows(file, data.encoding))
        _refuse_plain_text(row_format, str(file))
        return SplitReader(
            Origin(str(file)), ((1, {"text": read_text(path, data.encoding)}) for path in [file]), is_text=True
        )
    origin = Origin(
        str(file),
        row_unit(file),
        needs_label=needs_label,
        columns=data.columns,
        class_names=_stored_classes(file),
    )
    key = data.splits[split] if data.splits and source_path(data).is_file() else None
    rows = read_rows(file, delimiter=data.delimiter, header=data.header, key=key, encoding=data.encoding)
    return SplitReader(origin, _with_class_names(rows, origin.class_names))


def _stored_classes(file: Path) -> dict[str, tuple[str, ...]]:
    """Returns the class names that the datasets library stored in a Parquet or Arrow file; empty for other files."""
    schema = read_schema(file)
    if schema is None or b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return _class_names(datasets.Features.from_arrow_schema(schema))
    except (ValueError, KeyError, TypeError):
        return {}  # written by a version of the library with another format


def _dataset_splits(loaded: Mapping[str, datasets.Dataset], name: str, data: Data) -> dict[str, SplitReader]:
    """Returns readers for splits of the datasets library. Class numbers become the data set's names for them.

    Args:
        loaded: by our names if `data.splits` is set, else by the source's names.
    """
    readers = {}
    chosen = choose_splits(list(loaded), data, origin=name)
    unused = None if data.splits or data.name in glue.NAMES else unused_splits(list(loaded), chosen)
    for split, source_split in chosen.items():
        rows = loaded[split if data.splits else source_split]
        origin = Origin(
            f"{name} ({source_split})",
            "row",
            needs_label=not _is_test(split),
            columns=data.columns,
            class_names=_class_names(rows.features),
        )
        if data.name in glue.NAMES and not origin.needs_label:
            rows = rows.remove_columns([name for name in rows.column_names if name == "label"])  # always -1 there
        readers[split] = SplitReader(origin, _with_class_names(_dataset_rows(rows), origin.class_names), unused=unused)
    return readers


def _classes_of(feature: Any) -> datasets.ClassLabel | None:
    """Returns the classes of a column of class numbers or of lists of class numbers; None for other columns."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return inner if isinstance(inner, datasets.ClassLabel) else None


def _class_names(features: datasets.Features) -> dict[str, tuple[str, ...]]:
    return {
        column: tuple(classes.names)
        for column, feature in features.items()
        if (classes := _classes_of(feature)) is not None
    }


def _dataset_rows(rows: datasets.Dataset) -> Iterator[Row]:
    number = 0
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for values in batch.to_pylist():
            number += 1
            yield number, values


def _with_class_names(rows: Iterable[Row], class_names: Mapping[str, tuple[str, ...]]) -> Iterator[Row]:
    """Yields the rows with class names instead of class numbers."""
    namers = {column: _namer(names) for column, names in class_names.items()}
    for number, values in rows:
        if isinstance(values, DataError) or not namers:
            yield number, values
        else:
            yield number, {key: namers[key](value) if key in namers else value for key, value in values.items()}


def _namer(names: tuple[str, ...]) -> Callable[[Any], Any]:
    """Returns a function from class number to class name. The datasets library uses -1 for rows without a label."""

    def name(number: Any) -> Any:
        if isinstance(number, list):
            return [name(one) for one in number]
        if number is None or number == -1:
            return None
        return names[number] if 0 <= number < len(names) else str(number)

    return name


def _load_saved(data: Data) -> dict[str, datasets.Dataset]:
    try:
        loaded = datasets.load_from_disk(str(source_path(data)))
        for rows in [loaded] if isinstance(loaded, datasets.Dataset) else loaded.values():
            rows.data.validate(full=True)  # the offsets in a damaged file could point outside its memory
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"data.path={data.path} was written by save_to_disk but cannot be loaded: {error}. Save it again"
        ) from None
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if missing := [source_split for source_split in data.splits.values() if source_split not in splits]:
        raise DataError(
            f"data.path={data.path} has no split {missing[0]!r}, which data.splits names. Its splits: "
            f"{', '.join(splits)}"
        )
    return {ours: splits[source_split] for ours, source_split in data.splits.items()} or splits


def hub_name(data: Data) -> tuple[str, str | None]:
    """Returns name and configuration of the data set on the hub."""
    name = str(data.name)
    if name == SWAG:
        return "allenai/swag", data.config or "regular"
    return (glue.HUB_NAME, name) if name in glue.NAMES else (name, data.config)


def python_docs() -> str:
    """Returns Python's own language reference: 0.5 MB of English text, sorted by topic name."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _refuse_plain_text(row_format: RowFormat, origin: str) -> None:
    if not row_format.is_whole_text:
        raise ConfigError(
            f"{origin} is plain text without labels: only task.name=causal_lm can train on it, this task needs a table"
        )


def _is_test(split: str) -> bool:
    return split.startswith("test")

"""The splits of each kind of source, ready to be read: where its rows come from and what is known of them before.

One function per kind: GLUE files, files by suffix, folders of save_to_disk, the hub, Python's own documentation.
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
from dtrain.data.images import class_folder_rows
from dtrain.data.readers import TEXT_SUFFIXES, Row, read_rows, stored_schema, unit_of, whole_text
from dtrain.data.resolve_source import PYTHON_DOCS, SWAG, class_folders, form_of, pick_splits, place_of, split_files
from dtrain.data.tables import Origin, Shape
from dtrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class Part:
    """One split of the source, not yet read.

    is_text: its only row is a whole text, which is cut as text and not as rows.
    """

    origin: Origin
    rows: Iterable[Row]
    is_text: bool = False


def read_parts(data: Data, shape: Shape) -> dict[str, Part]:
    """What each split is read from, train first."""
    parts = _parts(data, shape)
    if shape.unnest is None:
        return parts
    return {split: replace(part, rows=shape.unnest(part.rows, part.origin)) for split, part in parts.items()}


def _parts(data: Data, shape: Shape) -> dict[str, Part]:
    match form_of(data):
        case "python_docs":
            _refuse_plain_text(shape, f"data.name={PYTHON_DOCS}")
            return {"train": Part(Origin(PYTHON_DOCS), [(1, {"text": python_docs()})], is_text=True)}
        case "glue":
            return _glue_parts(data)
        case "files":
            return {split: _file_part(split, file, data, shape) for split, file in split_files(data, "files").items()}
        case "class_folders":
            return {
                split: Part(Origin(str(folder), "row", needs_label=not _is_test(split)), class_folder_rows(folder))
                for split, folder in class_folders(data).items()
            }
        case "saved":
            return _dataset_parts(_load_saved(data), str(data.path), data)
        case "hub":
            name, config = hub_name(data)
            return _dataset_parts(hub.load(name, config, data.splits), name + (f"/{config}" if config else ""), data)


def _glue_parts(data: Data) -> dict[str, Part]:
    task = glue.find_task(str(data.name))
    names = {"label": tuple(task.labels.values())} if task.labels else {}
    parts = {}
    for split, file in split_files(data, "glue").items():
        is_test = _is_test(split)
        origin = Origin(str(file), needs_label=not is_test, class_names=names)
        parts[split] = Part(origin, glue.GlueRows(file, task, is_test=is_test))
    return parts


def _file_part(split: str, file: Path, data: Data, shape: Shape) -> Part:
    needs_label = not _is_test(split)
    if file.suffix.lower() in TEXT_SUFFIXES:
        if shape.text_rows is not None:
            return Part(Origin(str(file), needs_label=needs_label), shape.text_rows(file))
        _refuse_plain_text(shape, str(file))
        return Part(Origin(str(file)), ((1, {"text": whole_text(path)}) for path in [file]), is_text=True)
    origin = Origin(
        str(file),
        unit_of(file),
        needs_label=needs_label,
        given=data.columns,
        class_names=_stored_classes(file),
    )
    key = data.splits[split] if data.splits and place_of(data).is_file() else None
    rows = read_rows(file, delimiter=data.delimiter, header=data.header, key=key)
    return Part(origin, _with_class_names(rows, origin.class_names))


def _stored_classes(file: Path) -> dict[str, tuple[str, ...]]:
    """The names of class numbers that the datasets library put into a Parquet or Arrow file; nothing in others."""
    schema = stored_schema(file)
    if schema is None or b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return _class_names(datasets.Features.from_arrow_schema(schema))
    except (ValueError, KeyError, TypeError):
        return {}  # of a version of the library that says it in another way


def _dataset_parts(found: Mapping[str, datasets.Dataset], name: str, data: Data) -> dict[str, Part]:
    """Splits that the datasets library loaded; integer labels get the names the data set has for them.

    Args:
        found: by our names where `data.splits` says which are ours, else by the source's.
    """
    parts = {}
    for split, theirs in pick_splits(list(found), data, origin=name).items():
        rows = found[split if data.splits else theirs]
        origin = Origin(
            f"{name} ({theirs})",
            "row",
            needs_label=not _is_test(split),
            given=data.columns,
            class_names=_class_names(rows.features),
        )
        if data.name in glue.NAMES and not origin.needs_label:
            rows = rows.remove_columns([name for name in rows.column_names if name == "label"])  # all -1 there
        parts[split] = Part(origin, _with_class_names(_dataset_rows(rows), origin.class_names))
    return parts


def _classes_of(feature: Any) -> datasets.ClassLabel | None:
    """The classes of a column of class numbers, or of lists of them."""
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
    """The rows with names for class numbers."""
    namers = {column: _namer(names) for column, names in class_names.items()}
    for number, values in rows:
        if isinstance(values, DataError) or not namers:
            yield number, values
        else:
            yield number, {key: namers[key](value) if key in namers else value for key, value in values.items()}


def _namer(names: tuple[str, ...]) -> Callable[[Any], Any]:
    """Class number -> its name; -1 is the datasets library's mark for a row without a label."""

    def name(number: Any) -> Any:
        if isinstance(number, list):
            return [name(one) for one in number]
        if number is None or number == -1:
            return None
        return names[number] if 0 <= number < len(names) else str(number)

    return name


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
    """Name and configuration on the hub."""
    name = str(data.name)
    if name == SWAG:
        return "allenai/swag", data.config or "regular"
    return (glue.HUB_NAME, name) if name in glue.NAMES else (name, data.config)


def python_docs() -> str:
    """The language reference that every Python carries: 0.5 MB of English text, in the order of its topics' names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _refuse_plain_text(shape: Shape, origin: str) -> None:
    if not shape.is_whole_text:
        raise ConfigError(
            f"{origin} is plain text without labels: task.name=causal_lm learns from it, this task needs a table"
        )


def _is_test(split: str) -> bool:
    return split.startswith("test")

"""Finds the config's data: which kind of source it is, and which file holds which split.

Looks only at names and folders; reads no rows.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from dtrain.config.schema import Data
from dtrain.data import glue
from dtrain.data.column_names import cure
from dtrain.data.images import class_folder_state, is_class_folders
from dtrain.data.readers import SUFFIXES
from dtrain.errors import ConfigError, DataError

T = TypeVar("T")

SourceKind = Literal["python_docs", "glue", "files", "saved", "hub", "class_folders"]
"""The kinds of sources:

python_docs: Python's own documentation.
glue: the original TSV files of a GLUE task.
files: one file per split, read by its suffix.
saved: a folder written by save_to_disk.
hub: a data set on the hub.
class_folders: a folder per split, with a folder of images per class.
"""

PYTHON_DOCS = "python_docs"

SWAG = "swag"
"""A hub name, or a folder with SWAG's files, which have the usual names and are read by their suffix."""

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")

_SAVED_MARKS = ("dataset_dict.json", "state.json")


def source_kind(data: Data) -> SourceKind:
    """Returns the kind of source that the config names.

    Raises:
        ConfigError: neither name nor path is set, or they do not go together.
        DataError: `data.path` does not exist.
    """
    if data.path is None:
        if data.name is None:
            raise ConfigError(
                "no data is set: set data.name (a GLUE task or a data set on the hub) or data.path (a file or folder)"
            )
        return "python_docs" if data.name == PYTHON_DOCS else "hub"
    if data.name == PYTHON_DOCS:
        raise ConfigError(
            f"data.name={PYTHON_DOCS} comes with Python and has no files. To train on data.path={data.path}, set "
            "data.name=null"
        )
    if not source_path(data).exists():
        raise DataError(f"data.path={data.path} does not exist{_nearest(source_path(data))}. {_expected(data)}")
    if not (source_path(data).is_file() or source_path(data).is_dir()):
        raise DataError(f"data.path={data.path} is a device or a pipe, not a file or a folder. {_expected(data)}")
    if is_saved(source_path(data)):
        return "saved"
    if data.name is None and class_folders(data):
        return "class_folders"
    if data.name in (None, SWAG):
        return "files"
    if data.name not in glue.NAMES:
        raise ConfigError(
            f"data.name={data.name} with data.path: only the files of GLUE tasks ({', '.join(glue.NAMES)}) and of {SWAG} "
            "can be read by name. Remove data.name to read data.path by its suffix, or data.path to load the name from "
            "the hub"
        )
    if ignored := [
        key for key in ("columns", "delimiter", "header", "encoding") if getattr(data, key) not in (None, {})
    ]:
        raise ConfigError(
            f"data.{ignored[0]} has no effect on the files of a GLUE task, whose layout is fixed: remove it, or "
            f"data.name={data.name}"
        )
    return "glue"


def source_path(data: Data) -> Path:
    """Returns `data.path` with ~ expanded."""
    assert data.path is not None, "this kind of source has a path"
    return data.path.expanduser()


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` wrote this folder."""
    return any((folder / mark).is_file() for mark in _SAVED_MARKS)


def split_files(data: Data, kind: Literal["glue", "files"]) -> dict[str, Path]:
    """Returns the file of each split, train first.

    Raises:
        DataError: a file is missing, or it is unclear which file holds which split.
    """
    path = source_path(data)
    if path.is_file():
        if data.splits and path.suffix.lower() == ".json" and kind == "files":  # one object with a list for each split
            return train_first(dict.fromkeys(data.splits, path))
        if data.splits or kind == "glue":
            raise DataError(f"data.path={data.path} is one file, but the folder of {_wanted_files(data)} is expected")
        return {"train": path}
    if data.splits:
        files = {split: path / name for split, name in data.splits.items()}
    elif kind == "glue":
        files = {split: path / name for split, name in glue.find_task(str(data.name)).files.items()}
        if data.validation_fraction is not None and not files["validation"].exists():
            files = {"train": files["train"]}
    else:
        files = _files_by_usual_names(path, data)
    for split, file in files.items():
        if not file.is_file():
            raise DataError(f"{file} is missing: it is the split {split} of data.path={data.path}{_nearest(file)}")
    return train_first(files)


def class_folders(data: Data) -> dict[str, Path]:
    """Returns the folder of each split with images in class folders, train first; empty if the data is not like this."""
    path = source_path(data)
    splits: dict[str, Path] = {}
    if not path.is_dir():
        return {}
    for split, names in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        if any((path / f"{name}{suffix}").is_file() for name in names for suffix in SUFFIXES):
            return {}
        folders = [path / name for name in names if is_class_folders(path / name)]
        if folders:
            splits[split] = folders[0]
    if data.splits:
        splits = {split: path / name for split, name in data.splits.items()}
        if not all(is_class_folders(folder) for folder in splits.values()):
            return {}
    return train_first(splits)


def choose_splits(available: Sequence[str], data: Data, *, origin: str) -> dict[str, str]:
    """Returns our split -> the source's, by `data.splits` or the usual names. Test splits only if `data.splits` has them."""
    if data.splits:
        return train_first(data.splits)
    if "train" not in available:
        raise DataError(
            f"{origin} has no split called train. Its splits: {', '.join(available)}. "
            f"Name them: {cure('data.splits', {'train': available[0]})}"
        )
    validation = next((name for name in (*VALIDATION_NAMES, "validation_matched") if name in available), None)
    chosen = {"train": "train", **({"validation": validation} if validation else {})}
    if "validation_mismatched" in available:
        chosen["validation_mismatched"] = "validation_mismatched"
    return chosen


def file_hashes(data: Data, kind: SourceKind) -> dict[str, list[str]]:
    """Returns split (or path below the folder) -> file name and SHA-256. No absolute paths: nodes may mount differently."""
    if kind == "saved":
        path = source_path(data)
        # The datasets library keeps its own cache files in the folder.
        entries = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("cache-"))
        files = {file.relative_to(path).as_posix(): file for file in entries}
    elif kind == "class_folders":
        return {split: [folder.name, class_folder_state(folder)] for split, folder in class_folders(data).items()}
    else:
        assert kind in ("glue", "files")
        files = split_files(data, kind)
    return {split: [file.name, _sha256(file)] for split, file in files.items()}


def train_first(splits: Mapping[str, T]) -> dict[str, T]:
    """Returns the splits in the order in which they are reported and evaluated."""
    return {name: splits[name] for name in sorted(splits, key=lambda name: name != "train")}


def _files_by_usual_names(folder: Path, data: Data) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split, stems in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        matches = [file for stem in stems for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()]
        if len(matches) > 1:
            names = " and ".join(file.name for file in matches)
            raise DataError(
                f"data.path={data.path} holds {names}: which one is the split {split}? Name each file: "
                f"{cure('data.splits', {**{name: file.name for name, file in files.items()}, split: matches[0].name})}"
            )
        if matches:
            files[split] = matches[0]
    if "train" not in files:
        raise DataError(
            f"data.path={data.path} holds no train{{{','.join(SUFFIXES)}}} and was not written by save_to_disk. In "
            f"{folder.absolute()}: {_listing(folder)}. Name the file of each split: "
            "data.splits='{train: ..., validation: ...}'"
        )
    return files


def _wanted_files(data: Data) -> str:
    names = data.splits.values() if data.splits else glue.find_task(str(data.name)).files.values()
    return " and ".join(names)


def _expected(data: Data) -> str:
    if data.name in glue.NAMES:
        return f"Expected: the folder with {_wanted_files(data)} of the GLUE task {data.name}"
    return (
        f"Expected: a file ({', '.join(SUFFIXES)}), a folder with train and validation in one of these formats, "
        "or a folder written by save_to_disk"
    )


def unused_splits(available: Sequence[str], used: Mapping[str, str]) -> str | None:
    """Returns a line about splits or files of the source that no split of ours is; None if there are none.

    Args:
        available: the source's names.
        used: our split -> the source's name.
    """
    unused = [name for name in available if name not in used.values()]
    if not unused:
        return None
    test = next((name for name in unused if Path(name).stem.startswith("test")), unused[0])
    wanted = {**used, "test" if "test" in test else Path(test).stem: test}
    return f"not used: {', '.join(unused)}. To evaluate it as well: {cure('data.splits', wanted)}"


def unused_files(data: Data, files: Mapping[str, Path]) -> str | None:
    """Returns a line about files beside the splits that look like splits but are not used; None if there are none."""
    path = source_path(data)
    if data.splits:
        return None
    stems = (*TRAIN_NAMES, *VALIDATION_NAMES, "test", "testing")
    if path.is_file() and path.stem not in stems:
        return None
    folder = path.parent if path.is_file() else path
    usual = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES and file.stem in stems)
    line = unused_splits(usual, {split: file.name for split, file in files.items()})
    return f"{line} {cure('data.path', str(folder))}" if line and path.is_file() else line


def _nearest(path: Path) -> str:
    """Returns where a missing path was looked for, and what the nearest existing folder holds."""
    looked = "" if path.is_absolute() else f" (looked for {path.absolute()})"
    path = path.absolute()
    folder = next(parent for parent in path.parents if parent.is_dir())
    missing = path.relative_to(folder).parts[0]
    similar = difflib.get_close_matches(missing, [entry.name for entry in folder.iterdir()], 1)
    hint = f". Did you mean {folder / similar[0]}?" if similar else ""
    return f"{looked}. In {folder}: {_listing(folder)}{hint}"


def _listing(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "nothing"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()

"""Where a config's data is: which of the kinds of source it names, and which file each split is.

Looks at names and folders only; reads no rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from dtrain.config.schema import Data
from dtrain.data import glue
from dtrain.data.images import class_folder_state, is_class_folders
from dtrain.data.readers import SUFFIXES
from dtrain.errors import ConfigError, DataError

Named = TypeVar("Named")

Form = Literal["python_docs", "glue", "files", "saved", "hub", "class_folders"]
"""glue: the original TSV files. saved: written by save_to_disk. files: one file per split, read by its suffix.

class_folders: a folder per split with a folder of images per class.
"""

PYTHON_DOCS = "python_docs"

SWAG = "swag"
"""On the hub, or a folder with its files, which have the usual names and are read by their suffix."""

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")

_SAVED_MARKS = ("dataset_dict.json", "state.json")


def form_of(data: Data) -> Form:
    """Which kind of source the config names.

    Raises:
        ConfigError: neither name nor path, or a name and a path that do not go together.
        DataError: nothing is at `data.path`.
    """
    if data.path is None:
        if data.name is None:
            raise ConfigError(
                "there is no data: set data.name (a GLUE task or a data set on the hub) or data.path (a file or folder)"
            )
        return "python_docs" if data.name == PYTHON_DOCS else "hub"
    if data.name == PYTHON_DOCS:
        raise ConfigError(
            f"data.name={PYTHON_DOCS} comes with Python and has no files. To train on data.path={data.path}, say "
            f"data.name=null"
        )
    if not place_of(data).exists():
        raise DataError(f"data.path={data.path} does not exist. {_expected(data)}")
    if is_saved(place_of(data)):
        return "saved"
    if data.name is None and class_folders(data):
        return "class_folders"
    if data.name in (None, SWAG):
        return "files"
    if data.name not in glue.NAMES:
        raise ConfigError(
            f"data.name={data.name} with data.path: only the files of a GLUE task ({', '.join(glue.NAMES)}) and of "
            f"{SWAG} are read by a name. "
            "Drop data.name to read data.path by its suffix, or data.path to load the name from the hub"
        )
    if ignored := [key for key in ("columns", "delimiter", "header") if getattr(data, key) not in (None, {})]:
        raise ConfigError(
            f"data.{ignored[0]} has no effect on the files of a GLUE task, whose layout is fixed: drop it, or "
            f"data.name={data.name}"
        )
    return "glue"


def place_of(data: Data) -> Path:
    """`data.path`, with ~ for the home folder."""
    assert data.path is not None, "this form of source has a path"
    return data.path.expanduser()


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / mark).is_file() for mark in _SAVED_MARKS)


def split_files(data: Data, form: Literal["glue", "files"]) -> dict[str, Path]:
    """The file of each split, train first.

    Raises:
        DataError: a file is missing, or which file is which split cannot be told.
    """
    place = place_of(data)
    if place.is_file():
        if data.splits and place.suffix.lower() == ".json" and form == "files":  # one object with a list for each
            return train_first(dict.fromkeys(data.splits, place))
        if data.splits or form == "glue":
            raise DataError(f"data.path={data.path} is one file, where the folder of {_wanted_files(data)} is expected")
        return {"train": place}
    if data.splits:
        files = {split: place / name for split, name in data.splits.items()}
    elif form == "glue":
        files = {split: place / name for split, name in glue.find_task(str(data.name)).files.items()}
        if data.validation_fraction is not None and not files["validation"].exists():
            files = {"train": files["train"]}
    else:
        files = _files_by_usual_names(place, data)
    for split, file in files.items():
        if not file.is_file():
            raise DataError(
                f"{file} is missing: it is the split {split} of data.path={data.path}. In that folder: "
                f"{_listing(place)}"
            )
    return train_first(files)


def class_folders(data: Data) -> dict[str, Path]:
    """The folder of each split whose images lie in folders by class, train first; none where the data is not like that."""
    place = place_of(data)
    found: dict[str, Path] = {}
    if not place.is_dir():
        return {}
    for split, names in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        if any((place / f"{name}{suffix}").is_file() for name in names for suffix in SUFFIXES):
            return {}
        folders = [place / name for name in names if is_class_folders(place / name)]
        if folders:
            found[split] = folders[0]
    if data.splits:
        found = {split: place / name for split, name in data.splits.items()}
        if not all(is_class_folders(folder) for folder in found.values()):
            return {}
    return train_first(found)


def pick_splits(available: Sequence[str], data: Data, *, origin: str) -> dict[str, str]:
    """Our split -> the source's, by `data.splits` or else the usual names; tests only where they are asked for."""
    if data.splits:
        return train_first(data.splits)
    if "train" not in available:
        raise DataError(
            f"{origin} has no split called train. Its splits: {', '.join(available)}. "
            f"Say which is which: data.splits={{train: {available[0]}}}"
        )
    matched = next((name for name in (*VALIDATION_NAMES, "validation_matched") if name in available), None)
    picked = {"train": "train", **({"validation": matched} if matched else {})}
    if "validation_mismatched" in available:
        picked["validation_mismatched"] = "validation_mismatched"
    return picked


def file_hashes(data: Data, form: Form) -> dict[str, list[str]]:
    """Split (or path below the folder) -> file name and SHA-256. No absolute paths: nodes may mount differently."""
    if form == "saved":
        place = place_of(data)
        # datasets keeps its own cache files beside the data.
        found = (file for file in sorted(place.rglob("*")) if file.is_file() and not file.name.startswith("cache-"))
        files = {file.relative_to(place).as_posix(): file for file in found}
    elif form == "class_folders":
        return {split: [folder.name, class_folder_state(folder)] for split, folder in class_folders(data).items()}
    else:
        assert form in ("glue", "files")
        files = split_files(data, form)
    return {split: [file.name, _sha256(file)] for split, file in files.items()}


def train_first(splits: Mapping[str, Named]) -> dict[str, Named]:
    """The same splits, in the order in which they are reported and evaluated."""
    return {name: splits[name] for name in sorted(splits, key=lambda name: name != "train")}


def _files_by_usual_names(folder: Path, data: Data) -> dict[str, Path]:
    files = {}
    for split, stems in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        found = [file for stem in stems for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()]
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise DataError(
                f"data.path={data.path} holds {names}: which is the split {split}? Say it: data.splits={{{split}: "
                f"{found[0].name}}}"
            )
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise DataError(
            f"data.path={data.path} holds no train{{{','.join(SUFFIXES)}}} and was not written by save_to_disk. In "
            f"that folder: "
            f"{_listing(folder)}. Say which file is which split: data.splits={{train: ..., validation: ...}}"
        )
    return files


def _wanted_files(data: Data) -> str:
    names = data.splits.values() if data.splits else glue.find_task(str(data.name)).files.values()
    return " and ".join(names)


def _expected(data: Data) -> str:
    if data.name in glue.NAMES:
        return f"Expected there: the folder with {_wanted_files(data)} of the GLUE task {data.name}"
    return (
        f"Expected there: a file ({', '.join(SUFFIXES)}), a folder with train and validation in one of these formats, "
        "or a folder written by save_to_disk"
    )


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

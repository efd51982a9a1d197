"""The cache of tokenized splits: built once per node, published atomically, opened by every rank, compared between nodes.

The caller (a task) decides what is prepared and how. This file owns the cache folders and checks that all nodes hold the
same rows. A folder has `<split>/` (Arrow), other files of the caller, and meta.json.

One rank of each node reads all bytes of the folder at every start and compares their hashes with meta.json. Only wrong
content counts as damage: then the folder is moved aside, since other jobs may have mapped it, and built again. What this
process may not read or write is an error with a cure.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import datasets
import pyarrow as pa
import tokenizers
import transformers

from dtrain.config import bounded_json
from dtrain.console import log
from dtrain.data.fingerprint import fingerprint
from dtrain.distributed.collectives import all_gather_object, node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.serialization import Json
from dtrain.errors import DataError

Build = Callable[[Path], Mapping[str, Json]]
"""Writes splits (with save_split) and other files into an empty folder. Returns further information for the ranks."""

FORMAT = 2
"""Version of the folder's layout and of dtrain's processing of rows. Increase it when either changes."""

META = "meta.json"

OTHER_FOLDER = "data.cache_dir=~/dtrain-cache"
"""A setting to paste where the folder of caches cannot be used."""


class Splits(dict[str, datasets.Dataset]):
    """Memory-mapped splits by name, in the order in which they were saved.

    Attributes:
        fingerprints: SHA-256 over the rows of each split.
        facts: split -> what was read, for the banner; the caller sets them.
    """

    facts: Mapping[str, Json]

    def __init__(self, splits: Mapping[str, datasets.Dataset], fingerprints: Mapping[str, str]) -> None:
        super().__init__(splits)
        self.fingerprints = dict(fingerprints)
        self.facts = {}


@dataclass(frozen=True)
class PreparedData:
    """An open cache folder.

    Attributes:
        folder: the folder.
        meta: the result of `build`, plus "splits": {split: {"rows": count, "fingerprint": SHA-256 over the rows}}.
        splits: the memory-mapped splits.
    """

    folder: Path
    meta: dict[str, Json]
    splits: Splits


def prepare(
    plan: Callable[[], tuple[Mapping[str, Json], Build]], *, cache_dir: Path | None, context: RankContext
) -> PreparedData:
    """Collective. Returns the prepared data, which one rank of each node builds unless it is already in the cache.

    Args:
        plan: called on that rank only. Returns the key (JSON that identifies the result; library versions are added) and
            the function that builds the data.
        cache_dir: parent of the cache folders; None: `dtrain` below the datasets library's cache.

    Raises:
        DataError: `plan` or `build` raised it (then on every rank), the cache cannot be written, or the nodes' data
            differ.
    """
    datasets.disable_progress_bars()
    cache = cache_dir.expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "dtrain"
    verified: list[PreparedData] = []  # of the rank that has read all bytes, which need not open the folder twice
    found = node_first(lambda: _find_or_build(plan, cache, verified), context)
    prepared = verified[0] if verified else open_prepared(Path(found["folder"]))
    compare_nodes(found["splits"], context)
    return prepared


def save_split(folder: Path, split: str, rows: datasets.Dataset) -> None:
    """Writes a split into the folder that is being built."""
    rows.save_to_disk(str(folder / split))


def open_prepared(folder: Path) -> PreparedData:
    """Memory-maps a folder that `prepare` published. Does not read the rows: see `_verify`.

    Raises:
        DataError: something is missing or does not match meta.json, or may not be read.
    """
    try:
        return _open(folder)
    except _DamageError as error:
        raise DataError(f"{folder} is damaged: {error}") from None


class _DamageError(Exception):
    """The content of a cache folder is not what was written."""


def _open(folder: Path) -> PreparedData:
    try:
        if _size(folder / META) < 0:
            raise _DamageError(f"{META} is missing")
        content = bounded_json.loads((folder / META).read_text(encoding="utf-8"))
        if content["checksum"] != _checksum(content):
            raise _DamageError(f"{META} was changed")
        if outside := [
            name for name in content["files"] if PurePath(name).is_absolute() or ".." in PurePath(name).parts
        ]:
            raise _DamageError(f"{META} lists {outside[0]!r}, which is not in the folder")
        if wrong := [name for name, info in content["files"].items() if _size(folder / name) != info["bytes"]]:
            raise _DamageError(f"{wrong[0]} is missing or has another size than when it was written")
        saved = content["meta"]["splits"]
        if outside := [split for split in saved if PurePath(split).name != split or not (folder / split).is_dir()]:
            raise _DamageError(f"{META} lists the split {outside[0]!r}, which is not in the folder")
        splits = {split: datasets.load_from_disk(str(folder / split)) for split in saved}
        if wrong := [split for split, rows in splits.items() if len(rows) != saved[split]["rows"]]:
            raise _DamageError(f"the split {wrong[0]} has {len(splits[wrong[0]])} rows, not as many as were written")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _DamageError(f"{error.filename or folder} is missing") from None
    except MemoryError:
        raise
    except OSError as error:
        raise _unreadable(folder, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise _DamageError(f"it cannot be read ({type(error).__name__}: {error})") from None
    fingerprints = {split: str(saved[split]["fingerprint"]) for split in saved}
    return PreparedData(folder, content["meta"], Splits(splits, fingerprints))


def _verify(folder: Path) -> PreparedData:
    """Opens a folder after reading all its bytes: rows and fingerprint of each split are those in its meta.

    Raises:
        _DamageError: a hash is not the one in meta.json.
        DataError: a file may not be read.
    """
    prepared = _open(folder)
    files = bounded_json.loads((folder / META).read_text(encoding="utf-8"))["files"]
    try:
        for name, info in files.items():
            if info.get("sha256") not in (None, _file_hash(folder / name)):
                raise _DamageError(f"the bytes of {name} are not those that were written")
        for rows in prepared.splits.values():
            rows.data.validate(full=True)  # the offsets in a changed file could point outside its memory
        now = {split: _describe(rows) for split, rows in prepared.splits.items()}
    except OSError as error:
        raise _unreadable(folder, error) from None
    except (ValueError, pa.ArrowException) as error:
        raise _DamageError(f"its rows cannot be read ({type(error).__name__}: {error})") from None
    if changed := [split for split in now if now[split] != prepared.meta["splits"][split]]:
        raise _DamageError(f"the rows of the split {changed[0]} are not those that were written")
    return prepared


def _unreadable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache {folder} cannot be read: {describe_os_error(error)}. It may be sound, so it was left as it is. Make it "
        f"readable, or use another folder: {OTHER_FOLDER}"
    )


def describe_os_error(error: OSError) -> str:
    """Returns the reason and the file, with the file's owner and mode where access was denied."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return reason
    if error.errno not in (errno.EACCES, errno.EPERM):
        return f"{reason}: {error.filename}"
    try:
        info = Path(error.filename).stat()
    except OSError:
        return f"{reason}: {error.filename}"
    return f"{reason}: {error.filename} (mode {info.st_mode & 0o777:04o}, user {info.st_uid}; this process is user {os.getuid()})"


def compare_nodes(splits: Mapping[str, Mapping[str, Json]], context: RankContext) -> None:
    """Collective. Logs every node's rows and fingerprints, and raises on all ranks if the nodes differ.

    Raises:
        DataError: with a table of node, host, split, rows and fingerprint.
    """
    local = {"node": context.topology.node_rank, "host": socket.gethostname(), "splits": splits}
    every_rank = all_gather_object(local, context)
    nodes = {entry["node"]: entry for entry in sorted(every_rank, key=lambda entry: entry["node"])}
    for entry in nodes.values():
        where = f" on node {entry['node']} ({entry['host']})" if len(nodes) > 1 else ""
        listed = ", ".join(
            f"{split} {info['rows']} rows {info['fingerprint'][:12]}" for split, info in entry["splits"].items()
        )
        log.info("data%s: %s", where, listed)
    first = every_rank[0]
    other = next((entry for entry in every_rank if entry["splits"] != first["splits"]), None)
    if other is None:
        return
    names = [
        name
        for name in {**first["splits"], **other["splits"]}
        if first["splits"].get(name) != other["splits"].get(name)
    ]
    lines = [f"{'node':<5} {'host':<24} {'split':<24} {'rows':>10}  fingerprint"]
    for entry in nodes.values():
        for split, info in entry["splits"].items():
            lines.append(
                f"{entry['node']:<5} {entry['host']:<24} {split:<24} {info['rows']:>10}  {info['fingerprint'][:16]}"
            )
    raise DataError(
        f"the data ({', '.join(names)}) on {other['host']} differ from those on {first['host']}, so the nodes would train "
        "different models:\n"
        + "\n".join(lines)
        + "\nUse the same data.path (or the same revision in the hub's cache), tokenizer and libraries on every node"
    )


def _find_or_build(
    plan: Callable[[], tuple[Mapping[str, Json], Build]], cache: Path, verified: list[PreparedData]
) -> dict[str, Json]:
    """Returns the folder for the plan's key, built unless a sound one exists, and rows and fingerprint of its splits.

    Args:
        verified: gets the opened folder if a sound one exists.
    """
    key, build = plan()
    versions = {library.__name__: library.__version__ for library in (datasets, tokenizers, transformers)}
    identity = json.dumps({"format": FORMAT, "key": key, "versions": versions}, sort_keys=True)
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:24]
    _refuse_odd(cache)
    _refuse_odd(folder)
    if folder.exists():
        inode = folder.stat().st_ino
        try:
            verified.append(_verify(folder))
            return {"folder": str(folder), "splits": verified[0].meta["splits"]}
        except _DamageError as error:
            _move_aside(folder, inode, str(error))
    return {"folder": str(folder), "splits": _build_and_publish(build, key, folder)}


def _refuse_odd(folder: Path) -> None:
    """Refuses a path that is taken by something that is no folder. Nothing of it is dtrain's, so nothing is deleted."""
    try:
        if folder.is_dir() or not os.path.lexists(folder):
            return
        found = f"a symbolic link to {folder.readlink()}, which" if folder.is_symlink() else "a file, which"
    except OSError as error:
        raise _unreadable(folder, error) from None
    raise DataError(
        f"the cache cannot use {folder}: it is {found} is not a folder. Remove it (rm {shlex.quote(str(folder))}), or use "
        f"another folder: {OTHER_FOLDER}"
    )


def _move_aside(folder: Path, inode: int, damage: str) -> None:
    """Renames a damaged folder, unless another job has replaced it already."""
    aside = folder.with_name(f"{folder.name}-damaged-{time.time_ns()}")
    try:
        if folder.stat().st_ino == inode:
            folder.rename(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(
            f"the cache {folder} is damaged ({damage}) and cannot be moved aside: {describe_os_error(error)}. Ask its owner "
            f"to delete it, or use another folder: {OTHER_FOLDER}"
        ) from None
    log.warning(
        "data: the cache is damaged and will be rebuilt: %s: %s. It is now %s; delete that when no other job uses it",
        folder,
        damage,
        aside.name,
    )


def _build_and_publish(build: Build, key: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Returns rows and fingerprint of each split."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-building-", dir=cache))
    except OSError as error:
        raise DataError(
            f"the cache {cache} cannot be written: {describe_os_error(error)}. Set data.cache_dir to a writable folder: "
            f"{OTHER_FOLDER}"
        ) from None
    try:
        splits = _build(build, temporary, key)
        return splits if _publish(temporary, folder) else _verify(folder).meta["splits"]
    except _DamageError as error:
        raise DataError(f"another job has just built {folder}, and it is damaged: {error}. Start again") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise DataError(
                f"the cache {cache} is full: {error.strerror}. Free space there or set data.cache_dir"
            ) from None
        if error.filename is None or cache not in Path(os.fsdecode(error.filename)).parents:
            raise  # not of the cache
        raise DataError(
            f"the cache {cache} cannot be written: {describe_os_error(error)}. Set data.cache_dir to a writable folder: "
            f"{OTHER_FOLDER}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(build: Build, folder: Path, key: Mapping[str, Json]) -> dict[str, Json]:
    """Fills the folder and finally writes meta.json, which lists the folder's content. Returns what it says of the splits."""
    returned = dict(build(folder))
    names = [state.parent.name for state in folder.glob("*/state.json")]
    splits = {
        name: _describe(datasets.load_from_disk(str(folder / name)))
        for name in sorted(names, key=lambda name: (name != "train", name))
    }
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            # The rows have their own hash, which does not depend on how they are cut into files.
            **({} if file.suffix == ".arrow" else {"sha256": _file_hash(file)}),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {"key": key, "meta": {**returned, "splits": splits}, "files": files}
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=1)
    (folder / META).write_text(text, encoding="utf-8")
    return splits


def _publish(temporary: Path, folder: Path) -> bool:
    """Renames the finished folder to its final name. If another job was faster, keeps its folder and returns False.

    A cache gets the permissions of the folder of caches, whatever the umask of the process that built it.
    """
    mode = folder.parent.stat().st_mode & 0o777 | 0o700
    for file in temporary.rglob("*"):
        file.chmod(mode if file.is_dir() else mode & 0o666)
        if file.is_file():
            with file.open("rb+") as content:
                os.fsync(content.fileno())  # otherwise a power cut could leave the final name with missing content
    temporary.chmod(mode)
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _describe(rows: datasets.Dataset) -> dict[str, Json]:
    return {"rows": len(rows), "fingerprint": fingerprint(rows)}


def _checksum(content: Mapping[str, Json]) -> str:
    """Returns the SHA-256 over meta.json without its checksum."""
    text = json.dumps({name: value for name, value in content.items() if name != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _size(file: Path) -> int:
    try:
        info = file.stat()
        return info.st_size if stat.S_ISREG(info.st_mode) else -1  # a pipe or a device could be read forever
    except (FileNotFoundError, NotADirectoryError):
        return -1

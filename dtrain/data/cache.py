"""The cache of tokenized splits: built once per node, published atomically, opened by every rank, compared between nodes.

The caller (a task) decides what is prepared and how. This file owns the cache folders and checks that all nodes hold the
same rows. A folder has `<split>/` (Arrow), other files of the caller, and meta.json.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import tokenizers
import transformers

from dtrain.console import log
from dtrain.distributed.collectives import all_gather_object, node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.serialization import Json
from dtrain.errors import DataError

Build = Callable[[Path], Mapping[str, Json]]
"""Writes splits (with save_split) and other files into an empty folder. Returns further information for the ranks."""

FORMAT = 1
"""Version of the folder's layout and of dtrain's processing of rows. Increase it when either changes."""

META = "meta.json"


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
    folder = Path(node_first(lambda: str(_find_or_build(plan, cache)), context))
    prepared = open_prepared(folder)
    compare_nodes(prepared.meta["splits"], context)
    return prepared


def save_split(folder: Path, split: str, rows: datasets.Dataset) -> None:
    """Writes a split into the folder that is being built."""
    rows.save_to_disk(str(folder / split))


def open_prepared(folder: Path) -> PreparedData:
    """Memory-maps a folder that `prepare` published.

    Raises:
        DataError: something is missing or does not match meta.json.
    """
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
        if missing := [name for name, size in content["files"].items() if _size(folder / name) != size]:
            raise DataError(f"{folder}: {missing[0]} is missing or has another size than when it was written")
        saved = content["meta"]["splits"]
        splits = {split: datasets.load_from_disk(str(folder / split)) for split in saved}
        fingerprints = {split: str(saved[split]["fingerprint"]) for split in saved}
        if wrong := [split for split, rows in splits.items() if len(rows) != saved[split]["rows"]]:
            raise DataError(
                f"{folder}: the split {wrong[0]} has {len(splits[wrong[0]])} rows, not as many as were written"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise DataError(f"{folder} cannot be read ({type(error).__name__}: {error})") from None
    return PreparedData(folder, content["meta"], Splits(splits, fingerprints))


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


def fingerprint(rows: datasets.Dataset) -> str:
    """Returns the SHA-256 over the column names and the rows in order, independent of chunks, files and formats."""
    digest = hashlib.sha256()
    names = sorted(rows.column_names)
    digest.update(json.dumps(names).encode())
    for batch in rows.with_format(None).select_columns(names).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            digest.update(json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def _find_or_build(plan: Callable[[], tuple[Mapping[str, Json], Build]], cache: Path) -> Path:
    """Returns the folder for the plan's key, and builds it unless a complete one exists."""
    key, build = plan()
    versions = {library.__name__: library.__version__ for library in (datasets, tokenizers, transformers)}
    identity = json.dumps({"format": FORMAT, "key": key, "versions": versions}, sort_keys=True)
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if folder.exists():
        try:
            open_prepared(folder)
            return folder
        except DataError as error:
            log.warning("data: the cache is damaged and will be rebuilt: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-building-", dir=cache))
    except OSError as error:
        raise DataError(
            f"the cache {cache} cannot be written: {error.strerror}. Set data.cache_dir to a writable folder"
        ) from None
    try:
        _build(build, temporary, key)
        _publish(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise DataError(
            f"the cache {cache} is full: {error.strerror}. Free space there or set data.cache_dir"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _build(build: Build, folder: Path, key: Mapping[str, Json]) -> None:
    """Fills the folder and finally writes meta.json, which lists the folder's content."""
    returned = dict(build(folder))
    names = [state.parent.name for state in folder.glob("*/state.json")]
    splits = {}
    for name in sorted(names, key=lambda name: (name != "train", name)):
        rows = datasets.load_from_disk(str(folder / name))
        splits[name] = {"rows": len(rows), "fingerprint": fingerprint(rows)}
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    content = {"key": key, "meta": {**returned, "splits": splits}, "files": files}
    (folder / META).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    """Renames the finished folder to its final name. If another job was faster, its folder is equivalent and is kept."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb+") as content:
                os.fsync(content.fileno())  # otherwise a power cut could leave the final name with missing content
    temporary.chmod(0o755)  # mkdtemp makes private folders, but a cache may be shared
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1

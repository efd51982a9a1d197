"""Tokenised splits on disk: prepared once per node, published whole, opened by every rank, compared between nodes.

What is prepared, and how, is the caller's (a task's); this file owns the cache folder and the proof that all nodes hold
the same rows. A folder holds `<split>/` (Arrow), whatever else the caller wrote, and meta.json.
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
from typing import Any

import datasets
import pyarrow as pa
import tokenizers
import transformers

from dtrain.console import log
from dtrain.distributed.collectives import all_gather_object, node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError

Json = Any
"""What json.dumps takes."""

Build = Callable[[Path], Mapping[str, Json]]
"""Writes splits (with save_split) and other files into an empty folder; gives what the ranks need to know besides."""

FORMAT = 1
"""Raised when the folder's layout, or what dtrain does to rows on the way, changes."""

META = "meta.json"


class Splits(dict[str, datasets.Dataset]):
    """Memory-mapped splits by name, in the order in which they were saved. fingerprints: SHA-256 over the rows of each."""

    def __init__(self, splits: Mapping[str, datasets.Dataset], fingerprints: Mapping[str, str]) -> None:
        super().__init__(splits)
        self.fingerprints = dict(fingerprints)


@dataclass(frozen=True)
class Prepared:
    """An open cache folder.

    meta: what `build` gave, plus "splits": {split: {"rows": count, "fingerprint": SHA-256 over the rows}}.
    """

    folder: Path
    meta: dict[str, Json]
    splits: Splits


def prepare(
    plan: Callable[[], tuple[Mapping[str, Json], Build]], *, cache_dir: Path | None, context: RankContext
) -> Prepared:
    """Collective. The prepared data, built by one rank of each node if it is not in the cache yet.

    Args:
        plan: called on that rank only. Gives the key, JSON that identifies the result (versions of the libraries are
            added to it), and the function that builds it.
        cache_dir: parent of the cache folders; None: `dtrain` below the datasets library's cache.

    Raises:
        DataError: what `plan` or `build` raise, on every rank; the cache cannot be written; the nodes' data differ.
    """
    datasets.disable_progress_bars()
    cache = cache_dir.expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "dtrain"
    folder = Path(node_first(lambda: str(_ensure(plan, cache)), context))
    prepared = open_prepared(folder)
    compare_nodes(prepared.meta["splits"], context)
    return prepared


def save_split(folder: Path, split: str, rows: datasets.Dataset) -> None:
    """Writes a split into the folder that is being built."""
    rows.save_to_disk(str(folder / split))


def open_prepared(folder: Path) -> Prepared:
    """Maps a folder that `prepare` published.

    Raises:
        DataError: something is missing, or not as meta.json says.
    """
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
        if missing := [name for name, size in content["files"].items() if _size(folder / name) != size]:
            raise DataError(f"{folder}: {missing[0]} is not as it was written")
        splits = {split: datasets.load_from_disk(str(folder / split)) for split in content["meta"]["splits"]}
        fingerprints = {split: str(told["fingerprint"]) for split, told in content["meta"]["splits"].items()}
        if wrong := [split for split, rows in splits.items() if len(rows) != content["meta"]["splits"][split]["rows"]]:
            raise DataError(
                f"{folder}: the split {wrong[0]} has {len(splits[wrong[0]])} rows, not as many as were written"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise DataError(f"{folder} cannot be read ({type(error).__name__}: {error})") from None
    return Prepared(folder, content["meta"], Splits(splits, fingerprints))


def compare_nodes(splits: Mapping[str, Mapping[str, Json]], context: RankContext) -> None:
    """Collective. Reports every node's rows and fingerprints; raises on all ranks if they are not the same everywhere.

    Raises:
        DataError: with a table of node, host, split, rows and fingerprint.
    """
    mine = {"node": context.topology.node_rank, "host": socket.gethostname(), "splits": splits}
    every_rank = all_gather_object(mine, context)
    nodes = {entry["node"]: entry for entry in sorted(every_rank, key=lambda entry: entry["node"])}
    for entry in nodes.values():
        place = f" on node {entry['node']} ({entry['host']})" if len(nodes) > 1 else ""
        listed = ", ".join(
            f"{split} {of['rows']} rows {of['fingerprint'][:12]}" for split, of in entry["splits"].items()
        )
        log.info("data%s: %s", place, listed)
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
        for split, of in entry["splits"].items():
            lines.append(
                f"{entry['node']:<5} {entry['host']:<24} {split:<24} {of['rows']:>10}  {of['fingerprint'][:16]}"
            )
    raise DataError(
        f"the data ({', '.join(names)}) on {other['host']} are not those on {first['host']}, so the nodes would not train "
        "one model:\n"
        + "\n".join(lines)
        + "\nMake data.path (or the hub's revision in the cache), the tokenizer and the libraries the same on every "
        "node"
    )


def fingerprint(rows: datasets.Dataset) -> str:
    """SHA-256 over the columns' names and the rows in order, whatever their chunks, files or formats."""
    digest = hashlib.sha256()
    names = sorted(rows.column_names)
    digest.update(json.dumps(names).encode())
    for batch in rows.with_format(None).select_columns(names).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            digest.update(json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def _ensure(plan: Callable[[], tuple[Mapping[str, Json], Build]], cache: Path) -> Path:
    """The folder of the plan's key, built unless a whole one is there."""
    key, build = plan()
    versions = {library.__name__: library.__version__ for library in (datasets, tokenizers, transformers)}
    identity = json.dumps({"format": FORMAT, "key": key, "versions": versions}, sort_keys=True)
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if folder.exists():
        try:
            open_prepared(folder)
            return folder
        except DataError as error:
            log.warning("data: the cache is damaged and is built again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-building-", dir=cache))
    except OSError as error:
        raise DataError(
            f"the cache {cache} cannot be written: {error.strerror}. Set data.cache_dir to a folder that can"
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
    """Fills the folder and, last, writes what is in it to meta.json."""
    given = dict(build(folder))
    names = [state.parent.name for state in folder.glob("*/state.json")]
    splits = {}
    for name in sorted(names, key=lambda name: (name != "train", name)):
        rows = datasets.load_from_disk(str(folder / name))
        splits[name] = {"rows": len(rows), "fingerprint": fingerprint(rows)}
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    content = {"key": key, "meta": {**given, "splits": splits}, "files": files}
    (folder / META).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    """Gives the finished folder its name, at once. Where another job was faster, its folder is as good as ours."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb+") as content:
                os.fsync(content.fileno())  # the name must not outlive a power cut that the bytes did not survive
    temporary.chmod(0o755)  # mkdtemp makes folders for one user; a cache may be shared
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1

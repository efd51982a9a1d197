"""Vectors on disk, found by the key of their row: results of a frozen part of a model that need not be computed again.

A store is a folder of parts. A part is written once, under a temporary name, and never changed. So jobs can share a store
without locks, and a killed writer leaves nothing that is read. A part's name and content depend on its rows alone. A part
whose checksum is wrong is deleted, and its rows count as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"dtrain frozen 1\n"
HEADER = struct.Struct("<16sQQI")
"""Magic, number of rows, bytes of a vector, CRC-32 of all that follows."""

INDEX = np.dtype([("key", "V16"), ("count", "<u4")])

BUILDING = ".building-"
OLD_S = 86_400.0
"""Age at which an unfinished part is garbage."""

CHUNK = 1 << 24


class DamagedPartError(Exception):
    """A part is not what was written."""


@dataclass(frozen=True)
class _Part:
    """A part, memory-mapped: (vectors, bytes of one)."""

    vectors: npt.NDArray[np.uint8]


class FrozenStore:
    """The rows of one frozen part of a model."""

    def __init__(self, folder: Path, *, vector_bytes: int) -> None:
        """
        Args:
            vector_bytes: size of one vector.
        """
        self.folder, self.vector_bytes = folder, vector_bytes
        self._parts: list[_Part] = []
        self._names: set[str] = set()
        self._rows: dict[bytes, tuple[int, int, int]] = {}  # key -> part, first vector, number of vectors

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def load(self) -> None:
        """Memory-maps the parts that were published since the last call. Skips what is damaged or cannot be read.

        Of a row that two jobs computed at the same time, what was written first is read: a run that is resumed gets
        the same bits again.
        """
        for file in sorted(self.folder.glob("*.part"), key=_written):
            if file.name not in self._names:
                with contextlib.suppress(OSError, DamagedPartError):
                    self._add(file)

    def _add(self, file: Path) -> None:
        index, offset = _read_index(file, self.vector_bytes)
        counts = index["count"].astype(np.int64)
        total = int(counts.sum())
        if total:
            vectors: Any = np.memmap(file, np.uint8, "r", offset, (total, self.vector_bytes))
        else:
            vectors = np.zeros((0, self.vector_bytes), np.uint8)
        number, starts = len(self._parts), np.cumsum(counts) - counts
        self._parts.append(_Part(vectors))
        self._names.add(file.name)
        keys = index["key"].tobytes()
        size = INDEX["key"].itemsize
        for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            self._rows.setdefault(keys[row * size : (row + 1) * size], (number, start, count))

    def read(self, keys: Sequence[bytes], counts: Sequence[int]) -> npt.NDArray[np.uint8] | None:
        """Returns the vectors of these rows, one after the other: (vectors, bytes of one). None if any is missing.

        Args:
            counts: number of vectors of each row; a row that has another number counts as missing.
        """
        places = [self._rows.get(key) for key in keys]
        found = [place for place in places if place is not None]
        if len(found) < len(keys) or any(place[2] != count for place, count in zip(found, counts, strict=True)):
            return None
        result = np.empty((sum(counts), self.vector_bytes), np.uint8)
        position = 0
        for part, start, count in found:
            result[position : position + count] = self._parts[part].vectors[start : start + count]
            position += count
        return result

    def write(self, keys: Sequence[bytes], counts: Sequence[int], vectors: npt.NDArray[np.uint8]) -> None:
        """Publishes a part.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        index = np.zeros(len(keys), INDEX)
        index["key"] = np.frombuffer(b"".join(keys), "V16")
        index["count"] = counts
        body = index.tobytes()
        data = np.ascontiguousarray(vectors).data
        header = HEADER.pack(MAGIC, len(keys), self.vector_bytes, zlib.crc32(data, zlib.crc32(body)))
        descriptor, temporary = tempfile.mkstemp(prefix=BUILDING, dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(header)
                file.write(body)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # As the folder: other users of a shared cache may read it.
            Path(temporary).chmod(self.folder.stat().st_mode & 0o666 | 0o600)
            target = self.folder / f"{hashlib.sha256(body).hexdigest()[:32]}.part"
            if not target.exists():  # another job may have been faster, and reads its own last digits since
                Path(temporary).rename(target)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _read_index(file: Path, vector_bytes: int) -> tuple[npt.NDArray[Any], int]:
    """Returns the index of a part, and the place of its first vector in the file."""
    with file.open("rb") as content:
        header = content.read(HEADER.size)
        if len(header) < HEADER.size:
            raise DamagedPartError("it is cut off")
        magic, rows, size, _ = HEADER.unpack(header)
        length = file.stat().st_size
        if magic != MAGIC or size != vector_bytes or HEADER.size + rows * INDEX.itemsize > length:
            raise DamagedPartError("its first bytes are not those of a part")
        index = np.frombuffer(content.read(rows * INDEX.itemsize), INDEX)
    offset = HEADER.size + rows * INDEX.itemsize
    if len(index) != rows or offset + int(index["count"].astype(np.int64).sum()) * vector_bytes != length:
        raise DamagedPartError("it has another size than when it was written")
    return index, offset


def delete_damaged(folder: Path, *, vector_bytes: int) -> list[str]:
    """Reads all bytes of a store, and deletes the parts that are not what was written. Returns what was wrong.

    A part that another job has mapped stays readable there.
    """
    damaged = []
    for file in sorted(folder.glob("*.part")):
        try:
            _read_index(file, vector_bytes)
            _check(file)
        except DamagedPartError as error:
            damaged.append(f"{file}: {error}")
            file.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
    for file in folder.glob(f"{BUILDING}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > OLD_S:
                file.unlink()
    return damaged


def _check(file: Path) -> None:
    with file.open("rb") as content:
        expected = HEADER.unpack(content.read(HEADER.size))[3]
        found = 0
        while chunk := content.read(CHUNK):
            found = zlib.crc32(chunk, found)
    if found != expected:
        raise DamagedPartError("its bytes are not those that were written")


def stored_bytes(folder: Path) -> int:
    """Returns the size of a store, unfinished parts included."""
    total = 0
    for file in folder.glob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def make_room(root: Path, keep: Path, *, limit: int) -> list[Path]:
    """Deletes the stores in `root` that were not used for the longest time, until all are within a limit.

    Args:
        keep: this store stays.
        limit: bytes for all stores but `keep`.

    Returns:
        The deleted stores. A job that has one mapped can still read it.
    """
    others = sorted((path for path in root.iterdir() if path != keep and _is_store(path)), key=_last_used)
    sizes = {path: stored_bytes(path) for path in others}
    deleted = []
    for path in others:
        if sum(sizes.values()) <= max(limit, 0):
            break
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]
        deleted.append(path)
    return deleted


def _is_store(path: Path) -> bool:
    """Returns whether a folder is a store, and not something of the user's, or of another job that deletes it just now."""
    if path.is_symlink() or not path.is_dir() or not re.fullmatch(r"[0-9a-f]{32}", path.name):
        return False
    with contextlib.suppress(OSError):
        return all(file.suffix == ".part" or file.name.startswith(BUILDING) for file in path.iterdir())
    return False


def _written(file: Path) -> tuple[int, str]:
    with contextlib.suppress(OSError):
        return file.stat().st_mtime_ns, file.name
    return 0, file.name


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def in_groups(lengths: Sequence[int], *, tokens: int) -> list[list[int]]:
    """Returns groups of rows of equal length, each of at most `tokens` tokens or one row, the shortest rows first.

    The groups depend on the lengths alone, so that a row gets the same bits on any number of ranks, and after a restart.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    for row in order:
        last = groups[-1] if groups else None
        if last is not None and lengths[last[0]] == lengths[row] and (len(last) + 1) * lengths[row] <= tokens:
            last.append(row)
        else:
            groups.append([row])
    return groups

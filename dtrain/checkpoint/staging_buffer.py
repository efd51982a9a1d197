"""The memory in which a snapshot waits to be written: seen by the rank that fills it and the process that writes it.

An anonymous memory file is not bound by /dev/shm (64 MB in many containers, and SIGBUS beyond); where memory is short, or
there are no such files, an unlinked file beside the checkpoints takes its place.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PAGE = mmap.PAGESIZE
_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_OF_VERSION_2 = ("memory.max", "memory.current")
SPARE = 1.25
"""How many times the size must be free for a block in memory: the job's own needs still grow."""


class Block:
    """A growing block of shared memory, its file descriptor for the other process, and a view of it here."""

    def __init__(self, spill: Path) -> None:
        """
        Args:
            spill: existing folder for a block that memory has no room for.
        """
        self._spill = spill
        self.size = 0
        self.fd = -1
        self._map: mmap.mmap | None = None

    def grow(self, size: int) -> None:
        """At least `size` bytes; contents stay. Views taken before must be gone.

        Raises:
            OSError: neither memory nor the disk has room.
        """
        if size <= self.size:
            return
        size = -(-size // PAGE) * PAGE
        if self.fd < 0:
            self.fd = _new_file(size, self._spill)
        os.posix_fallocate(self.fd, 0, size)  # now, as an error: later a page that is not there is a SIGBUS
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self.fd, size)
        self.size = size

    def view(self, offset: int, size: int) -> memoryview:
        """Those bytes, to be written to."""
        assert self._map is not None
        assert offset + size <= self.size
        return memoryview(self._map)[offset : offset + size]

    def close(self) -> None:
        """Gives the memory back. Views must be gone."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.size = 0


def _new_file(size: int, spill: Path) -> int:
    if hasattr(os, "memfd_create") and size * SPARE < free_memory():
        return os.memfd_create("dtrain-snapshot")
    with tempfile.TemporaryFile(dir=spill, prefix=".tmp-snapshot-") as file:
        return os.dup(file.fileno())


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has, and what its control group leaves it."""
    return min([*_of_the_machine(), *_of_the_group()], default=0)


def _of_the_machine() -> Iterator[int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _of_the_group(told: str = "/proc/self/cgroup", mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each control group around this process leaves it, of both versions; the tightest may be any of them."""
    try:
        lines = Path(told).read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mounted / "memory" if controllers else mounted
        limit, used = _OF_VERSION_1 if controllers else _OF_VERSION_2
        place = root / name.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(root):
                break
            with suppress(OSError, ValueError):  # not there in a container; "max": no limit
                yield int((group / limit).read_text()) - int((group / used).read_text())

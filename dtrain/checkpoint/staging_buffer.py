"""Shared memory that holds a snapshot until it is written. The rank fills it; the writer process reads it.

The buffer is an anonymous memory file, which is not limited by /dev/shm (64 MB in many containers, with a SIGBUS beyond
that). Where memory is short, or such files are not supported, it is an unlinked file in the checkpoints folder.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PAGE = mmap.PAGESIZE
_CGROUP_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_CGROUP_V2_FILES = ("memory.max", "memory.current")
MEMORY_MARGIN = 1.25
"""Free memory that a buffer in memory requires, as a multiple of its size: the job itself still needs more."""


class StagingBuffer:
    """A growing block of shared memory: its file descriptor for the other process, and views of it in this one."""

    def __init__(self, spill: Path) -> None:
        """Creates an empty buffer.

        Args:
            spill: existing folder for a buffer that does not fit into memory.
        """
        self._spill = spill
        self.size = 0
        self.fd = -1
        self._map: mmap.mmap | None = None

    def grow(self, size: int) -> None:
        """Grows the buffer to at least `size` bytes and keeps its contents. No earlier view may be in use.

        Raises:
            OSError: neither memory nor disk has room.
        """
        if size <= self.size:
            return
        size = -(-size // PAGE) * PAGE
        if self.fd < 0:
            self.fd = _create_file(size, self._spill)
        os.posix_fallocate(self.fd, 0, size)  # Raises an error here; a page missing later would be a SIGBUS.
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self.fd, size)
        self.size = size

    def view(self, offset: int, size: int) -> memoryview:
        """Returns a writable view of those bytes."""
        assert self._map is not None
        assert offset + size <= self.size
        return memoryview(self._map)[offset : offset + size]

    def close(self) -> None:
        """Frees the memory. No view may be in use."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.size = 0


def _create_file(size: int, spill: Path) -> int:
    if hasattr(os, "memfd_create") and size * MEMORY_MARGIN < free_memory():
        return os.memfd_create("dtrain-snapshot")
    with tempfile.TemporaryFile(dir=spill, prefix=".tmp-snapshot-") as file:
        return os.dup(file.fileno())


def free_memory() -> int:
    """Returns how many bytes this process may still allocate, given the machine's memory and the control groups' limits."""
    return min([*_free_in_machine(), *_free_in_cgroups()], default=0)


def _free_in_machine() -> Iterator[int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _free_in_cgroups(membership: str = "/proc/self/cgroup", mount: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yields the free memory of each control group around this process, version 1 or 2. Any of them may be the smallest."""
    try:
        lines = Path(membership).read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        limit, used = _CGROUP_V1_FILES if controllers else _CGROUP_V2_FILES
        innermost = root / name.lstrip("/")
        for group in (innermost, *innermost.parents):
            if not group.is_relative_to(root):
                break
            # A container may hide the files, and "max" means no limit.
            with suppress(OSError, ValueError):
                yield int((group / limit).read_text()) - int((group / used).read_text())

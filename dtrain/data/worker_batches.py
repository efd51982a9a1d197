"""Sends batches from a data worker to its rank, without /dev/shm.

torch sends tensors through files in /dev/shm. It often has 64 MB in a container, and writing past that kills the worker
or leaves the rank waiting. A small batch goes through the worker's pipe instead, a large one through an anonymous memory
file, which only the machine's memory limits.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any, NamedTuple

import torch

from dtrain.distributed.process_limit import start_error
from dtrain.errors import DtrainError

MAX_PIPE_BYTES = 1 << 16
ALIGNMENT = 64
NO_THREAD_CODE = 111
"""Exit code of a data worker that cannot start a thread."""


class WorkerDied(DtrainError):
    """A data worker has ended without an error message."""


class _Part(NamedTuple):
    """The place of one tensor in the packed bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class PackedBatch(NamedTuple):
    """A batch on its way.

    Attributes:
        parts: the tensors.
        others: values that are no tensors.
        size: number of packed bytes.
        content: the bytes, or the file descriptor of a memory file.
    """

    parts: list[_Part]
    others: dict[str, Any]
    size: int
    content: Any


def pack(batch: Mapping[str, Any]) -> PackedBatch:
    """Packs a batch in the worker."""
    parts: list[_Part] = []
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    size = 0
    for name, tensor in tensors.items():
        parts.append(_Part(name, tensor.dtype, tuple(tensor.shape), size))
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    others = {name: value for name, value in batch.items() if name not in tensors}
    file = None if size <= MAX_PIPE_BYTES else _memory_file(size)
    memory: Any = bytearray(size) if file is None else mmap.mmap(file, size)
    for part in parts:
        tensor = tensors[part.name].detach().contiguous()
        if tensor.numel():
            _view(memory, part).copy_(tensor)
    if file is None:
        return PackedBatch(parts, others, size, memory)
    content = reduction.DupFd(file)
    os.close(file)
    return PackedBatch(parts, others, size, content)


def unpack(packed: PackedBatch) -> dict[str, Any]:
    """Returns the batch in the rank. The tensors share the packed memory."""
    memory: Any = packed.content
    if packed.size and not isinstance(memory, bytearray):
        file = memory.detach()
        try:
            memory = mmap.mmap(file, packed.size)
        finally:
            os.close(file)
    return {**{part.name: _view(memory, part) for part in packed.parts}, **packed.others}


def exit_without_thread() -> None:
    """Ends a data worker that cannot start the thread that it sends batches with: it could send no error either."""
    try:
        probe = threading.Thread(target=int)
        probe.start()
        probe.join()
    except RuntimeError:
        os._exit(NO_THREAD_CODE)


def worker_death(error: BaseException) -> DtrainError | None:
    """Returns what to report instead of torch's error for a dead worker, which may come at any place; None for others."""
    if f"exited unexpectedly with exit code {NO_THREAD_CODE}." in f"{error} {error.__cause__}":
        return start_error()
    match = re.search(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)( is killed by signal: ([^.]+))?", str(error))
    if not isinstance(error, RuntimeError) or match is None:
        return None
    how = f"was killed ({match[3].strip()})" if match[3] else "exited without an error message"
    return WorkerDied(
        f"Data worker {match[1].strip()} {how}: by another process, or out of memory? Each of data.workers is a process that "
        "holds batches in memory; use fewer if memory is short."
    )


def _memory_file(size: int) -> int | None:
    """Returns the file descriptor of a new memory file; None where the system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        file = os.memfd_create("batch")
    except PermissionError:  # a sandbox forbids it
        return None
    os.posix_fallocate(file, 0, size)  # raises an error here; a page missing later would kill the process
    return file


def _view(memory: Any, part: _Part) -> torch.Tensor:
    count = 1
    for length in part.shape:
        count *= length
    if count == 0:
        return torch.empty(part.shape, dtype=part.dtype)
    return torch.frombuffer(memory, dtype=part.dtype, count=count, offset=part.offset).reshape(part.shape)

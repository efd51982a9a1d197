"""Batches from data workers arrive unchanged, and need no room in /dev/shm."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.data import worker_batches
from dtrain.data.batches import evaluation_batches
from dtrain.data.worker_batches import pack, unpack, worker_death
from dtrain.distributed.topology import SINGLE


class Rows:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, indices: list[int]) -> Any:
        return {"row": indices}


def batch_of(row: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(row)
    return {
        "pixels": torch.randn(3, 70, 200, generator=generator).transpose(0, 1),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "mask": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(row),
        "empty": torch.empty(2, 0),
        "text": "not a tensor",
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, str):
        return bool(one == other)
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))


@pytest.mark.parametrize("has_memory_files", [True, False])
def test_a_batch_is_unchanged(monkeypatch: pytest.MonkeyPatch, *, has_memory_files: bool) -> None:
    if not has_memory_files:
        monkeypatch.setattr(worker_batches, "_memory_file", lambda _size: None)
    sent = batch_of(1)

    received = unpack(pack(sent))

    assert received.keys() == sent.keys()
    assert all(same(sent[name], received[name]) for name in sent)


def test_workers_send_large_batches_unchanged_and_leave_no_open_files() -> None:
    open_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    received = [
        batch.tensors
        for batch in evaluation_batches(
            Rows(), lambda rows, _: batch_of(rows["row"][0]), SINGLE, micro_batch_size=1, lock_step=False, workers=2
        )
    ]

    assert all(same(batch_of(row)[name], batch[name]) for row, batch in enumerate(received) for name in batch)
    del received  # each batch holds one memory file
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= open_before + 1  # noqa: PTH208 - torch keeps one


SMALL_SHM = """
import sys, torch
from dtrain.data.batches import evaluation_batches
from dtrain.distributed.topology import SINGLE
from tests.data.test_worker_batches import Rows
collate = lambda rows, position: {"pixels": torch.ones(4 << 20)}
batches = evaluation_batches(Rows(), collate, SINGLE, micro_batch_size=1, lock_step=False, workers=int(sys.argv[1]))
print("sums", [int(batch.tensors["pixels"].sum()) for batch in batches])
"""


def in_small_shm(size: str, workers: int) -> subprocess.CompletedProcess[str]:
    mount = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$0" "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, sys.executable, "-c", SMALL_SHM, str(workers)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)


def may_mount() -> bool:
    mount = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    return (
        shutil.which("unshare") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace of its own")
def test_dev_shm_of_a_container_may_be_smaller_than_a_batch() -> None:
    """Three batches of 16 MiB in 1 MiB."""
    result = in_small_shm("1m", workers=2)

    assert result.stdout == f"sums {[4 << 20] * 3}\n", result.stderr


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace of its own")
def test_no_dev_shm_at_all_is_named() -> None:
    result = in_small_shm("4k", workers=2)

    assert "data.workers=2: the worker processes cannot be started" in result.stderr
    assert "docker run --shm-size" in result.stderr


def test_a_killed_worker_is_named() -> None:
    def die(_rows: Any, _position: Any) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(RuntimeError) as caught:
        list(evaluation_batches(Rows(), die, SINGLE, micro_batch_size=1, lock_step=False, workers=1))

    message = str(worker_death(caught.value))
    assert "was killed (Killed)" in message or "exited without an error message" in message
    assert "data.workers" in message
    assert worker_death(RuntimeError("another error")) is None

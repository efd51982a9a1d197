"""A checkpoint on a shared disk: each file is read by one rank, and rank 0 decides."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint import format as checkpoint_format
from dtrain.checkpoint import select
from dtrain.checkpoint.format import CONFIG, FORMAT, MANIFEST, STATE, manifest_text
from dtrain.checkpoint.verify_together import _deal
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import CheckpointError
from tests.support.contexts import placed
from tests.support.thread_ranks import run_thread_ranks


def write(folder: Path, files: dict[str, bytes], *, of: int) -> Path:
    """Writes a checkpoint of step 4 with these files of weights."""
    path = folder / "step-000004"
    path.mkdir(parents=True)
    contents = {STATE: b'{"seen": 1}', CONFIG: b"run: {}\n", **files}
    for name, data in contents.items():
        (path / name).write_bytes(data)
    entries = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in contents.items()}
    parts = {"parts": list(range(of)), "of": of} if of > 1 else {}
    manifest = {"format": FORMAT, "step": 4, "start": "a1", **parts, "files": entries}
    (path / MANIFEST).write_text(manifest_text(manifest))
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each file is read."""
    counts, lock, plain = Counter[str](), threading.Lock(), checkpoint_format.sha256

    def counted(file: Path) -> str:
        with lock:
            counts[file.name] += 1
        return plain(file)

    monkeypatch.setattr(checkpoint_format, "sha256", counted)
    return counts


def sharded(folder: Path, parts: int) -> Path:
    return write(folder, {f"shard-{part:05d}.safetensors": bytes(100 + part) for part in range(parts)}, of=parts)


def newest(folder: Path) -> Any:
    def work(context: RankContext) -> Any:
        found, damaged = select.newest(folder, placed(context, num_nodes=1, node_rank=0, local_rank=context.rank))
        if found is None:
            return None, sorted(damaged)
        own = [part for part, reader in enumerate(found.readers) if reader == context.rank]
        if found.saved is not None:
            assert found.saved.stored_parts[1] == own
            names = found.saved.manifest["files"]
            assert "model.safetensors" in names or all(f"shard-{part:05d}.safetensors" in names for part in own)
        else:
            assert own == []
        return found.readers, found.state

    return work


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_every_file_is_read_by_one_rank_which_also_reads_its_tensors(
    tmp_path: Path, hashed: Counter[str], ranks: int
) -> None:
    path = sharded(tmp_path, 8)

    found, received = run_thread_ranks(newest(tmp_path), ranks)

    assert set(hashed.values()) == {1}
    assert len(hashed) == 10
    readers, state = found[0]
    assert found == [(readers, state)] * ranks
    assert state == {"seen": 1}
    assert readers[0] == 0
    assert max(Counter(readers).values()) <= -(-8 // ranks) + 1
    assert max(received, default=0) < 40 * (path / MANIFEST).stat().st_size


def test_files_of_a_whole_model_are_shared_out_too(tmp_path: Path, hashed: Counter[str]) -> None:
    write(tmp_path, {"model.safetensors": bytes(500), "optimizer.safetensors": bytes(900)}, of=1)
    dealt = _deal(tmp_path / "step-000004", [0, 1], 2)

    found, _ = run_thread_ranks(newest(tmp_path), 2)

    assert [list(share["files"]) for share in dealt or ()] == [["optimizer.safetensors"], ["model.safetensors"]]
    assert found == [([0], {"seen": 1})] * 2
    assert set(hashed.values()) == {1}


def test_damage_that_another_rank_finds_is_confirmed_by_rank_0(tmp_path: Path, hashed: Counter[str]) -> None:
    path = sharded(tmp_path, 8)
    (path / "shard-00005.safetensors").write_bytes(b"x" * 105)

    found, _ = run_thread_ranks(newest(tmp_path), 4)

    assert found == [(None, [4])] * 4
    assert (tmp_path / "damaged-step-000004").is_dir()
    assert hashed.pop("shard-00005.safetensors") == 2
    assert set(hashed.values()) == {1}


def test_a_rank_with_a_stale_view_of_the_disk_does_not_lose_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path, 8)
    from dtrain.checkpoint import verify_together

    plain = verify_together.is_intact
    monkeypatch.setattr(
        verify_together, "is_intact", lambda file, entry: "00005" not in file.name and plain(file, entry)
    )

    found, _ = run_thread_ranks(newest(tmp_path), 4)

    assert {state["seen"] for _, state in found} == {1}
    assert found[0][0][5] == 0, "the rank that saw it does not read that part"
    assert (tmp_path / "step-000004").is_dir()


def test_a_named_checkpoint_is_shared_out_and_its_damage_named_on_every_rank(
    tmp_path: Path, hashed: Counter[str]
) -> None:
    path = sharded(tmp_path, 4)

    def chosen(context: RankContext) -> Any:
        single = placed(context, num_nodes=1, node_rank=0, local_rank=context.rank)
        try:
            return select.at(path, single, setting="checkpoint.resume").readers
        except CheckpointError as error:
            return str(error)

    found, _ = run_thread_ranks(chosen, 4)
    assert set(hashed.values()) == {1}
    assert len({json.dumps(readers) for readers in found}) == 1

    (path / "shard-00003.safetensors").unlink()
    messages, _ = run_thread_ranks(chosen, 4)
    assert set(messages) == {messages[0]}
    assert "shard-00003.safetensors is missing" in messages[0]

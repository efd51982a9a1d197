"""Checkpoint folders on disk: written atomically, damage is detected, old ones are removed. No torch, no process."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint import format
from dtrain.checkpoint.format import (
    DamagedCheckpointError,
    OtherFormatError,
    UnreadableCheckpointError,
    list_checkpoints,
    manifest_text,
    verify,
)
from dtrain.checkpoint.publish import StagedTensor, WriteRequest, clear_drafts, publish
from dtrain.checkpoint.staging_buffer import _free_in_cgroups

BUFFER = bytes(range(256)) * 4
TENSORS = [
    StagedTensor("model", "a", "F32", [4, 8], 0, 128),
    StagedTensor("model", "b", "F32", [16], 128, 64),
    StagedTensor("optimizer", "exp_avg/a", "F32", [4, 8], 192, 128),
]


def build_request(checkpoints: Path, step: int, **changes: Any) -> WriteRequest:
    made = WriteRequest(
        checkpoints=str(checkpoints),
        step=step,
        nonce="n",
        tensors=TENSORS,
        texts={"state.json": json.dumps({"run": {"step": step}})},
        manifest_fields={"world_size": 1},
        max_file_bytes=10**9,
        keep=2,
        protected=[],
    )
    return replace(made, **changes)


def write(checkpoints: Path, step: int, **changes: Any) -> Path:
    publish(build_request(checkpoints, step, **changes), {"config.json": b"{}"}, memoryview(BUFFER))
    return checkpoints / f"step-{step:06d}"


def test_the_safetensors_library_reads_the_written_files(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    saved = verify(write(tmp_path, 7))

    assert (saved.step, saved.state) == (7, {"run": {"step": 7}})
    assert sorted(saved.manifest["files"]) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    weights = load_file(saved.path / "model.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {"a": (4, 8), "b": (16,)}
    assert weights["b"].tobytes() == BUFFER[128:192]
    assert load_file(saved.path / "optimizer.safetensors")["exp_avg/a"].tobytes() == BUFFER[192:320]
    assert (saved.path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_large_files_are_split_and_an_index_lists_the_parts(tmp_path: Path) -> None:
    path = write(tmp_path, 1, max_file_bytes=150)

    assert sorted(file.name for file in path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer.safetensors",
    ]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    assert index["metadata"]["total_size"] == 192
    verify(path)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (
        lambda path: flip(path / "model.safetensors", -1),
        "model.safetensors has the right size but its contents changed",
    ),
    "cut": (
        lambda path: os.truncate(path / "optimizer.safetensors", 99),
        "optimizer.safetensors has 99 bytes, expected",
    ),
    "missing": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "state flipped": (
        lambda path: flip(path / "state.json", 3),
        "state.json has the right size but its contents changed",
    ),
    "manifest flipped": (lambda path: flip(path / "manifest.json", 40), "manifest.json is not as it was written"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "no JSON": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not as it was written"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_detected_and_the_file_is_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, 3)
    damage, message = DAMAGES[kind]

    damage(path)

    with pytest.raises(DamagedCheckpointError, match=message) as raised:
        verify(path)
    assert not isinstance(raised.value, UnreadableCheckpointError)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "optimizer.safetensors"])
@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_file_is_not_opened(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 3)
    (path / name).unlink()
    os.mkfifo(path / name)

    with pytest.raises(DamagedCheckpointError, match=f"{name} is not a regular file"):
        verify(path)


def test_a_checkpoint_with_another_steps_name_is_damaged(tmp_path: Path) -> None:
    moved = write(tmp_path, 3).rename(tmp_path / "step-000009")

    with pytest.raises(DamagedCheckpointError, match="says that this is step 3"):
        verify(moved)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, UnreadableCheckpointError),
        (errno.EMFILE, UnreadableCheckpointError),
        (errno.ESTALE, UnreadableCheckpointError),
        (errno.EIO, DamagedCheckpointError),
    ],
)
def test_read_errors_that_may_be_temporary_do_not_count_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[DamagedCheckpointError]
) -> None:
    path = write(tmp_path, 3)

    def fails(_path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(format, "sha256", fails)
    with pytest.raises(DamagedCheckpointError, match=os.strerror(number)) as raised:
        verify(path)

    assert type(raised.value) is kind


def test_every_flipped_bit_of_the_manifest_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    intact = (path / "manifest.json").read_bytes()
    parsed = json.loads(intact)

    for at in range(len(intact)):
        (path / "manifest.json").write_bytes(intact)
        flip(path / "manifest.json", at)
        try:
            verify(path)
        except DamagedCheckpointError:
            continue
        assert json.loads((path / "manifest.json").read_bytes()) == parsed, (
            f"byte {at} was changed without being detected"
        )


def test_a_path_outside_the_folder_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 3)
    outside = tmp_path / "secret"
    outside.write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["self"]
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}

    (path / "manifest.json").write_text(manifest_text(manifest))

    with pytest.raises(
        DamagedCheckpointError, match=r"lists '\.\./\.\./secret', which is not a valid name of a checkpoint file"
    ):
        verify(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parts": [0], "of": 10**11}, "says that the checkpoint has 100000000000 parts"),
        ({"parts": [0], "of": "2"}, "says that the checkpoint has '2' parts"),
        ({"parts": [0], "of": True}, "says that the checkpoint has True parts"),
        ({"parts": [0], "of": 0}, "says that the checkpoint has 0 parts"),
        ({"parts": [0, 7], "of": 2}, r"lists the parts \[0, 7\], where the checkpoint has parts 0 to 1"),
        ({"parts": "0", "of": 2}, "lists the parts '0'"),
        ({"parts": [[0]], "of": 2}, r"lists the parts \[\[0\]\]"),
    ],
)
def test_an_impossible_number_of_parts_is_damage(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write(tmp_path, 3, manifest_fields=fields)  # with a valid hash of itself

    with pytest.raises(DamagedCheckpointError, match=message):
        verify(path)


@pytest.mark.parametrize("content", ["[" * 50_000 + "]" * 50_000, '{"self": ' + "9" * 5000 + "}"])
def test_a_manifest_that_python_cannot_read_is_damage(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, 3)
    (path / "manifest.json").write_text(content)

    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is not as it was written"):
        verify(path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def test_a_pickle_in_the_folder_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    for name in ("optimizer.pt", "pytorch_model.bin", "state.pkl", ".metadata"):
        (path / name).write_bytes(pickle.dumps(Bomb()))

    assert verify(path).step == 3


@pytest.mark.parametrize("has_other_fields", [False, True])
def test_another_format_version_is_not_damage_whatever_its_manifest_holds(
    tmp_path: Path, *, has_other_fields: bool
) -> None:
    path = write(tmp_path, 3, manifest_fields={"format": "dtrain-checkpoint-9", "versions": {"dtrain": "4.5"}})
    if has_other_fields:
        manifest = {"format": "dtrain-checkpoint-9", "versions": {"dtrain": "4.5"}, "shards": [], "digest": "blake3"}
        (path / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(OtherFormatError, match=r"in the format dtrain-checkpoint-9 by dtrain 4\.5, and this version"):
        verify(path)


def test_a_format_that_no_version_writes_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, 3, manifest_fields={"format": "dtrain-chgckpoint-1"})

    with pytest.raises(DamagedCheckpointError, match="is not as it was written"):
        verify(path)


def test_the_newest_and_the_protected_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step, keep=2, protected=[2])

    assert list(list_checkpoints(tmp_path)) == [6, 5, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000005", "step-000006"]


def test_drafts_and_damaged_folders_are_not_listed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".tmp-step-000002", "damaged-step-000003", ".old-step-000001", "step-x", "left-step-000009"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000008").write_text("a file")

    assert list(list_checkpoints(tmp_path)) == [1]

    clear_drafts(tmp_path)
    assert not (tmp_path / ".tmp-step-000002").exists()
    assert not (tmp_path / ".old-step-000001").exists()
    assert (tmp_path / "damaged-step-000003").exists()
    assert list(list_checkpoints(tmp_path / "nothing")) == []


def test_a_failed_write_leaves_no_draft_and_the_older_checkpoint_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    real = os.write

    def full(handle: int, data: Any) -> int:
        if os.fstat(handle).st_size > 100:
            raise OSError(28, "No space left on device")
        return real(handle, data[:64])

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="No space left on device") as failed:
        write(tmp_path, 2)
    monkeypatch.undo()

    assert str(failed.value.filename).endswith("model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    verify(tmp_path / "step-000001")


def shard(part: int, **changes: Any) -> dict[str, Any]:
    tensors = [StagedTensor(f"shard-{part:05d}", f"value/a@{part}", "F32", [4, 8], 0, 128)]
    return {"tensors": tensors, "part": part, "manifest_fields": {"parts": [0, 1], "of": 2, "start": "n"}, **changes}


def test_a_failed_part_is_removed_and_its_error_reaches_the_publisher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = os.write, []

    def once_full(handle: int, data: Any) -> int:
        if not full and len(data) > 60:
            full.append(handle)
            raise OSError(28, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr("os.write", once_full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, 2, **shard(1))
    monkeypatch.undo()
    (draft,) = tmp_path.iterdir()
    assert [file.name for file in draft.iterdir()] == ["part-1"]

    with pytest.raises(OSError, match=r"rank 1 could not write its part: .*No space left on device"):
        write(tmp_path, 2, **shard(0, local_parts=[0, 1]))

    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_a_file_name_that_no_reader_accepts(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a valid name of a checkpoint file"):
        publish(build_request(tmp_path, 2), {".hidden": b""}, memoryview(BUFFER))

    assert list(tmp_path.iterdir()) == []


def test_partial_writes_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = verify(write(tmp_path / "one", 1))
    real = os.write
    monkeypatch.setattr("os.write", lambda handle, data: real(handle, data[:7]))

    other = verify(write(tmp_path / "other", 1))

    assert other.manifest == one.manifest


# Memory


@pytest.mark.parametrize(
    ("membership", "root", "limit", "used"),
    [
        ("0::/slurm/job_7/step_0\n", "", "memory.max", "memory.current"),
        (
            "9:cpu,cpuacct:/elsewhere\n4:memory:/slurm/job_7/step_0\n",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_free_memory_of_every_control_group_is_reported(
    tmp_path: Path, membership: str, root: str, limit: str, used: str
) -> None:
    groups = tmp_path / root
    for name, most in (("slurm", "max"), ("slurm/job_7", "1000"), ("slurm/job_7/step_0", "5000")):
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / limit).write_text(most)
        (groups / name / used).write_text("400")
    (tmp_path / "cgroup").write_text(membership)

    assert sorted(_free_in_cgroups(str(tmp_path / "cgroup"), tmp_path)) == [600, 4600]

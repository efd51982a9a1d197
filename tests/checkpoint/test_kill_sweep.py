"""A writer killed at every write, flush and rename leaves the old checkpoint or the new one, never a mixture.

A kill leaves what the system holds in memory; a power cut does not. The tests simulate both: at the fatal moment, data
that was written but not flushed is kept, or cut to half. Broken writers and readers must fail the same sweep.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint import publish as publish_module
from dtrain.checkpoint.format import (
    FORMAT,
    DamagedCheckpointError,
    SavedCheckpoint,
    list_checkpoints,
    manifest_text,
    verify,
)
from dtrain.checkpoint.publish import StagedTensor, WriteRequest, clear_drafts, publish

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

ROOT = Path(__file__).resolve().parents[2]
KILLED = 9
OLD, NEW = 2, 4
SIZE = 400


def buffer_of(step: int) -> bytes:
    return bytes([step]) * SIZE * 6


def build_request(checkpoints: Path, step: int) -> WriteRequest:
    return WriteRequest(
        checkpoints=str(checkpoints),
        step=step,
        nonce="n",
        tensors=[
            StagedTensor(stem, f"{stem}-{n}", "U8", [SIZE], SIZE * n, SIZE)
            for n in range(3)
            for stem in ("model", "optimizer")
        ],
        texts={"state.json": json.dumps({"run": {"step": step}}), "config.yaml": f"step: {step}\n"},
        manifest_fields={"world_size": 1},
        max_file_bytes=SIZE,
        keep=1,
        protected=[],
    )


def write(checkpoints: Path, step: int) -> None:
    publish(build_request(checkpoints, step), {"config.json": b"{}"}, memoryview(buffer_of(step)))


def write_after_the_rename(checkpoints: Path, step: int) -> None:
    """Broken: the folder gets its final name before its contents exist, and nothing is flushed."""
    request, target = build_request(checkpoints, step), checkpoints / f"step-{step:06d}"
    target.mkdir()

    def put(name: str, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        content = b"".join(bytes(part) for part in parts)
        handle = os.open(target / name, os.O_WRONLY | os.O_CREAT)
        for start in range(0, len(content), 100):
            left = content[start : start + 100]
            while left:
                left = left[os.write(handle, left) :]
        os.close(handle)
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    files = {name: put(name, [text.encode()]) for name, text in request.texts.items()}
    for name, tensors in publish_module._tensor_files(request):
        files[name] = put(name, publish_module._safetensors(tensors, memoryview(buffer_of(step))))
    put("manifest.json", [manifest_text({"format": FORMAT, "step": step, "files": files}).encode()])
    publish_module.remove_old(checkpoints, keep=1, protected=[])


class Fatal:
    """Counts file system calls and ends the process immediately at the n-th."""

    def __init__(self, at: int, *, power_cut: bool) -> None:
        self._left, self._power_cut = at, power_cut
        self._unflushed: dict[int, str] = {}
        self.count = 0

    def install(self) -> None:
        for module, name in (
            (os, "write"),
            (os, "fsync"),
            (os, "rename"),
            (os, "mkdir"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            setattr(module, name, self._counted(getattr(module, name), name))

    def _counted(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self._left:
                self._die()
            if name == "write":
                self._unflushed[arguments[0]] = str(Path(f"/proc/self/fd/{arguments[0]}").readlink())
                arguments = (arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])  # Writes only a part of it.
            done = real(*arguments, **options)
            if name == "fsync":
                self._unflushed.pop(arguments[0], None)
            return done

        return call

    def _die(self) -> None:
        for path in self._unflushed.values() if self._power_cut else ():
            file = Path(path)
            if file.exists():
                os.truncate(file, file.stat().st_size // 2)
        os._exit(KILLED)


def killed(work: Callable[[], None], at: int, *, power_cut: bool) -> bool:
    """Runs `work` in a child process. Returns whether it was killed at that call; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Fatal(at, power_cut=power_cut).install()
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the writer failed with {code} at {at}"
    return code == KILLED


def newest_intact(checkpoints: Path) -> SavedCheckpoint | None:
    for path in list_checkpoints(checkpoints).values():
        try:
            return verify(path)
        except DamagedCheckpointError:
            continue
    return None


def newest_unchecked(checkpoints: Path) -> SavedCheckpoint | None:
    """Broken: trusts the newest folder without a check."""
    for step, path in list_checkpoints(checkpoints).items():
        return SavedCheckpoint(path, step, {"files": [file.name for file in path.iterdir()]}, {"run": {"step": step}})
    return None


def is_of(saved: SavedCheckpoint, step: int) -> bool:
    """Returns whether every byte is of that step."""
    tensors = [name for name in saved.manifest["files"] if name.endswith(".safetensors")]
    contents = [(saved.path / name).read_bytes()[-SIZE:] for name in tensors]
    return len(tensors) == 6 and all(content == bytes([step]) * SIZE for content in contents)


def sweep(
    folder: Path, write: Callable[[Path, int], None], read: Callable[[Path], SavedCheckpoint | None], *, power_cut: bool
) -> tuple[int, list[str]]:
    """Kills at every call. Returns the number of calls, and what was wrong afterwards."""
    wrong = []
    for at in range(1, 1000):
        checkpoints = folder / f"{at}"
        checkpoints.mkdir(parents=True)
        publish(build_request(checkpoints, OLD), {"config.json": b"{}"}, memoryview(buffer_of(OLD)))
        was_killed = killed(partial(write, checkpoints, NEW), at, power_cut=power_cut)
        clear_drafts(checkpoints)
        saved = read(checkpoints)
        if saved is None or saved.step not in (OLD, NEW) or not is_of(saved, saved.step):
            wrong.append(f"killed at {at}: {saved}")
        shutil.rmtree(checkpoints)
        if not was_killed:
            return at - 1, wrong
    raise AssertionError("the writer never ended")


def sweep_in_a_process(
    folder: Path, write: Callable[[Path, int], None], read: Callable[[Path], SavedCheckpoint | None], *, power_cut: bool
) -> tuple[int, list[str]]:
    """`sweep` in a process that is small: to fork one that has run hundreds of tests costs ten times as much."""
    program = (
        "import json, sys; from pathlib import Path; from tests.checkpoint import test_kill_sweep as it\n"
        "folder, write, read, power_cut = json.loads(sys.argv[1])\n"
        "print(json.dumps(it.sweep(Path(folder), getattr(it, write), getattr(it, read), power_cut=power_cut)))"
    )
    told = json.dumps([str(folder), write.__name__, read.__name__, power_cut])
    ended = subprocess.run([sys.executable, "-c", program, told], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    moments, wrong = json.loads(ended.stdout)
    return moments, wrong


@pytest.fixture
def folder(memory_path: Callable[[str], Path]) -> Path:
    return memory_path("sweep")


@pytest.mark.parametrize("power_cut", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_writer_killed_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(folder: Path, power_cut: bool) -> None:
    num_calls, wrong = sweep_in_a_process(folder, write, newest_intact, power_cut=power_cut)

    assert wrong == []
    assert num_calls >= 40


@pytest.mark.slow
def test_a_writer_that_renames_before_it_flushes_is_caught(folder: Path) -> None:
    _, wrong = sweep_in_a_process(folder, write_after_the_rename, newest_intact, power_cut=True)

    assert wrong


@pytest.mark.slow
def test_a_reader_that_ignores_the_manifest_is_caught(folder: Path) -> None:
    _, wrong = sweep_in_a_process(folder, write_after_the_rename, newest_unchecked, power_cut=False)

    assert wrong

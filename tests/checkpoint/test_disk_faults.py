"""Checkpoints when the disk fills up or the writer process dies."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dtrain.checkpoint.format import list_checkpoints, verify
from tests.support import jobs

pytestmark = pytest.mark.launchers

STEPS = {"train__max_steps": 100000, "train__log_every": 1, "checkpoint__every": 10, "checkpoint__keep": 1}
DISK = 4 * 2**20
"""Size in bytes. A checkpoint of the tiny model has 280,000."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a small file system."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"needs the right to mount a small disk: {made.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Writes a file that leaves that many bytes free."""
    filler = disk / "filler"
    stat = os.statvfs(disk)
    with filler.open("wb") as out:
        out.write(bytes(stat.f_bavail * stat.f_frsize - leave))
    return filler


def occupy(filler: Path) -> None:
    """Fills all free space, even while others write and remove files."""
    with filler.open("ab", buffering=0) as out, suppress(OSError):
        while out.write(bytes(4096)) == 4096:
            pass


def test_a_full_disk_is_a_fault_and_training_continues_with_the_old_checkpoint(disk: Path) -> None:
    run = disk / "runs" / "run"
    with jobs.started([*jobs.forked(), *jobs.settings(disk / "runs", "run", **STEPS)]) as job:
        job.wait_for("  loss ")
        assert jobs.until(lambda: bool(list_checkpoints(run / "checkpoints")) or job.has_ended()), job.text
        filler = disk / "filler"

        def has_failed() -> bool:
            occupy(filler)  # Repeated, because removing an old checkpoint frees space for a new one.
            return "Training continues" in job.text

        assert jobs.until(has_failed), job.text
        at = max(list_checkpoints(run / "checkpoints"))
        verify(run / "checkpoints" / f"step-{at:06d}")
        filler.unlink()
        jobs.until(lambda: max(list_checkpoints(run / "checkpoints"), default=0) > at)
        os.kill(job.process.pid, signal.SIGTERM)
        job.end()

    fault = jobs.read_events(run, "fault")[0]
    assert fault["kind"] == "checkpoint"
    assert "No space left on device" in fault["message"]
    assert jobs.exit_of(run)["code"] == 75
    assert any(line.startswith("warning: step-") and "No space left on device" in line for line in job.said)


def test_a_disk_without_room_for_checkpoints_is_reported_before_the_first_step(disk: Path) -> None:
    fill(disk, leave=500_000)

    job = jobs.run([*jobs.python(), *jobs.settings(disk / "runs", "run", **STEPS)])

    assert job.process.returncode == 6
    assert "checkpoint.keep=1 checkpoints and the next one need" in job.said[-1]
    assert not any("  loss " in line for line in job.out)


FSYNC_FAILS = f"""
import sys
sys.path.insert(0, {str(jobs.ROOT)!r})
from dtrain import main
from dtrain.checkpoint import writer_process

writer_process._START = '''
import os
def fsync(handle):
    place = os.readlink("/proc/self/fd/%d" % handle)
    if "step-000020" in place and place.endswith(".safetensors"):
        raise OSError(5, "Input/output error")
    real(handle)
real, os.fsync = os.fsync, fsync
''' + writer_process._START
main.console_script()
"""


@pytest.mark.slow
def test_an_fsync_that_fails_is_a_fault_and_the_next_checkpoint_is_tried(tmp_path: Path) -> None:
    script = tmp_path / jobs.SCRIPT
    script.write_text(FSYNC_FAILS)
    run = tmp_path / "runs" / "run"

    settings = {**STEPS, "train__max_steps": 35, "checkpoint__keep": 10}
    job = jobs.run([*jobs.forked_script(script), *jobs.settings(tmp_path / "runs", "run", **settings)])

    assert job.process.returncode == 0, job.text
    (fault,) = jobs.read_events(run, "fault")
    assert (fault["kind"], fault["step"]) == ("checkpoint", 20)
    assert "model.safetensors: Input/output error" in fault["message"]
    assert sum("Input/output error. Training continues" in line for line in job.said) == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000010",
        "step-000030",
        "step-000035",
    ]


def test_a_read_only_folder_is_reported_before_any_work(disk: Path) -> None:
    settings = jobs.settings(disk / "runs", "run", **STEPS)  # Writes the data there.
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    job = jobs.run([*jobs.forked(), *settings])

    assert job.process.returncode != 0
    last = job.said[-1]
    assert str(disk / "runs") in last
    assert "Read-only file system" in last
    assert sum("Read-only file system" in line for line in job.said) == 1


@pytest.mark.slow
def test_a_killed_writer_ends_the_run_and_is_named(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    with jobs.started([*jobs.forked(), *jobs.settings(tmp_path / "runs", "run", **STEPS)]) as job:
        job.wait_for("  loss ")
        assert jobs.until(lambda: bool(list_checkpoints(run / "checkpoints")) or job.has_ended()), job.text
        (writer,) = [pid for pid, words in job.members().items() if any("writer_process" in word for word in words)]
        os.kill(writer, signal.SIGKILL)
        job.end()

    ended = jobs.exit_of(run)
    assert (ended["code"], ended["cause"], ended["rank"]) == (6, "CheckpointError", 0)
    assert ended["message"].startswith(f"The process that writes checkpoints was killed by SIGKILL (process {writer})")

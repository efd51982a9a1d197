"""A rank ends with its launcher. The launchers are stand-ins: a program of that name that starts what it is told to."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtrain.distributed.launcher_process import find_ancestors

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")]

STARTS_A_COMMAND = "import subprocess, sys; sys.exit(subprocess.Popen(sys.argv[1:]).wait())"

RANK = """
import os, sys, threading
from pathlib import Path
from dtrain.distributed.topology import Topology
from dtrain.job.launcher_watch import exit_with_launcher
def on_death(cause):
    Path(sys.argv[2]).write_text(str(cause))
    if sys.argv[3:] == ["hang"]:
        threading.Event().wait()
exit_with_launcher(Topology(0, 2, 0, 2, 0, 1, sys.argv[1], "127.0.0.1", 1), on_death)
print(os.getpid(), flush=True)
threading.Event().wait()
"""


@dataclass
class Job:
    """A launcher, the rank at the end of what it started, and where that rank leaves the cause."""

    launcher: subprocess.Popen[str]
    rank: int
    cause: Path

    def rank_ends_within(self, seconds: float) -> bool:
        try:
            handle = os.pidfd_open(self.rank)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)

    def end(self) -> None:
        self.launcher.kill()
        if not self.rank_ends_within(0):
            os.kill(self.rank, signal.SIGKILL)
        self.launcher.communicate(timeout=10)


def _start(folder: Path, name: str, *, between: tuple[str, ...] = (), says: str = "", kind: str | None = None) -> Job:
    program, words = folder / name, folder / f"words-{time.monotonic_ns()}"
    program.write_text(STARTS_A_COMMAND)
    rank = [sys.executable, "-c", RANK, kind or name, str(words), *says.split()]
    launcher = subprocess.Popen(
        [sys.executable, str(program), *between, *rank],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert launcher.stdout is not None
    return Job(launcher, int(launcher.stdout.readline()), words)


def test_a_rank_ends_within_5_s_of_its_launchers_death_and_says_why(tmp_path: Path) -> None:
    shell = ("/bin/sh", "-c", '"$@"; true', "sh")
    launch_py = (sys.executable, "-c", STARTS_A_COMMAND)
    jobs = {
        "parent": _start(tmp_path, "torchrun"),
        "behind a shell": _start(tmp_path, "torchrun", between=shell),
        "runner above launch.py": _start(tmp_path, "deepspeed", between=launch_py),
        "stopped": _start(tmp_path, "mpirun", kind="openmpi"),
        "a report that never ends": _start(tmp_path, "slurmstepd", says="hang", kind="slurm"),
    }
    try:
        os.kill(jobs["stopped"].rank, signal.SIGSTOP)
        begin = time.monotonic()
        for job in jobs.values():
            job.launcher.kill()
        # The last one waits 3 s for its report; what is promised of it is that it ends at all.
        limits = [5.0] * (len(jobs) - 1) + [10.0]
        ended = {
            name: job.rank_ends_within(max(0.0, begin + limit - time.monotonic()))
            for (name, job), limit in zip(jobs.items(), limits, strict=True)
        }
        words = {name: job.cause.read_text() if ended[name] else "" for name, job in jobs.items()}
    finally:
        for job in jobs.values():
            job.end()

    assert ended == dict.fromkeys(jobs, True)
    for name, said in words.items():
        assert f"process {jobs[name].launcher.pid} (" in said
        assert "The launcher (" in said
    assert "The launcher (deepspeed) has died" in words["runner above launch.py"]


def test_a_rank_started_by_hand_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    job = _start(tmp_path, "bash", kind="env")
    try:
        job.launcher.kill()
        job.launcher.wait()
        assert not job.rank_ends_within(1.5), "nothing watches: there is no launcher"
    finally:
        job.end()


def test_a_dead_process_that_nobody_has_collected_counts_as_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        ours = next(iter(find_ancestors(child.pid, launcher="no such launcher")))
        assert (ours.pid, ours.is_running) == (os.getpid(), True)
        assert not ours._replace(started="1").is_running, "the same number, but another process"
        itself = ours._replace(
            pid=child.pid, started=Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        )
        assert itself.is_running
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not itself.is_running

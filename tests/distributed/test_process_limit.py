"""The limit of processes and threads is checked at the start, and named where it is hit."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.distributed import bounded, process_limit
from dtrain.distributed.process_limit import (
    _container_limit,
    check_process_limit,
    process_limit_error,
)
from dtrain.errors import TopologyError
from dtrain.job.failure import for_user
from tests.support import jobs

USER = 61_999
"""A user without any other process, so that a limit means the same on every machine."""


class PanicException(BaseException):
    """Like that of Rust libraries, which is no Exception."""


@pytest.mark.parametrize(
    ("error", "is_limit"),
    [
        (RuntimeError("can't start new thread"), True),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n...can't start new thread"), True),
        (RuntimeError("Resource temporarily unavailable"), True),
        (
            PanicException('ThreadPoolBuildError { kind: IOError(Os { code: 11, kind: WouldBlock, message: "..." }) }'),
            True,
        ),
        (RuntimeError("another"), False),
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), "a file"), False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
    ],
)
def test_an_error_that_says_only_that_nothing_can_be_started_names_the_limits(
    error: BaseException, is_limit: bool
) -> None:
    limit = process_limit_error(error)

    assert (limit is not None) == is_limit
    assert for_user(error) is not error or not is_limit
    if limit is not None:
        assert limit.exit_code == 4
        assert "Raise it: " in str(limit)
        assert "OMP_NUM_THREADS=1, fewer data.workers, fewer ranks" in str(limit)


def test_the_smallest_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    proc = tmp_path / "proc" / "self"
    proc.mkdir(parents=True)
    group = tmp_path / "sys" / "fs" / "cgroup" / "user.slice" / "job"
    group.mkdir(parents=True)
    old = tmp_path / "sys" / "fs" / "cgroup" / "pids" / "job"
    old.mkdir(parents=True)
    assert _container_limit(tmp_path) is None

    (proc / "cgroup").write_text("0::/user.slice/job\n")
    (group / "pids.max").write_text("max\n")
    assert _container_limit(tmp_path) is None
    (group.parent / "pids.max").write_text("700\n")
    assert _container_limit(tmp_path) == 700

    (proc / "cgroup").write_text("5:pids:/job\n0::/user.slice/job\n")
    (old / "pids.max").write_text("90\n")
    assert _container_limit(tmp_path) == 90


@pytest.mark.parametrize(
    ("env", "available", "outcome"),
    [
        ({"OMP_NUM_THREADS": "4"}, 10, "needs 11 of them, 4 for computing"),
        ({"OMP_NUM_THREADS": "1"}, 7, "needs 8 of them, 1 for computing"),
        ({"OMP_NUM_THREADS": "1"}, 8, "libraries get one thread"),
        ({"OMP_NUM_THREADS": "1"}, 600, "enough"),
        ({}, 8 + 3, "needs 15 of them, 8 for computing"),  # 16 cores for 2 ranks
        ({}, 15 + 16, "enough"),
    ],
)
def test_a_rank_needs_threads_for_computing_and_libraries_get_fewer_if_they_are_short(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], available: int, outcome: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    monkeypatch.setattr(process_limit, "_count_available", lambda wanted: min(wanted, available))
    variables = dict(env)

    if outcome.startswith("needs"):
        with pytest.raises(TopologyError, match=outcome):
            check_process_limit(variables, local_world_size=2)
        return
    check_process_limit(variables, local_world_size=2)

    few = {"OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    assert variables == {**env, **(few if outcome != "enough" else {})}


def test_work_without_a_thread_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)

    assert bounded.call_with_timeout(lambda: 3, 1.0, None) == 3
    assert bounded.call_with_timeout(lambda: 1 // 0, 1.0, "default") == "default"


# ---------------------------------------------------------------- as an ordinary user


def as_user(limit: int, *command: str) -> list[str]:
    """The command as an ordinary user who may run so many processes and threads; may read what root may read."""
    caps = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *caps]
    return [*user, "prlimit", f"--nproc={limit}:{limit}", *command]


def may_be_another_user() -> bool:
    if os.geteuid() or not (shutil.which("setpriv") and shutil.which("prlimit")):
        return False
    done = subprocess.run(as_user(50, sys.executable, "-c", ""), capture_output=True, check=False)
    return done.returncode == 0


needs_user = pytest.mark.skipif(not may_be_another_user(), reason="needs root, setpriv and prlimit: root has no limit")


def run_limited(tmp_path: Path, limit: int, command: list[str]) -> jobs.Job:
    for folder in (tmp_path.parent.parent, tmp_path.parent):
        folder.chmod(0o755)
    tmp_path.chmod(0o777)
    for file in (tmp_path / "made").rglob("*"):
        file.chmod(0o755)
    env = {"HOME": str(tmp_path), "USER": "somebody", "PYTHONDONTWRITEBYTECODE": "1"}
    return jobs.run(as_user(limit, *command), env=env)


@needs_user
@pytest.mark.commands
@pytest.mark.parametrize("limit", [1, 9, 10, 11])
def test_a_user_who_may_start_few_processes_is_told_so(tmp_path: Path, limit: int) -> None:
    settings = jobs.settings(tmp_path / "runs", "run", checkpoint__every="1", data__workers="1")

    job = run_limited(tmp_path, limit, [*jobs.python(), *settings])

    assert "Traceback" not in job.text
    if limit > 9 and job.process.returncode == 0:  # what a run needs at least depends on versions of libraries
        return
    assert job.process.returncode == 4, job.text
    errors = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.text
    assert f"the limit of this user's processes and threads is {limit} (ulimit -u)" in errors[0]
    assert "docker run --ulimit nproc" in errors[0]


@needs_user
@pytest.mark.launchers
@pytest.mark.slow
@pytest.mark.parametrize("limit", [14, 18])
def test_ranks_of_a_user_who_may_start_few_processes_end_in_good_order(tmp_path: Path, limit: int) -> None:
    settings = jobs.settings(tmp_path / "runs", "run", checkpoint__every="1")

    job = run_limited(tmp_path, limit, [*jobs.torchrun(), *settings])

    assert job.process.returncode != 0
    ours = job.text.split("torch.distributed.elastic")[0].split('Traceback (most recent call last):\n  File "/')
    assert "ulimit -u" in ours[0], job.text

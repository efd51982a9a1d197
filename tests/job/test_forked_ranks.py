"""Ranks that dtrain forks itself (`--ranks`): how they start, start again and end, and what their launcher says."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest

from dtrain.job.forked_ranks import other_threads
from tests.support import jobs

launchers = pytest.mark.launchers


# ---------------------------------------------------------------- without dtrain's ranks


def launched(tmp_path: Path, rank: str, *, ranks: int = 2, restarts: int = 0, limits_s: float = 5.0) -> jobs.Job:
    """Runs a launcher whose ranks run the given code instead of a command; `exit_json(code, cause)` writes exit.json."""
    script = tmp_path / "launches.py"
    script.write_text(
        f"""
import json, os, signal, sys, time
from pathlib import Path
from dtrain import console
from dtrain.job import forked_ranks
forked_ranks.SETTLE_S = forked_ranks.TERM_S = forked_ranks.LINGER_S = {limits_s}
from dtrain.job.rank_launcher import RankLaunch, run_ranks
console.configure_logging(rank=0, world_size=1)
file = Path({str(tmp_path / "exit.json")!r})
def exit_json(code, cause, rank=0):
    file.write_text(json.dumps(dict(code=code, cause=cause, rank=rank, host="here", message=cause + " happened")))
def run_rank():
    rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
{rank}
sys.exit(run_ranks(RankLaunch({ranks}, {restarts}, file, lambda: None, run_rank), os.environ))
"""
    )
    return jobs.run([sys.executable, str(script)], env={"PYTHONPATH": str(jobs.ROOT)})


def test_ranks_get_torchruns_variables_a_session_each_and_the_masters_socket(tmp_path: Path) -> None:
    job = launched(
        tmp_path,
        """
    import socket
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR".split()
    assert [os.environ[name] for name in names] == [str(rank), str(rank), "2", "2", "0", "1", "127.0.0.1"]
    assert os.getsid(0) == os.getpid() and os.environ["DTRAIN_LAUNCHER_PID"] == str(os.getppid())
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert Path("/proc/self/comm").read_text().startswith("python")
    if rank == 0:
        listener = socket.socket(fileno=int(os.environ["DTRAIN_MASTER_FD"]))
        assert listener.getsockname() == ("127.0.0.1", int(os.environ["MASTER_PORT"]))
        listener.settimeout(60)
        listener.accept()
    else:
        assert "DTRAIN_MASTER_FD" not in os.environ
        socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), timeout=10).close()
    return 0
""",
    )
    assert (job.process.returncode, job.text) == (0, "")


@pytest.mark.parametrize(
    ("rank", "code", "starts", "last"),
    [
        pytest.param("exit_json(3, 'DataError'); return 3", 3, 1, None, id="an error that would come again"),
        pytest.param("exit_json(75, 'Preempted'); return 75", 75, 1, None, id="a stop that is saved"),
        pytest.param(
            "exit_json(1, 'RuntimeError', 1) if rank else time.sleep(0.1); return 1",
            1,
            3,
            "error: rank 1 on here: RuntimeError happened",
            id="another rank's error",
        ),
        pytest.param("exit_json(5, 'NonFiniteError', 1); return 5", 5, 3, None, id="rank 0 has printed what all have"),
        pytest.param("return 0 if start == 2 else 4", 0, 3, None, id="the last restart succeeds"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            4,
            3,
            r"error: Rank \d \(process \d+\) was killed by SIGKILL. Was the memory full?",
            id="no rank is left to say why",
        ),
        pytest.param(
            "rank == 0 and exit_json(0, 'done'); rank == 1 and os.kill(os.getpid(), signal.SIGSEGV); return 0",
            4,
            3,
            r"error: Rank 1 \(process \d+\) was killed by SIGSEGV",
            id="a crash after the end",
        ),
        pytest.param("raise RuntimeError('made to fail')", 1, 3, None, id="an error outside of dtrain"),
        pytest.param("sys.exit(6)", 6, 1, None, id="sys.exit"),
    ],
)
def test_the_jobs_exit_code_restarts_and_last_line(
    tmp_path: Path, rank: str, code: int, starts: int, last: str | None
) -> None:
    job = launched(tmp_path, f"    rank == 0 and print('begin', start)\n    {rank}", restarts=2)

    assert job.process.returncode == code, job.text
    assert job.text.count("begin ") == starts, job.text
    assert sum("All 2 ranks start again: restart" in line for line in job.out) == starts - 1
    errors = [line for line in job.out if line.startswith("error: ")]
    assert len(errors) == (last is not None), job.text
    if last is not None:
        assert re.match(last, job.said[-1]), job.text


def test_a_rank_that_does_not_end_after_another_has_failed_is_killed(tmp_path: Path) -> None:
    job = launched(
        tmp_path,
        f"""
    if rank == 1:
        return 4
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()  # a helper that outlives its rank
    time.sleep({jobs.LIMIT_S})
""",
        limits_s=0.5,
    )
    assert job.process.returncode == 4
    assert not job.members()


def test_a_thread_at_the_fork_is_seen_and_jemallocs_is_none() -> None:
    before = other_threads()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert len(other_threads()) == len(before) + 1
    finally:
        done.set()
        thread.join()


# ---------------------------------------------------------------- with dtrain's ranks

FAULTS = f"""
import os, signal, sys, threading
os.environ.pop("OMP_NUM_THREADS")  # libraries take a thread for each core
sys.path.insert(0, {str(jobs.ROOT)!r})
from dtrain import main
from dtrain.job import forked_ranks
start_all = forked_ranks._start_all
def start(*arguments, **more):
    loaded = {{"torch", "transformers", "datasets", "dtrain.training.loop"}} <= set(sys.modules)
    print("threads", forked_ranks.other_threads(), "loaded", loaded, flush=True)
    from dtrain.training import loop
    if loop.take_step is not take_step:
        real.append(loop.take_step)
        loop.take_step = take_step
    return start_all(*arguments, **more)
def take_step(*arguments, **more):
    step, count = arguments[1].batches.step, os.environ["TORCHELASTIC_RESTART_COUNT"]
    if os.environ["RANK"] == "1" and (step, count) == (6, "0"):
        raise RuntimeError("made to fail")
    if os.environ["RANK"] == "0" and (step, count) == (10, "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real[0](*arguments, **more)
real, forked_ranks._start_all = [], start
main.console_script()
"""

THREAD = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


@launchers
def test_after_a_fault_new_ranks_go_on_from_the_last_checkpoint_without_imports(tmp_path: Path) -> None:
    script, run = tmp_path / jobs.SCRIPT, tmp_path / "runs" / "run"
    script.write_text(FAULTS)
    settings = jobs.settings(tmp_path / "runs", "run", train__max_steps=12, checkpoint__every=2, run__overwrite="true")

    job = jobs.run([sys.executable, str(script), "train", "--ranks", "2", "--max-restarts", "2", *settings])

    assert job.process.returncode == 0, job.text
    assert job.out.count("threads [] loaded True") == 3, "a fork with threads is not safe"
    resumed = [event["step"] for event in jobs.read_events(run, "resume")]
    assert len(resumed) == 2, job.text
    assert 2 <= resumed[0] <= 6
    assert resumed[0] <= resumed[1] <= 10
    assert {event["step"] for event in jobs.read_events(run)} == set(range(1, 13))
    assert jobs.exit_of(run)["code"] == 0
    first, second = (line for line in job.said if "ranks start again" in line)
    assert re.match(r"warning: Rank 1 \(process \d+\) ended with code 1\. All 2 ranks .*: restart 1 of 2", first)
    assert re.match(r"warning: Rank 0 \(process \d+\) was killed by SIGKILL\. .*: restart 2 of 2", second)
    assert not job.members()


@launchers
@pytest.mark.slow
def test_where_a_thread_runs_already_ranks_are_new_programs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(THREAD)

    job = jobs.run([*jobs.forked(), *jobs.settings(tmp_path / "runs", "run")], env={"PYTHONPATH": str(tmp_path)})

    assert job.process.returncode == 0, job.text
    assert jobs.summary_of(tmp_path / "runs" / "run")["world_size"] == 2
    assert "Ranks are started as new programs" in job.text


@launchers
def test_an_error_in_the_config_is_printed_once_before_anything_starts(tmp_path: Path) -> None:
    job = jobs.run(
        [*jobs.forked(2, "--max-restarts", "2"), *jobs.settings(tmp_path / "runs", "run", train__epochs="x")]
    )

    assert job.process.returncode == 2
    assert len(job.said) == 1, job.text
    assert "train.epochs" in job.text


@launchers
def test_a_signal_during_the_imports_ends_the_launcher_before_it_has_ranks(tmp_path: Path) -> None:
    with jobs.started([*jobs.forked(), *jobs.train(tmp_path / "runs")]) as job:
        assert jobs.until(lambda: any("libtorch" in each for each in job.maps(job.process.pid))), job.text
        os.kill(job.process.pid, signal.SIGTERM)
        code = job.end(10)

    assert code == 75
    assert job.said[0].startswith("error: Stopped before the first step of this start (SIGTERM): nothing is lost."), (
        job.text
    )
    assert "Traceback" not in job.text
    assert not (tmp_path / "runs").exists()
    assert not job.members()


@launchers
def test_ranks_under_another_launcher_start_no_ranks(tmp_path: Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    job = jobs.run([*jobs.forked(), *jobs.settings(tmp_path / "runs", "run")], env=env)

    assert job.process.returncode == 2
    assert "--ranks 2 starts ranks, but this is rank 0 of 2" in job.text

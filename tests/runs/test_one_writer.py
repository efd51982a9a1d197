"""Only one job at a time writes into a run folder, and a restarted job gets its folder back."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import jobs
from tests.support.jobs import train

pytestmark = pytest.mark.launchers

slow = pytest.mark.slow


@slow
def test_a_second_job_is_refused_until_the_first_one_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    with jobs.started([*jobs.python(), *train(tmp_path / "runs")]) as first:
        first.wait_for("  loss ")
        pid = first.ranks()[0]
        begun = (run / "config.yaml").read_bytes()

        second = jobs.run([*jobs.python(), *train(tmp_path / "runs", run__overwrite="true")])

        assert second.process.returncode == 2, second.text
        assert len(second.said) == 1, second.text
        assert second.said[0].startswith(
            f"error: {run} is in use by process {pid} on {socket.gethostname()} (train, since 20"
        )
        assert second.said[0].endswith("Wait until that job ends, or stop it; or choose another run.name")
        assert first.process.poll() is None
        assert (run / "config.yaml").read_bytes() == begun
        assert not (run / "exit.json").exists()
        os.kill(pid, signal.SIGKILL)
        first.end()
    assert json.loads((run / "run.lock").read_text())["pid"] == pid

    third = jobs.run([*jobs.python(), *jobs.settings(tmp_path / "runs", "run", run__overwrite="true")])

    assert third.process.returncode == 0, third.text
    assert f"{run}: took over the lock of process {pid} on {socket.gethostname()} (train, since 20" in third.text
    assert jobs.exit_of(run)["code"] == 0
    assert not (run / "run.lock").exists()
    start = jobs.read_events(run, "start")[0]
    assert 0.1 < start["startup_s"] < jobs.LIMIT_S
    account = jobs.run([*jobs.python(), "goodput", str(run)])
    assert account.process.returncode == 0
    assert account.said[0] == "3 steps, 0 of them repeated, in 1 start"
    assert account.said[-1].startswith("goodput ")


WAITS = f"""
import os, sys, time
sys.path.insert(0, {str(jobs.ROOT)!r})
from dtrain.training import loop; from dtrain import main
real = loop.take_step
def take_step(*arguments, **more):
    if arguments[1].batches.step == 1:
        print("at the second step", flush=True)
        while not os.path.exists(os.environ["GO"]):
            time.sleep(0.05)
    return real(*arguments, **more)
loop.take_step = take_step
main.console_script()
"""


def test_a_second_start_that_is_stopped_early_does_not_change_the_firsts_exit_cause(tmp_path: Path) -> None:
    run, go, script = tmp_path / "runs" / "run", tmp_path / "go", tmp_path / jobs.SCRIPT
    script.write_text(WAITS)
    settings = jobs.settings(tmp_path / "runs", "run")
    with jobs.started([jobs.python()[0], str(script), *settings], env={"GO": str(go)}) as first:
        first.wait_for("at the second step")
        with jobs.started([*jobs.python(), *settings]) as second:
            # After dtrain's own small modules, the interpreter loads torch's library.
            assert jobs.until(lambda: any("libtorch" in each for each in second.maps(second.process.pid))), second.text
            os.kill(second.process.pid, signal.SIGINT)
            second.end()
        was_there = (run / "exit.json").exists()
        go.touch()
        code = first.end()

    answer, error = second.said[:2]
    assert (answer, error.partition(":")[0]) == ("SIGINT: stopping", "error")
    assert "Stopped before the first step of this start (SIGINT): nothing is lost." in error
    assert not was_there
    assert code == 0, first.text
    assert jobs.exit_of(run)["code"] == 0


@slow
def test_no_rank_of_a_job_that_lost_its_folder_writes_its_exit_cause_there(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    with jobs.started([*jobs.forked(), *train(tmp_path / "runs")]) as job:
        job.wait_for("  loss ")
        lock = run / "run.lock"
        other = {**json.loads(lock.read_text()), "host": "node7", "id": "0123"}
        draft = tmp_path / "lock"
        draft.write_text(json.dumps(other))
        draft.replace(lock)
        gone = job.gone_within(30)
        job.end()

    assert gone
    assert not (run / "exit.json").exists()
    assert json.loads(lock.read_text()) == other
    assert f"error: {run} was taken over by process {other['pid']} on node7" in job.text
    assert "exited without an error message" not in job.text


@slow
def test_a_job_that_torchrun_restarts_takes_over_the_lock_of_its_killed_rank_0_immediately(tmp_path: Path) -> None:
    command = [*jobs.torchrun(2, "--standalone", "--max-restarts", "1"), *train(tmp_path / "runs")]
    with jobs.started(command) as job:
        job.wait_for("  loss ")
        pid = job.ranks()[0]
        os.kill(pid, signal.SIGKILL)

        job.wait_for(f"took over the lock of process {pid} on {socket.gethostname()}")
        seen = len(job.out)
        jobs.until(lambda: any("  loss " in line for line in job.out[seen:]) or job.process.poll() is not None)

        assert any("  loss " in line for line in job.out[seen:]), job.text
        assert "not visible here" not in job.text
        assert "was rejected" not in job.text


@slow
def test_a_restart_without_an_id_keeps_its_progress_on_a_lagging_file_server_and_behind_a_wrapper(
    tmp_path: Path,
) -> None:
    run, wrapper = tmp_path / "runs" / "run", ["sh", "-c", '"$0" "$@"; exit $?', *jobs.python()]
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "1", "--no-python"]
    settings = train(tmp_path / "runs", run__overwrite="true", checkpoint__every="5")
    with jobs.started([*jobs.torchrun(2, *options)[:-1], *wrapper, *settings]) as job:
        assert jobs.until(lambda: any(run.glob("checkpoints/step-*")) or job.has_ended()), job.text
        for file in run.rglob("*"):  # the clock of their file server is a day behind
            with suppress(FileNotFoundError):
                os.utime(file, ns=(time.time_ns() - 86400 * 10**9,) * 2)
        pid = job.ranks()[0]
        os.kill(pid, signal.SIGKILL)

        job.wait_for("resumes from the checkpoint of step")

    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["run"]


@slow
def test_torchrun_agents_with_different_restart_counts_meet(tmp_path: Path) -> None:
    run, port = tmp_path / "runs" / "run", jobs.free_port()
    options = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "one"]
    options += ["--rdzv-conf", "last_call_timeout=1", "--local-addr", "127.0.0.1", "--max-restarts", "3"]
    command = [*jobs.torchrun(1, *options), *train(tmp_path / "runs")]
    # torch 2.13: an agent that has shared its store does not tell a later one where that is, which gives up after 60 s.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def sizes() -> list[int]:
        return [event["world_size"] for event in jobs.read_events(run, "start")]

    with jobs.started(command, env=env) as first:
        first.wait_for("  loss ")
        os.kill(first.ranks()[0], signal.SIGKILL)  # its agent counts one restart, and the other's none
        assert jobs.until(lambda: sizes() == [1, 1]), first.text
        with jobs.started(command, env=env) as second:
            assert jobs.until(lambda: sizes()[2:] == [2]), first.text + second.text
            seen = len(first.out) + len(second.out)
            assert jobs.until(lambda: len(first.out) + len(second.out) > seen + 2), first.text + second.text

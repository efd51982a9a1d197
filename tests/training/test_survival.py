"""Runs that are asked to stop, or killed, under real launchers: they end with the right code and go on where they were."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dtrain.checkpoint.format import list_checkpoints, verify
from tests.support import jobs
from tests.support.jobs import Job

pytestmark = pytest.mark.launchers

slow, nightly = pytest.mark.slow, pytest.mark.nightly
LONG = {"train__max_steps": 100000, "train__log_every": 1}
SHORT = {"train__max_steps": 300, "train__log_every": 1, "checkpoint__every": 20}


def newest(folder: Path) -> int:
    return next(iter(list_checkpoints(folder / "run" / "checkpoints")), 0)


def tensors(folder: Path, name: str) -> dict[str, bytes]:
    """Weights and moments after the last step."""
    path = folder / name / "checkpoints" / "step-000300"
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def send(job: Job, number: signal.Signals, target: str) -> None:
    match target:
        case "launcher":
            os.kill(job.process.pid, number)
        case "rank 0" | "rank 1":
            os.kill(job.ranks()[int(target[-1])], number)
        case _:
            os.kill(job.named(target), number)


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("start", "number", "target", "code"),
    [
        pytest.param(jobs.python, TERM, "launcher", 75, id="python-term", marks=slow),
        pytest.param(jobs.python, INT, "launcher", 75, id="python-int", marks=nightly),
        pytest.param(jobs.torchrun, TERM, "launcher", 1, id="torchrun-term"),
        pytest.param(jobs.torchrun, USR1, "rank 1", 1, id="torchrun-usr1-to-rank-1", marks=slow),
        pytest.param(jobs.deepspeed, TERM, "launcher.launch", 1, id="deepspeed-term", marks=nightly),
        pytest.param(jobs.mpirun, USR1, "launcher", 75, id="mpirun-usr1", marks=nightly),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on_from_there(
    tmp_path: Path, start: Callable[[], list[str]], number: signal.Signals, target: str, code: int
) -> None:
    folder = tmp_path / "runs"
    settings = jobs.settings(folder, "run", **LONG, checkpoint__every=100000)
    with jobs.started([*start(), *settings]) as job:
        job.wait_for("  loss ")
        send(job, number, target)
        ended = job.end()

    step = newest(folder)
    told = jobs.exit_of(folder / "run")
    assert step > 0
    assert ended == code
    assert (told["code"], told["cause"]) == (75, "Preempted")
    assert told["message"].startswith(
        f"Stopped after step {step}: stop requested by {number.name}. The checkpoint is saved"
    )
    assert sum("The checkpoint is saved" in line for line in job.said) == 1
    verify(folder / "run" / "checkpoints" / f"step-{step:06d}")
    assert jobs.read_events(folder / "run", "preempt")[-1]["step"] == step
    before = len(jobs.read_events(folder / "run"))

    with jobs.started([*jobs.python(), *settings]) as job:
        job.wait_for("  loss ")
        os.kill(job.process.pid, TERM)
        assert job.end() == 75
    assert jobs.read_events(folder / "run")[before]["step"] == step + 1
    assert jobs.read_events(folder / "run", "resume")[-1]["step"] == step


@pytest.mark.parametrize("number", [TERM, USR1], ids=["term", "usr1"])
def test_a_signal_to_all_processes_of_a_rank_takes_no_data_worker_from_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Slurm's --signal and torchrun reach the data workers as well: dead, they would make an error of the stop."""
    settings = jobs.settings(tmp_path / "runs", "run", **LONG, data__workers=1, checkpoint__every=100000)
    with jobs.started([*jobs.python(), *settings]) as job:
        job.wait_for("  loss ")
        os.killpg(job.process.pid, number)
        code = job.end()
        is_gone = job.gone_within(10)

    assert code == 75, job.text
    assert newest(tmp_path / "runs") > 0
    assert is_gone


@slow
def test_sigusr1_and_the_end_of_the_time_save_where_no_checkpoints_are_made_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with jobs.started([*jobs.python(), *jobs.settings(folder, "run", **LONG)]) as job:
        job.wait_for("  loss ")
        os.kill(job.process.pid, USR1)
        assert job.end() == 75
    first = newest(folder)

    job = jobs.run([*jobs.python(), *jobs.settings(folder, "run", **LONG, train__max_minutes=0.01)])

    assert job.process.returncode == 75
    assert newest(folder) > first > 0
    assert "train.max_minutes has passed" in jobs.exit_of(folder / "run")["message"]


@slow
@pytest.mark.parametrize(
    "start", [pytest.param(jobs.python, id="python", marks=nightly), pytest.param(jobs.torchrun, id="torchrun")]
)
def test_after_sigkill_and_after_sigterm_the_run_ends_with_every_bit(
    tmp_path: Path, start: Callable[[], list[str]]
) -> None:
    folder = tmp_path / "runs"
    assert jobs.run([*start(), *jobs.settings(folder, "steady", **SHORT)]).process.returncode == 0

    for number in (signal.SIGKILL, TERM):
        with jobs.started([*start(), *jobs.settings(folder, "run", **SHORT)]) as job:
            at = newest(folder) + 20
            assert jobs.until(lambda at=at: newest(folder) >= at or job.has_ended()), job.text  # type: ignore[misc]
            os.kill(job.ranks()[0], number)
            assert job.end() != 0
            assert job.gone_within(10)
    assert jobs.run([*start(), *jobs.settings(folder, "run", **SHORT)]).process.returncode == 0

    assert len(tensors(folder, "steady")) == 2
    assert tensors(folder, "run") == tensors(folder, "steady")


@slow
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=nightly)])
def test_torchrun_starts_killed_ranks_again_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path, kills: int) -> None:
    folder, rng = tmp_path / "runs", random.Random(kills)
    start = jobs.torchrun(2, "--standalone", "--max-restarts", str(kills + 2), "--monitor-interval", "0.1")
    assert jobs.run([*start, *jobs.settings(folder, "steady", **SHORT)]).process.returncode == 0

    def is_at(step: int, job: jobs.Job) -> bool:
        return newest(folder) >= step and len(job.ranks()) == 2

    def resumed() -> int:
        return len(jobs.read_events(folder / "run", "resume"))

    # run.overwrite is for the first start: a later one that began anew would never come to the end.
    with jobs.started([*start, *jobs.settings(folder, "run", **SHORT, run__overwrite=True)]) as job:
        for kill in range(1, kills + 1):
            at = 20 * max(1, 10 * kill // kills)
            assert jobs.until(lambda at=at: is_at(at, job) or job.has_ended()), job.text  # type: ignore[misc]
            os.kill(rng.choice(job.ranks()), signal.SIGKILL)
            assert jobs.until(lambda kill=kill: resumed() >= kill or job.has_ended()), job.text  # type: ignore[misc]
        assert job.end() == 0

    assert resumed() == kills
    assert tensors(folder, "run") == tensors(folder, "steady")


@slow
def test_the_node_that_is_left_goes_on_by_itself(tmp_path: Path) -> None:
    folder, port = tmp_path / "runs", jobs.free_port()
    options = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "one"]
    options += ["--local-addr", "127.0.0.1", "--max-restarts", "3", "--rdzv-conf"]

    def agent(*, is_host: bool) -> list[str]:
        conf = f"last_call_timeout=5,is_host={int(is_host)}"
        return [*jobs.torchrun(1, *options, conf), *jobs.settings(folder, "run", **SHORT)]

    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else the second agent may not find the first one's store

    def sizes() -> list[int]:
        return [event["world_size"] for event in jobs.read_events(folder / "run", "start")]

    with jobs.started(agent(is_host=True), env=env) as first, jobs.started(agent(is_host=False), env=env) as second:
        assert jobs.until(lambda: newest(folder) >= 40 and sizes()[-1] == 2), first.text + second.text
        for pid in [second.process.pid, *second.members()]:  # the node is gone, with all that ran there
            with suppress(ProcessLookupError):  # a monitor ends soon after its rank
                os.kill(pid, signal.SIGKILL)
        died_at = newest(folder)
        assert first.end() == 0, first.text

    assert sizes()[-1] == 1
    assert jobs.read_events(folder / "run", "resume")[-1]["step"] >= died_at
    assert jobs.read_events(folder / "run", "resume")[-1]["world_size"] == 1
    assert newest(folder) == SHORT["train__max_steps"]

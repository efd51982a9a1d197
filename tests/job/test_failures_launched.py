"""How a job ends when something goes wrong in the middle: told to stop, a launcher or a rank that dies, a bad loss.

Every fault is tried under torchrun, and every other launcher with two of them. The mark `slow` stands for the same as a test
above it under another launcher, `nightly` for the rest of the product of launchers and faults.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import jobs
from tests.support.jobs import Job, train

pytestmark = pytest.mark.launchers

slow, nightly = pytest.mark.slow, pytest.mark.nightly
HOST = os.uname().nodename
GONE_S = 10.0
"""How soon after Ctrl-C all processes are gone."""


def send(job: Job, number: signal.Signals, target: str) -> None:
    """To the launcher, to all that a terminal's Ctrl-C reaches, to a rank, or to a process named so."""
    match target:
        case "launcher":
            os.kill(job.process.pid, number)
        case "group":
            os.killpg(job.process.pid, number)
        case "rank 0" | "rank 1":
            os.kill(job.ranks()[int(target[-1])], number)
        case _:
            os.kill(job.named(target), number)


def lines_after(job: Job, text: str) -> list[str]:
    """What dtrain printed after the last line with `text`."""
    last = max(index for index, line in enumerate(job.said) if text in line)
    return job.said[last + 1 :]


@pytest.mark.parametrize(
    ("start", "number", "target", "said"),
    [
        pytest.param(jobs.python, signal.SIGINT, "launcher", "SIGINT", id="python-int"),
        pytest.param(jobs.python, signal.SIGHUP, "group", "SIGHUP", id="python-hup"),
        pytest.param(jobs.python, signal.SIGTERM, "launcher", "SIGTERM", id="python-term", marks=slow),
        pytest.param(jobs.forked, signal.SIGTERM, "launcher", "SIGTERM", id="forked-term"),
        pytest.param(jobs.forked, signal.SIGINT, "group", "SIGINT", id="forked-int-group", marks=slow),
        pytest.param(jobs.forked, signal.SIGHUP, "group", "SIGHUP", id="forked-hup", marks=slow),
        pytest.param(jobs.forked, signal.SIGUSR1, "launcher", "SIGUSR1", id="forked-usr1", marks=nightly),
        pytest.param(jobs.torchrun, signal.SIGINT, "group", "SIGINT", id="torchrun-int-group", marks=slow),
        pytest.param(jobs.torchrun, signal.SIGINT, "launcher", "SIGINT", id="torchrun-int", marks=nightly),
        pytest.param(jobs.torchrun, signal.SIGTERM, "launcher", "SIGTERM", id="torchrun-term", marks=nightly),
        pytest.param(jobs.torchrun, signal.SIGHUP, "group", "SIGHUP", id="torchrun-hup", marks=nightly),
        # Its launcher sends a second signal after the first, and not to all ranks; its runner dies at once.
        pytest.param(jobs.deepspeed, signal.SIGINT, "group", "SIG", id="deepspeed-int-group", marks=slow),
        pytest.param(
            jobs.deepspeed, signal.SIGINT, "launcher", "The launcher (deepspeed)", id="deepspeed-int", marks=nightly
        ),
        pytest.param(
            jobs.deepspeed, signal.SIGTERM, "launcher", "The launcher (deepspeed)", id="deepspeed-term", marks=nightly
        ),
        pytest.param(jobs.mpirun, signal.SIGUSR1, "launcher", "SIGUSR1", id="mpirun-usr1", marks=slow),
    ],
)
def test_a_job_told_to_stop_saves_says_so_once_and_what_goes_on(
    tmp_path: Path, start: Callable[[], list[str]], number: signal.Signals, target: str, said: str
) -> None:
    command = [*start(), *train(tmp_path / "runs")]
    with jobs.started(command) as job:
        job.wait_for("  loss ")
        send(job, number, target)
        gone = job.gone_within(GONE_S)
        left = job.members()
        code = job.end()

    assert gone, left
    assert code != 0
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"]) == (75, "Preempted")
    assert not jobs.own_traceback(job), job.text
    # A run that has saved within 0.1 s needs no other answer.
    *answers, stopped, goes_on = lines_after(job, "  loss ")
    assert len(answers) <= 1
    assert all(said in answer and "again to quit without saving" in answer for answer in answers), job.text
    assert stopped.startswith("error: Stopped after step ")
    assert said in stopped
    # The very command, without the folder of a launcher on the PATH.
    assert goes_on.split()[-len(command) + 1 :] == shlex.join(command).split()[1:]
    assert end["message"].splitlines()[-1] == goes_on


@pytest.mark.parametrize(
    ("number", "target"),
    [
        pytest.param(signal.SIGTERM, "launcher", id="term", marks=slow),
        pytest.param(signal.SIGINT, "group", id="int", marks=nightly),
    ],
)
def test_mpirun_leaves_no_time_to_save_but_nothing_is_left_behind(
    tmp_path: Path, number: signal.Signals, target: str
) -> None:
    """It kills its ranks 0.25 s later, which is time for a small model only."""
    with jobs.started([*jobs.mpirun(), *train(tmp_path / "runs")]) as job:
        job.wait_for("  loss ")
        send(job, number, target)
        gone = job.gone_within(GONE_S)
        code = job.end()

    assert gone
    assert code != 0
    assert not jobs.own_traceback(job), job.text


@slow
def test_a_signal_to_one_rank_ends_all_and_exit_json_names_it(tmp_path: Path) -> None:
    with jobs.started([*jobs.forked(), *train(tmp_path / "runs")]) as job:
        job.wait_for("  loss ")
        send(job, signal.SIGTERM, "rank 1")
        assert job.gone_within(GONE_S), job.members()
        code = job.end()

    assert code != 0
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"]) == (75, "Preempted")
    assert "stop requested by SIGTERM" in end["message"], end
    assert not jobs.own_traceback(job), job.text
    *answers, stopped, _ = lines_after(job, "  loss ")
    assert all(answer.startswith("SIGTERM: saving after this step") for answer in answers), job.text
    assert stopped.startswith("error: Stopped after step ")


def test_a_job_that_gets_a_signal_before_it_trains_reports_it_too(tmp_path: Path) -> None:
    with jobs.started([*jobs.python(), *train(tmp_path / "runs")]) as job:
        # As soon as the interpreter is through dtrain's own small modules it reads torch's library.
        assert jobs.until(lambda: any("libtorch" in each for each in job.maps(job.process.pid))), job.text
        send(job, signal.SIGINT, "launcher")
        assert job.gone_within(GONE_S)
        code = job.end()

    assert code == 75
    assert "Traceback" not in job.text
    answer, stopped, command = job.said
    assert answer == "SIGINT: stopping"
    assert stopped.startswith("error: Stopped before the first step of this start (SIGINT): nothing is lost.")
    assert command.split()[1] == jobs.MAIN
    assert not (tmp_path / "runs").exists(), "nothing had begun"


@pytest.mark.parametrize(
    ("start", "target", "named"),
    [
        pytest.param(jobs.forked, "launcher", "dtrain", id="forked"),
        pytest.param(jobs.torchrun, "launcher", "torchrun", id="torchrun", marks=slow),
        pytest.param(jobs.deepspeed, "launcher", "deepspeed", id="deepspeed-runner", marks=nightly),
        pytest.param(jobs.deepspeed, "deepspeed.launcher.launch", "deepspeed", id="deepspeed-launch", marks=slow),
        pytest.param(jobs.mpirun, "launcher", "openmpi", id="mpirun", marks=nightly),
    ],
)
def test_ranks_are_gone_5_s_after_their_launcher_was_killed(
    tmp_path: Path, start: Callable[[], list[str]], target: str, named: str
) -> None:
    with jobs.started([*start(), *train(tmp_path / "runs")]) as job:
        job.wait_for("  loss ")
        send(job, signal.SIGKILL, target)
        gone = jobs.until(lambda: not job.ranks(), 5.0)
        job.end()

    assert gone
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert f"The launcher ({named}) has died" in end["message"]
    assert (end["code"], end["cause"]) == (75, "Preempted")
    assert "The checkpoint is saved" in end["message"]
    assert not jobs.own_traceback(job), job.text


@pytest.mark.parametrize(
    ("start", "killed"),
    [
        pytest.param(jobs.forked, 1, id="forked-1", marks=nightly),
        pytest.param(jobs.forked, 0, id="forked-0"),
        pytest.param(jobs.torchrun, 1, id="torchrun-1", marks=slow),
        pytest.param(jobs.torchrun, 0, id="torchrun-0", marks=nightly),
        pytest.param(jobs.deepspeed, 1, id="deepspeed-1", marks=nightly),
        pytest.param(jobs.mpirun, 1, id="mpirun-1", marks=slow),
        pytest.param(jobs.mpirun, 0, id="mpirun-0", marks=nightly),
    ],
)
def test_a_rank_that_is_killed_is_named_by_the_other_which_ends_at_once(
    tmp_path: Path, start: Callable[[], list[str]], killed: int
) -> None:
    with jobs.started([*start(), *train(tmp_path / "runs")]) as job:
        job.wait_for("  loss ")
        pid = job.ranks()[killed]
        os.kill(pid, signal.SIGKILL)
        gone = jobs.until(lambda: not job.ranks(), 5.0)
        code = job.end()

    assert gone
    assert code != 0
    dead = f"Rank {killed} (process {pid} on {os.uname().nodename}) exited without an error message"
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"], end["rank"]) == (4, "TopologyError", killed)
    assert end["message"].startswith(dead)
    (line,) = lines_after(job, "  loss ")
    assert dead in line
    assert line.endswith(f"Rank {1 - killed} ends as well.")
    if start is jobs.torchrun:  # its own report is the last on the screen
        assert dead in "\n".join(job.text.rstrip().splitlines()[-10:])
    assert not jobs.own_traceback(job), job.text


RAISES = f"""
import os, sys
sys.path.insert(0, {str(jobs.ROOT)!r})
from dtrain.training import loop; from dtrain import main
real = loop.take_step
def take_step(*arguments, **more):
    if os.environ["RANK"] == "1" and arguments[1].batches.step == 4:
        raise RuntimeError("made to fail")
    return real(*arguments, **more)
loop.take_step = take_step
main.console_script()
"""


def test_a_rank_that_raises_shows_its_traceback_and_the_other_one_line(tmp_path: Path) -> None:
    script = tmp_path / "raises.py"
    script.write_text(RAISES)

    job = jobs.run([*jobs.torchrun()[:-1], str(script), *train(tmp_path / "runs")])

    assert job.process.returncode != 0
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"], end["rank"]) == (1, "RuntimeError", 1)
    assert end["message"] == "RuntimeError: made to fail"
    assert job.out.count("RuntimeError: made to fail") == 1
    assert job.text.count("Traceback (most recent call last)") == 2, "rank 1's, and torchrun's own"
    assert f"error: Rank 1 on {HOST} ended: RuntimeError: made to fail Rank 0 ends as well." in job.out
    assert f"[rank 1] error: Rank 1 on {HOST} failed:" in job.out
    assert "gloo" not in job.text


FITS = f"""
import sys
sys.path.insert(0, {str(jobs.ROOT)!r})
import dtrain
if __name__ == "__main__":
    dtrain.fit(dtrain.load_config(None, sys.argv[1:]))
"""


@contextmanager
def by_hand(command: list[str]) -> Iterator[list[Job]]:
    """Two ranks that no launcher ends."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port())}
    with ExitStack() as stack:
        yield [stack.enter_context(jobs.started(command, env={**env, "RANK": str(rank)})) for rank in (0, 1)]


def test_python_code_that_started_a_run_gets_an_error_that_names_the_rank_that_died(tmp_path: Path) -> None:
    script = tmp_path / jobs.SCRIPT
    script.write_text(FITS)
    with by_hand([jobs.sys.executable, str(script), *train(tmp_path / "runs")]) as (first, second):
        first.wait_for("  loss ")
        os.kill(second.process.pid, signal.SIGKILL)
        code = first.end()

    assert code != 0
    dead = f"Rank 1 (process {second.process.pid} on {HOST}) exited without an error message"
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"], end["rank"]) == (4, "TopologyError", 1)
    assert end["message"].startswith(dead)
    assert any(f"dtrain.errors.TopologyError: {dead}" in line for line in first.err), first.text


DIES = f"""
import os, signal, sys
sys.path.insert(0, {str(jobs.ROOT)!r})
from dtrain import main
def die(*_arguments, **_more):
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1":
    if os.environ["DIES"] == "as ranks meet":
        from dtrain.job import session
        session.this_process = die
    else:
        real = main._run_command
        main._run_command = lambda *arguments, **more: (real(*arguments, **more), die())
main.console_script()
"""


@pytest.mark.parametrize("moment", ["as ranks meet", "as they part"])
def test_a_rank_that_dies_as_the_ranks_meet_or_part_is_missed_in_one_line(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, run = tmp_path / jobs.SCRIPT, tmp_path / "runs" / "run"
    script.write_text(DIES)
    run.mkdir(parents=True)
    monkeypatch.setenv("DIES", moment)

    with by_hand([jobs.sys.executable, str(script), *jobs.settings(tmp_path / "runs", "run")]) as (first, second):
        second.end()
        code = first.end()

    assert code == 4, first.text
    end = jobs.exit_of(run)
    assert (end["code"], end["cause"]) == (4, "TopologyError")
    if moment == "as they part":
        assert end["message"].startswith(
            f"Rank 1 (process {second.process.pid} on {HOST}) exited without an error message"
        )
    else:
        assert "lost its connection to another rank" in end["message"]
    assert first.said[-1] == f"error: {end['message']}", first.text
    assert "Traceback" not in first.text


def test_a_loss_that_is_not_finite_stops_all_ranks_with_one_message(tmp_path: Path) -> None:
    bad = {"optim__learning_rate": "1e30", "optim__max_grad_norm": "null", "schedule__name": "constant"}

    job = jobs.run([*jobs.forked(), *jobs.settings(tmp_path / "runs", "run", **bad)])

    assert job.process.returncode == 5
    run = tmp_path / "runs" / "run"
    end = jobs.exit_of(run)
    assert (end["code"], end["cause"]) == (5, "NonFiniteError")
    (fault,) = jobs.read_events(run, "fault")
    assert (fault["step"], fault["loss"]) == (2, "nan")
    assert len(fault["example_index"]) == 8
    assert set(fault["ranks"]) == {0, 1}
    assert sum("Step 2: the loss is" in line for line in job.out) == 1, job.text
    message = next(line for line in job.out if "Step 2: the loss is" in line)
    assert message.endswith(end["message"])
    for rank in (0, 1):
        assert f"rank {rank}, micro-batch {rank}, examples " in message
    assert str(fault["example_index"][0]) in message
    assert [event["loss"] for event in jobs.read_events(run)][1:] == ["nan"]
    assert not (run / "model").exists()
    assert not (run / "summary.json").exists()
    assert not jobs.own_traceback(job), job.text


@pytest.mark.parametrize(
    ("wrong", "code", "cause", "words"),
    [
        pytest.param({"data__path": "FOLDER"}, 3, "DataError", "train.tsv, line 2", id="data"),
        pytest.param({"freeze__modules": "[no.such]"}, 2, "ConfigError", "no.such", id="config", marks=slow),
    ],
)
def test_an_error_that_all_ranks_have_is_printed_once(
    tmp_path: Path, wrong: dict[str, str], code: int, cause: str, words: str
) -> None:
    folder = jobs.tiny.write_cola(tmp_path / "bad", train=4, dev=4)
    (folder / "train.tsv").write_text("made\t1\t\tthe cat\nmade\t7\t\tthe dog\n")
    settings = {key: value.replace("FOLDER", str(folder)) for key, value in wrong.items()}

    job = jobs.run([*jobs.forked(2, "--max-restarts", "2"), *jobs.settings(tmp_path / "runs", "run", **settings)])

    assert job.process.returncode == code
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"]) == (code, cause)
    assert words in end["message"]
    assert "\n".join(job.said).count(end["message"].splitlines()[0]) == 1, job.text
    assert job.said[-1].endswith(end["message"].splitlines()[-1])
    assert not jobs.own_traceback(job), job.text


def test_ranks_started_with_other_settings_are_refused_and_the_setting_is_named(tmp_path: Path) -> None:
    common = jobs.settings(tmp_path / "runs", "run")
    one, other = ([jobs.sys.executable, jobs.MAIN, *common, f"run.seed={seed}"] for seed in (0, 1))
    mpirun = jobs.mpirun(1)[: -len(jobs.python())]

    job = jobs.run([*mpirun, *one, ":", "-np", "1", *other])

    assert job.process.returncode == 2, job.text
    host = os.uname().nodename
    assert f"  run.seed: 0 on rank 0 ({host}), 1 on rank 1 ({host})" in job.out
    assert job.text.count(f"error: Rank 1 ({host}) was started with other settings than rank 0 ({host}):") == 1
    assert not (tmp_path / "runs").exists()


OTHER_NODE = """
import os, time
from dtrain.job import rank_checks

versions, clock = rank_checks.versions, time.time
if os.environ["RANK"] == "1":
    {planted}
from dtrain.main import console_script
console_script()
"""


@pytest.mark.parametrize(
    ("planted", "once", "told"),
    [
        (
            "rank_checks.versions = lambda: {**versions(), 'torch': '2.12.0'}",
            "Rank 1 (HOST) has other software",
            "2.12.0 on rank 1",
        ),
        ("time.time = lambda: clock() - 3600", "ages of shared files", "The clock of rank 1 (HOST) is 3600 s behind"),
        (
            "rank_checks.identify = lambda *_: rank_checks.GpuIdentity('5d5b', 'NVIDIA H100', '0')",
            "Rank 0 (HOST) finds no GPU",
            "but rank 1 (HOST) uses NVIDIA H100",
        ),
    ],
    ids=["torch", "clock", "gpu"],
)
def test_a_node_with_other_software_or_time_or_without_its_gpu_is_refused_and_it_is_named(
    planted: str, once: str, told: str, tmp_path: Path
) -> None:
    script = tmp_path / jobs.SCRIPT
    script.write_text(OTHER_NODE.replace("{planted}", planted))
    settings = jobs.settings(tmp_path / "runs", "run")

    env = {"PYTHONPATH": str(jobs.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    job = jobs.run([*jobs.torchrun()[:-1], str(script), *settings], env=env)

    assert told.replace("HOST", os.uname().nodename) in job.text
    assert "\n".join(job.said).count(once.replace("HOST", os.uname().nodename)) == 1
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_does_not_arrive_is_named_after_the_start_up_time_out(tmp_path: Path) -> None:
    settings = jobs.settings(tmp_path / "runs", "run", run__startup_timeout_s=3)
    with ExitStack() as stack:
        sides = {}
        for rank in (0, 1):  # each at a port where nobody else is
            env = {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(jobs.free_port()),
            }
            sides[rank] = stack.enter_context(jobs.started([*jobs.python(), *settings], env=env))
        for job in sides.values():
            job.end()

    alone = "error: 1 of 2 ranks arrived within 3 s. Missing: rank 1. Arrived: rank 0"
    assert sides[0].process.returncode == 4
    assert sides[0].said[-1].startswith(alone), sides[0].text
    assert sides[1].process.returncode == 4
    assert "[rank 1] error: Rank 1" in sides[1].said[-1], sides[1].text
    assert "found no master at 127.0.0.1" in sides[1].said[-1]
    for job in sides.values():
        assert "Traceback" not in job.text

"""Ranks that hang or die in the middle of a real job: named with their place, and nothing is left.

A mark `slow` here means: the same as a test above it, under another launcher or with data workers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import jobs
from tests.support.jobs import Job, train

pytestmark = pytest.mark.launchers

slow, nightly = pytest.mark.slow, pytest.mark.nightly
LIMIT = 4
"""Seconds of train.hang_timeout in these tests."""

FAULT = f"""
import ctypes, os, sys, time
sys.path.insert(0, {str(jobs.ROOT)!r})
from dtrain.training import loop; from dtrain import main
from dtrain.data import batches, read_ahead

class Rows:
    def __init__(self, rows):
        self.rows, self.reads = rows, 0
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, indices):
        self.reads += 1
        if self.reads == 7:
            stall()
        return self.rows[indices]

def stall():
    match os.environ["FAULT"]:
        case "sleeps":
            time.sleep(1000)
        case "holds the lock":
            ctypes.PyDLL(None).sleep(1000)
        case "segfault":
            ctypes.string_at(0)
        case "is debugged":
            exec(f"sleep({3 * LIMIT})", {{"__name__": "pdb", "sleep": time.sleep}})
        case "fails":
            if os.environ["RANK"] == "0":
                raise RuntimeError("made to fail")
            ctypes.PyDLL(None).sleep(1000)
        case "skips":
            import torch.distributed
            torch.distributed.barrier()

def step_batches(plan, rows, *arguments, **more):
    is_bad = os.environ.get("RANK", "0") in os.environ["BAD_RANK"]
    return real(plan, Rows(rows) if is_bad else rows, *arguments, **more)

def warm_up(*arguments):
    if os.environ["FAULT"] == "deadlocks":
        import torch
        torch.distributed.barrier() if os.environ["RANK"] == "1" else torch.distributed.all_reduce(torch.zeros(7))
    return ready(*arguments)

read_ahead.MOST_STEPS = 1  # so that the fault comes between two steps
real, loop.step_batches = batches.step_batches, step_batches
ready, loop.warm_up = loop.warm_up, warm_up
main.console_script()
"""


def faulty(folder: Path, start: list[str]) -> list[str]:
    """The launcher's command with a script that has a fault, in place of dtrain's own."""
    script = folder / jobs.SCRIPT
    script.write_text(FAULT)
    return [str(script) if word == jobs.MAIN else word for word in start]


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(FAULT.splitlines(), 1) if text in line)


@dataclass(frozen=True)
class Case:
    """A job with a fault.

    Attributes:
        fault: what `stall` does on the ranks in `bad_rank`.
        sign: in the line that says why the job ends.
        gone_s: seconds from that line until nothing of the job is left.
    """

    start: Callable[[], list[str]]
    fault: str
    bad_rank: str = "1"
    workers: int = 0
    sign: str = " hang"
    gone_s: float = 10.0


CASES = {
    "sleeps": Case(jobs.forked, "sleeps"),
    "worker": Case(jobs.forked, "sleeps", workers=1),
    "lock": Case(jobs.forked, "holds the lock"),
    "skips": Case(jobs.torchrun, "skips"),
    "deadlocks": Case(jobs.forked, "deadlocks", bad_rank=""),
    "one process sleeps": Case(jobs.python, "sleeps", "0", sign="Rank 0 (process ", gone_s=5.0),
    "one process segfault": Case(jobs.python, "segfault", "0", sign="Rank 0 (process ", gone_s=5.0),
}


@dataclass(frozen=True)
class Ended:
    """A job of `CASES` that is over.

    Attributes:
        trouble: what went wrong if it did not say why it ended, or if something of it was left `gone_s` later.
    """

    job: Job
    run: Path
    trouble: str | None

    @property
    def said(self) -> str:
        return "\n".join(self.job.said)


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The jobs of the selected tests, side by side: most of the time they wait for their limits."""
    selected = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and "ended" in item.fixturenames
    }
    with ExitStack() as stack:
        started = {}
        for name in sorted(selected):
            case, folder = CASES[name], tmp_path_factory.mktemp("job")
            settings = train(folder / "runs", train__hang_timeout=LIMIT, data__workers=case.workers)
            command, env = [*faulty(folder, case.start()), *settings], {"FAULT": case.fault, "BAD_RANK": case.bad_rank}
            started[name] = (stack.enter_context(jobs.started(command, env=env)), folder / "runs" / "run")

        def wait(name: str) -> Ended:
            (job, run), trouble = started[name], None
            try:
                job.wait_for(CASES[name].sign)
                if not job.gone_within(CASES[name].gone_s):
                    trouble = f"left: {job.members()}"
                job.end()
            except AssertionError as error:  # fails the test of this job, and no other
                trouble = str(error)
            return Ended(job, run, trouble)

        with ThreadPoolExecutor(len(started)) as waiting:
            return dict(zip(started, waiting.map(wait, started), strict=True))


@pytest.mark.parametrize(
    ("name", "place", "says"),
    [
        pytest.param("sleeps", "time.sleep(1000)", "reading the next batches", marks=slow),
        pytest.param("worker", "time.sleep(1000)", "(in a data worker)", marks=slow),
        pytest.param("lock", "PyDLL", "it holds the interpreter lock (GIL) while reading", marks=slow),
    ],
    ids=["sleeps", "worker", "lock"],
)
def test_a_rank_that_stalls_in_its_data_is_named_with_the_line(
    ended: dict[str, Ended], name: str, place: str, says: str
) -> None:
    job, run = ended[name].job, ended[name].run

    assert ended[name].trouble is None
    end = jobs.exit_of(run)
    assert (end["code"], end["cause"], end["rank"]) == (4, "Hang", 1)
    assert ended[name].said.endswith(end["message"])
    first = end["message"].splitlines()[0]
    assert first.startswith("Rank 1 (process ")
    assert says in first
    assert f"/{jobs.SCRIPT}:{line_of(place)} in stall" in first
    assert f"rank 0 on {os.uname().nodename}: waits in collective " in end["message"]
    assert "gloo:all_reduce" in end["message"]
    (fault_line,) = jobs.read_events(run, "fault")
    assert (fault_line["kind"], fault_line["ranks"]) == ("hang", [1])
    stacks = (run / "hang-stacks.txt").read_text()
    assert "in stall" in stacks
    assert "in take_step" in stacks
    assert "Traceback" not in "\n".join(job.said)


@pytest.mark.parametrize("name", ["skips"])
def test_a_rank_that_skips_a_collective_is_named_with_the_others_collective(ended: dict[str, Ended], name: str) -> None:
    assert ended[name].trouble is None
    end = jobs.exit_of(ended[name].run)
    assert (end["code"], end["cause"]) == (4, "Hang")
    assert ended[name].said.endswith(end["message"])
    first = end["message"].splitlines()[0]
    assert "wait in different collectives: rank 0 (process " in first
    numbers = {word for word in first.replace(",", "").split() if word.isdecimal() and len(word) < 4}
    assert "gloo:all_reduce" in first
    assert "gloo:barrier [] at " in first
    assert f"/{jobs.SCRIPT}:{line_of('barrier()')} in stall" in first
    assert len(numbers) >= 2, first


@slow
@pytest.mark.parametrize("name", ["deadlocks"])
def test_ranks_that_wait_for_each_other_in_a_phase_without_a_limit_are_ended(
    ended: dict[str, Ended], name: str
) -> None:
    assert ended[name].trouble is None
    end = jobs.exit_of(ended[name].run)
    assert (end["code"], end["cause"]) == (4, "Hang")
    assert ended[name].said.endswith(end["message"])
    assert "gloo:all_reduce [[7]] at " in end["message"].splitlines()[0]
    assert "gloo:barrier [] at " in end["message"].splitlines()[0]


@slow
def test_a_rank_that_waits_for_a_person_at_a_debugger_does_not_hang(tmp_path: Path) -> None:
    settings = jobs.settings(tmp_path / "runs", "run", train__hang_timeout=LIMIT, train__max_steps=8)

    job = jobs.run([*faulty(tmp_path, jobs.forked()), *settings], env={"FAULT": "is debugged", "BAD_RANK": "1"})

    assert job.process.returncode == 0, job.text
    assert jobs.exit_of(tmp_path / "runs" / "run")["code"] == 0


@pytest.mark.parametrize(
    ("start", "limit_s"),
    [
        pytest.param(jobs.forked, LIMIT, id="forked"),
        pytest.param(jobs.torchrun, 10, id="torchrun", marks=slow),
        pytest.param(jobs.deepspeed, LIMIT, id="deepspeed", marks=nightly),
        pytest.param(jobs.mpirun, LIMIT, id="mpirun", marks=nightly),
    ],
)
def test_a_rank_that_is_stopped_is_named_and_ended(
    tmp_path: Path, start: Callable[[], list[str]], limit_s: int
) -> None:
    with jobs.started([*start(), *train(tmp_path / "runs", train__hang_timeout=limit_s)]) as job:
        job.wait_for("  loss ")
        stopped = job.ranks()[1]
        begin = time.monotonic()
        os.kill(stopped, signal.SIGSTOP)
        job.wait_for(" hangs: ")
        seconds = time.monotonic() - begin
        gone = job.gone_within(10)
        job.end()

    assert seconds < limit_s + 10
    assert gone, job.members()
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"], end["rank"]) == (4, "Hang", 1)
    assert end["message"].startswith(f"Rank 1 (process {stopped} on {os.uname().nodename}) hangs: it is stopped")
    assert "state T" in end["message"]
    assert any(end["message"].splitlines()[0] in line for line in job.said)
    assert job.process.returncode in ((1,) if start is jobs.torchrun else (4, 137)), job.text


@slow
def test_when_rank_0_fails_no_rank_is_left_even_without_a_launcher(tmp_path: Path) -> None:
    command = [*faulty(tmp_path, jobs.python()), *train(tmp_path / "runs")]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port())}
    fault = {"FAULT": "fails", "BAD_RANK": "0 1", **place}

    with (
        jobs.started(command, env={"RANK": "0", **fault}) as failing,
        jobs.started(command, env={"RANK": "1", **fault}) as stuck,
    ):
        failing.wait_for("made to fail")
        gone = jobs.until(lambda: not failing.members() and not stuck.members(), 10)
        assert gone, (failing.members(), stuck.members())
        failing.end()
        stuck.end()

    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["cause"], end["rank"]) == (1, "RuntimeError", 0)
    assert failing.process.returncode == 1
    assert failing.text.count("RuntimeError: made to fail") == 1
    assert stuck.process.returncode != 0


def test_a_segmentation_fault_is_named_with_the_line_that_led_there(tmp_path: Path) -> None:
    command = [*faulty(tmp_path, jobs.forked()), *train(tmp_path / "runs")]

    with jobs.started(command, env={"FAULT": "segfault", "BAD_RANK": "1"}) as job:
        job.wait_for("Segmentation fault")
        gone = job.gone_within(10)
        job.end()

    assert gone, job.members()
    end = jobs.exit_of(tmp_path / "runs" / "run")
    assert (end["code"], end["rank"]) == (4, 1)
    assert "died: Segmentation fault at " in end["message"]
    assert f"/{jobs.SCRIPT}:{line_of('string_at(0)')} in stall" in end["message"]
    assert end["message"] in job.said[-1]


@slow
@pytest.mark.parametrize("name", ["one process sleeps", "one process segfault"])
def test_one_process_is_watched_as_well(ended: dict[str, Ended], name: str) -> None:
    assert ended[name].trouble is None
    end = jobs.exit_of(ended[name].run)
    assert end["code"] == 4
    assert " in stall" in end["message"].splitlines()[0]
    assert ended[name].said.endswith(end["message"])


LONG = f"""
import os, sys, time
sys.path.insert(0, {str(jobs.ROOT)!r})
from dtrain import main; from dtrain.training import metric_selection as own_metrics
from dtrain.training import prepare_run, run
from dtrain.tasks import classification, prepare as preparing

def slowly(module, name, seconds, ranks):
    real = getattr(module, name)
    def slow(*arguments, **more):
        if os.environ["RANK"] in ranks:
            time.sleep(seconds)
        return real(*arguments, **more)
    setattr(module, name, slow)

slowly(prepare_run, "build_task", 2.5, "1")
slowly(run, "export_model", 2.5, "0")
slowly(run, "write_card", 2.5, "0")
slowly(classification.ClassificationTask, "metrics", 2.5, "0")
slowly(classification.ClassificationTask, "score", 0.6, "1")  # four batches: longer than the limit, but it goes on
main.console_script()
"""


@slow
def test_long_work_of_one_rank_is_no_hang(tmp_path: Path) -> None:
    script = tmp_path / jobs.SCRIPT
    script.write_text(LONG)
    settings = jobs.settings(
        tmp_path / "runs", "run", train__hang_timeout=1.5, train__eval_every=3, evaluation__micro_batch_size=1
    )

    job = jobs.run([*jobs.forked_script(script), *settings])

    assert job.process.returncode == 0, job.text
    assert jobs.exit_of(tmp_path / "runs" / "run")["code"] == 0

"""A later start of the same job is recognized by its launcher's process, whatever the clocks say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_config
from dtrain.distributed import torchrun_agent
from dtrain.distributed.process_info import ProcessIdentity
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.distributed.topology import Topology
from dtrain.distributed.torchrun_agent import AgentStart, find_agent
from dtrain.main import _non_retryable_failure
from dtrain.runs.folder import RunFolder, claim, write_exit
from dtrain.runs.launch_record import LAUNCHES, LaunchRecord, gather_launch, read_launch
from dtrain.training.run_claim import claimed

ROOT = Path(__file__).parents[2]
DAY_S = 86400.0


def process(pid: int, started: int = 5000, **other: Any) -> ProcessIdentity:
    fields = {"host": "a", "boot": "boot-1", "pid_namespace": 1, **other}
    return ProcessIdentity(pid=pid, started=str(started), **fields)


AGENT, OTHER_NODE, RANK, NEXT_RANK = process(10), process(10, host="b", boot="boot-2"), process(11), process(12)


def record(*agents: ProcessIdentity, worker: ProcessIdentity | None = RANK, **counts: int) -> LaunchRecord:
    return LaunchRecord(agents, worker, {name.replace("_", " "): count for name, count in counts.items()})


@pytest.mark.parametrize(
    ("earlier", "now", "is_restart"),
    [
        pytest.param(record(AGENT), record(AGENT, worker=NEXT_RANK), True, id="torchrun restarts its ranks"),
        pytest.param(record(AGENT), record(AGENT), False, id="a second command of one script"),
        pytest.param(record(AGENT), record(process(20), worker=NEXT_RANK), False, id="another job"),
        pytest.param(record(AGENT), record(process(10, 9000), worker=NEXT_RANK), False, id="the pid is another's"),
        pytest.param(record(AGENT), record(process(10, boot="x"), worker=NEXT_RANK), False, id="after a reboot"),
        pytest.param(record(AGENT), record(process(10, pid_namespace=2), worker=NEXT_RANK), False, id="a container"),
        pytest.param(
            record(AGENT), record(process(10, host="b"), worker=NEXT_RANK), False, id="a clone of the machine"
        ),
        pytest.param(
            record(AGENT, OTHER_NODE), record(OTHER_NODE, worker=process(3)), True, id="rank 0's node is gone"
        ),
        pytest.param(record(OTHER_NODE, worker=process(4)), record(AGENT, OTHER_NODE), True, id="a node has joined"),
        pytest.param(record(OTHER_NODE, AGENT), record(process(30), process(31)), False, id="all agents are new"),
        pytest.param(record(Slurm_job_7=0), record(Slurm_job_7=1), True, id="Slurm requeued the job"),
        pytest.param(record(Slurm_job_7=1), record(Slurm_job_7=1), False, id="a second step of a requeued job"),
        pytest.param(record(Slurm_job_7=0), record(Slurm_job_8=1), False, id="another Slurm job"),
        pytest.param(
            record(AGENT, Slurm_job_7=0), record(process(20), Slurm_job_7=0), False, id="two jobs in one allocation"
        ),
        pytest.param(record(AGENT, Slurm_job_7=0), record(process(20), Slurm_job_7=1), True, id="requeued torchrun"),
        pytest.param(record(torchrun_none=0), record(torchrun_none=1), True, id="an agent that is not visible"),
        pytest.param(record(torchrun_a=0), record(torchrun_b=1), False, id="another invisible agent"),
        pytest.param(LaunchRecord(), record(AGENT, Slurm_job_7=3), False, id="a folder without a record"),
    ],
)
def test_a_restart_is_told_from_another_job(earlier: LaunchRecord, now: LaunchRecord, is_restart: bool) -> None:
    assert now.restarts(LaunchRecord.from_json(earlier.to_json())) == is_restart


@pytest.mark.parametrize("text", ["", "torchrun none\n", "{", "[]", '{"agents": 3}', '{"agents": [[1]]}', "[" * 5000])
def test_a_record_of_another_version_or_a_damaged_one_recognizes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / LAUNCHES).write_text(text)

    assert read_launch(tmp_path) == LaunchRecord()
    assert read_launch(tmp_path / "none") == LaunchRecord()


def test_the_agents_of_all_nodes_are_recorded_once_and_torchruns_count_only_without_them() -> None:
    counts = {"torchrun none": 1, "Slurm job 7": 0}
    starts = json.loads(json.dumps([(AGENT, RANK), (AGENT, NEXT_RANK), (OTHER_NODE, process(4)), None]))

    assert gather_launch(starts, counts) == LaunchRecord((AGENT, OTHER_NODE), RANK, {"Slurm job 7": 0})
    assert gather_launch([None, None], counts) == LaunchRecord((), None, counts)
    assert gather_launch([None], {}).to_json() == ""


def test_a_job_of_dtrains_launcher_is_recognized_after_all_its_first_hosts_are_lost() -> None:
    first, again = ([(AGENT, RANK)], {"dtrain dtrain-12ab": 0}), ([(OTHER_NODE, process(4))], {"dtrain dtrain-12ab": 1})

    assert gather_launch(*again).restarts(gather_launch(*first))
    assert not gather_launch([again[0][0]], {"dtrain dtrain-34cd": 1}).restarts(gather_launch(*first))


SHOWS = """
import json, os
from dtrain.distributed.torchrun_agent import find_agent
found = find_agent()
print(json.dumps([os.getpid(), os.getppid(), found and [found.agent.pid, found.worker.pid]]), flush=True)
"""


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_agent_is_found_through_wrappers_and_the_worker_is_what_it_started(wrapped: bool) -> None:
    # Like torchrun inside another one: the agent has variables of the outer one.
    script = 'export TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=1; "$@" & echo $$ $!; wait'
    rank = [sys.executable, "-c", SHOWS]
    command = ["sh", "-c", script, "agent", *(["sh", "-c", '"$@"; exit', "wrapper", *rank] if wrapped else rank)]
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "outer"}

    lines = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=50, check=True).stdout

    agent, worker = map(int, lines.splitlines()[0].split())
    pid, _, found = json.loads(lines.splitlines()[1])
    assert found == [agent, worker]
    assert (pid == worker) == (not wrapped)


def test_a_process_without_torchrun_has_no_agent() -> None:
    assert find_agent() is None


# ---------------------------------------------------------------- with the run folder


@pytest.fixture
def started_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[AgentStart | None], None]:
    """Makes this process one that torchrun's agent has started."""

    def use(start: AgentStart | None) -> None:
        for module in ("dtrain.training.run_claim", "dtrain.runs.launch_record", "dtrain.runs.folder"):
            monkeypatch.setattr(f"{module}.find_agent", lambda: start)

    return use


def torchrun_context(restart: int) -> RankContext:
    env = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": str(restart)}
    return replace(ONE_PROCESS, topology=Topology.from_env(env))


def set_clock(folder: Path, days: float) -> None:
    """Gives all files the times that they would have if the clock was off by so many days when they were written."""
    for file in [folder, *folder.rglob("*")]:
        time_ns = file.stat().st_mtime_ns + int(days * DAY_S * 1e9)
        os.utime(file, ns=(time_ns, time_ns))


@pytest.mark.parametrize("days", [-1, 0, 1])
@pytest.mark.parametrize("restart", [0, 1])  # an agent counts only failures of its own ranks
def test_a_restart_keeps_its_own_progress_whatever_the_clock_says(
    tmp_path: Path, started_by: Callable[[AgentStart | None], None], days: float, restart: int
) -> None:
    config = load_config(None, [f"run.output_dir={tmp_path}", "run.name=one", "run.overwrite=true"])
    for number, agent in enumerate((process(1), AGENT)):  # each job overwrites what the one before has left
        started_by(AgentStart(agent, RANK))
        with claimed(config, torchrun_context(0), command="train") as start:
            RunFolder(config.run_dir).metrics.write_text(f'{{"event": "train", "step": {number}}}\n')
        assert start.action == "start"
        assert len(list(tmp_path.glob("one.old-*"))) == number
        set_clock(config.run_dir, days)

    started_by(AgentStart(AGENT, NEXT_RANK))
    with claimed(config, torchrun_context(restart), command="train") as start:
        pass

    assert start.action == "resume"
    assert len(list(tmp_path.glob("one.old-*"))) == 1
    assert "1" in RunFolder(config.run_dir).metrics.read_text()


@pytest.mark.parametrize("days", [-1, 0, 1])
def test_an_error_that_returns_ends_the_restart_at_once_and_only_that(
    tmp_path: Path, started_by: Callable[[AgentStart | None], None], days: float
) -> None:
    config = load_config(None, [f"run.output_dir={tmp_path}", "run.name=one"])
    folder, topology = RunFolder(config.run_dir), torchrun_context(1).topology
    claim(folder, "", launch=record(AGENT, OTHER_NODE))
    started_by(AgentStart(AGENT, RANK))
    write_exit(folder.exit, code=3, cause="DataError", rank=0, host="a", message="no such column")
    set_clock(folder.path, days)

    def told(agent: ProcessIdentity | None, restart: str = "1") -> str | None:
        started_by(None if agent is None else AgentStart(agent, NEXT_RANK))
        env = {"TORCHELASTIC_RESTART_COUNT": restart}
        found = _non_retryable_failure(config, topology, env)
        return None if found is None else str(found["message"])

    assert told(AGENT) == "no such column"
    assert told(OTHER_NODE) == "no such column"
    assert told(AGENT, restart="0") is None
    assert told(process(20)) is None
    assert told(None) is None
    (folder.path / LAUNCHES).unlink()  # the error came before the folder was claimed
    assert told(AGENT) == "no such column"
    assert told(OTHER_NODE) is None
    for text in ("", "[]", '{"code": 3}', '{"code": 3, "launcher": 7}', '{"code": 1}'):
        folder.exit.write_text(text)
        assert told(AGENT) is None


def test_the_variables_are_those_that_torchrun_sets() -> None:
    from torch.distributed.elastic.agent.server import local_elastic_agent
    from torch.distributed.elastic.multiprocessing import api

    text = "".join(Path(str(module.__file__)).read_text() for module in (local_elastic_agent, api))

    assert all(name.decode().rstrip("=") in text for name in torchrun_agent.VARIABLES)

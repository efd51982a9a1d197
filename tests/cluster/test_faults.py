"""Faults on a simulated cluster: how the job ends, how soon it ends on all nodes, and its last line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import jobs
from tests.support.cluster_jobs import (
    BEFORE_IT_STARTS,
    HANG_TIMEOUT_S,
    SCRIPTS,
    WHILE_IT_RUNS,
    ClusterJob,
    kill_last_launcher,
    kill_node,
    started,
)
from tests.support.simulated import SimulatedCluster, needs_cluster, simulated_cluster

pytestmark = [pytest.mark.launchers, needs_cluster, pytest.mark.slow]

DTRAIN, TORCHRUN, DEEPSPEED, MPIRUN = SCRIPTS
nightly = pytest.mark.nightly


def _settings(folder: Path, **more: object) -> list[str]:
    (folder / "runs").mkdir(exist_ok=True)
    endless = {key.replace(".", "__"): value for key, value in jobs.ENDLESS.items()}
    return jobs.settings(folder / "runs", "run", train__hang_timeout=HANG_TIMEOUT_S, **{**endless, **more})


UNDER_TORCHRUN = ("SIGKILL of a rank on node2", "SIGKILL of the launcher on node1")

# Every fault is tried under dtrain's launcher, and every other launcher with two of them; the rest of the product is nightly.
# A daemon of mpirun's that dies is named by mpirun itself, above our last line, and ends it with 1: no test says otherwise.


@pytest.mark.parametrize(
    ("fault", "command"),
    [
        *((fault, DTRAIN) for fault in WHILE_IT_RUNS),
        *((fault, TORCHRUN) for fault in UNDER_TORCHRUN),
        *(pytest.param(fault, TORCHRUN, marks=nightly) for fault in WHILE_IT_RUNS if fault not in UNDER_TORCHRUN),
        ("SIGKILL of the launcher on node2", DEEPSPEED),
        ("node2 without power", DEEPSPEED),
        ("SIGKILL of a rank on node2", MPIRUN),
        ("node2 cut off", MPIRUN),
        pytest.param("SIGKILL of a rank on node2", DEEPSPEED, marks=nightly),
        pytest.param("SIGKILL of the launcher on node1", DEEPSPEED, marks=nightly),
        pytest.param("node2 cut off", DEEPSPEED, marks=nightly),
        pytest.param("node2 without power", MPIRUN, marks=nightly),
    ],
)
def test_a_fault_on_one_node_ends_the_job_on_all_and_is_the_last_line(fault: str, command: str, tmp_path: Path) -> None:
    expected, settings = WHILE_IT_RUNS[fault], _settings(tmp_path)
    with (
        simulated_cluster(2, private=[tmp_path / "runs"]) as cluster,
        started(command, cluster, settings) as job,
    ):
        job.wait_for(" 5/1000000")
        expected.strike(cluster, job)
        code, took_s = job.end()
    assert code == expected.code, job.first.text
    assert took_s < expected.within_s, job.first.text
    assert any(re.search(message, job.last_line()) for message in expected.messages), job.first.text


UNDER_DEEPSPEED = ("python missing on node2", "other data on node2")


@pytest.mark.parametrize(
    ("fault", "command"),
    [
        *((fault, TORCHRUN) for fault in BEFORE_IT_STARTS),
        *((fault, DEEPSPEED) for fault in UNDER_DEEPSPEED),
        *(pytest.param(fault, DEEPSPEED, marks=nightly) for fault in BEFORE_IT_STARTS if fault not in UNDER_DEEPSPEED),
    ],
)
def test_a_host_that_cannot_take_part_is_reported_before_anything_starts(
    fault: str, command: str, tmp_path: Path
) -> None:
    planted, settings = BEFORE_IT_STARTS[fault], _settings(tmp_path)
    runs = tmp_path / "runs"
    with simulated_cluster(2, private=[] if planted.is_found_by_preflight else [runs]) as cluster:
        planted.plant(cluster, tmp_path)
        with started(command, cluster, settings, *planted.options) as job:
            code, took_s = job.end()
        assert code == planted.code, job.first.text
        assert took_s < 10 or not planted.is_found_by_preflight, job.first.text
        assert re.search(planted.message, job.last_line()), job.first.text
        assert not (planted.is_found_by_preflight and (runs / "run").exists())


def test_a_killed_script_leaves_no_process_on_any_node(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    with (
        simulated_cluster(2, private=[tmp_path / "runs"]) as cluster,
        started("launch/deepspeed.sh", cluster, settings) as job,
    ):
        job.wait_for(" 5/1000000")
        job.first.process.kill()
        _, took_s = job.end()
    assert took_s < 10


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_stopped_script_saves_and_exits_with_75(command: str, tmp_path: Path) -> None:
    settings = _settings(tmp_path, checkpoint__every=1000)
    with (
        simulated_cluster(2, private=[tmp_path / "runs"]) as cluster,
        started(command, cluster, settings) as job,
    ):
        job.wait_for(" 5/1000000")
        job.first.process.terminate()
        code, took_s = job.end()
    assert code == 75, job.first.text
    assert took_s < 20
    assert "checkpoint" in job.last_line(), job.first.text


@nightly  # two agents on one machine do the same in training/test_survival.py, and dtrain's launcher below
def test_an_elastic_job_continues_on_the_remaining_node(tmp_path: Path) -> None:
    settings = _settings(tmp_path, train__max_steps=400, checkpoint__every=20)
    elastic = ("--nnodes", "1:2", "--max-restarts", "3")
    with (
        simulated_cluster(2) as cluster,
        started("launch/torchrun.sh", cluster, settings, *elastic) as job,
    ):
        job.wait_for(" 60/400")
        cluster.kill_node("node2")
        code, _ = job.end(240)
    assert code == 0, job.first.text
    summary = jobs.summary_of(tmp_path / "runs" / "run")
    assert (summary["step"], summary["world_size"]) == (400, 1)


@pytest.mark.parametrize(
    ("strike", "spares", "world_size", "reason"),
    [
        pytest.param(kill_node, 1, 2, "node2: no answer for 3 s", id="a spare host for one without power"),
        pytest.param(kill_last_launcher, 0, 1, "node2: its launcher was killed by SIGKILL", id="smaller without one"),
    ],
)
def test_dtrains_launcher_goes_on_with_a_spare_host_or_smaller(
    strike: Callable[[SimulatedCluster, ClusterJob], None], spares: int, world_size: int, reason: str, tmp_path: Path
) -> None:
    settings = _settings(tmp_path, train__max_steps=400, checkpoint__every=20)
    with simulated_cluster(2 + spares) as cluster:
        hosts = cluster.hostfile.read_text()
        cluster.hostfile.write_text(hosts.replace("node3 slots=1", "node3 slots=1 spare"))
        with started(DTRAIN, cluster, settings, "--max-restarts", "1") as job:
            job.wait_for(" 60/400")
            strike(cluster, job)
            begin = time.monotonic()
            job.wait_for("resumes from the checkpoint")
            again_s = time.monotonic() - begin
            code, _ = job.end()
    assert code == 0, job.first.text
    assert reason in job.first.text
    assert "done: 400 steps" in job.first.text
    assert again_s < 10.0, job.first.text
    summary = jobs.summary_of(tmp_path / "runs" / "run")
    assert (summary["step"], summary["world_size"]) == (400, world_size)

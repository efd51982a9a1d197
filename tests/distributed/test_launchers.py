"""Every way to start dtrain trains the same default, with nothing else in the command changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import jobs

pytestmark = pytest.mark.launchers

CUT = ["train.max_steps=3", "train.log_every=1", "data.limit=96", "tracking.tensorboard=false"]
"""The quickstart, cut to three steps and little to evaluate."""


def deepspeed_by_hostfile() -> list[str]:
    return jobs.deepspeed("--no_ssh_check", "--master_addr", "127.0.0.1", "--hostfile", "hostfiles/localhost")


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in jobs.read_events(run)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the default on one process."""
    folder = tmp_path_factory.mktemp("one") / "runs"
    job = jobs.run([*jobs.python(), *CUT, f"run.output_dir={folder}"])
    assert job.process.returncode == 0, job.text
    return folder / "quickstart"


def test_one_process_trains_the_default(one_process: Path) -> None:
    summary = jobs.summary_of(one_process)

    assert (summary["world_size"], summary["engine"], summary["launcher"], summary["step"]) == (1, "single", "none", 3)
    assert len(losses(one_process)) == 3
    assert summary["eval"]["loss"] > 0
    assert (jobs.exit_of(one_process)["code"], jobs.exit_of(one_process)["cause"]) == (0, "done")
    assert (one_process / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("start", "name"),
    [
        pytest.param(jobs.torchrun, "torchrun", id="torchrun"),
        pytest.param(deepspeed_by_hostfile, "deepspeed", id="deepspeed-hostfile", marks=pytest.mark.slow),
        pytest.param(jobs.deepspeed, "deepspeed", id="deepspeed", marks=pytest.mark.nightly),
        pytest.param(jobs.mpirun, "openmpi", id="mpirun", marks=pytest.mark.slow),
    ],
)
def test_a_launcher_trains_the_default_on_two_ranks_with_the_losses_of_one_process(
    tmp_path: Path, one_process: Path, start: Callable[[], list[str]], name: str
) -> None:
    job = jobs.run([*start(), *CUT, f"run.output_dir={tmp_path}"])

    assert job.process.returncode == 0, job.text
    run = tmp_path / "quickstart"
    summary = jobs.summary_of(run)
    assert (summary["world_size"], summary["engine"], summary["launcher"], summary["step"]) == (2, "ddp", name, 3)
    assert losses(run) == pytest.approx(losses(one_process), rel=1e-5)
    assert summary["eval"] == pytest.approx(jobs.summary_of(one_process)["eval"], rel=1e-5)
    assert (jobs.exit_of(run)["code"], jobs.exit_of(run)["cause"]) == (0, "done")
    assert [line for line in job.said if "rank 0 of 2 on 1 node" in line]
    assert not [line for line in job.said if line.startswith("[rank 1]")], "rank 1 has nothing to say"


@pytest.mark.parametrize(
    ("start", "ranks", "stage"),
    [
        pytest.param(jobs.python, 1, 0, id="python-zero0"),
        pytest.param(jobs.mpirun, 2, 2, id="mpirun-zero2", marks=pytest.mark.nightly),
    ],
)
def test_the_deepspeed_engine_does_not_need_the_deepspeed_launcher(
    tmp_path: Path, one_process: Path, start: Callable[[], list[str]], ranks: int, stage: int
) -> None:
    chosen = ["engine.name=deepspeed", f"engine.zero_stage={stage}"]

    job = jobs.run([*start(), *CUT, *chosen, f"run.output_dir={tmp_path}"])

    assert job.process.returncode == 0, job.text
    summary = jobs.summary_of(tmp_path / "quickstart")
    assert (summary["world_size"], summary["engine"]) == (ranks, "deepspeed")
    assert losses(tmp_path / "quickstart") == pytest.approx(losses(one_process), rel=1e-5)


def torchrun_node(rank: int, port: int) -> list[str]:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "dtrain"]
    # By number: the machine's own name need not resolve.
    return jobs.torchrun(2, "--nnodes", "2", "--node-rank", str(rank), "--local-addr", "127.0.0.1", *meeting)


def deepspeed_node(rank: int, port: int) -> list[str]:
    start = [jobs.launcher("deepspeed"), "--no_ssh", "--node_rank", str(rank), "--master_addr", "127.0.0.1"]
    return [*start, "--master_port", str(port), "--hostfile", "HOSTFILE", jobs.MAIN]


@pytest.mark.nightly  # launch/torchrun.sh and launch/deepspeed.sh do the same on the hosts of a simulated cluster
@pytest.mark.parametrize(
    ("node", "ranks"),
    [pytest.param(torchrun_node, 4, id="torchrun"), pytest.param(deepspeed_node, 3, id="deepspeed-uneven")],
)
def test_two_nodes_train_the_default_together(
    tmp_path: Path, one_process: Path, node: Callable[[int, int], list[str]], ranks: int
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=2\nlocalhost slots=1\n")
    port = jobs.free_port()
    first, second = ([str(hostfile) if word == "HOSTFILE" else word for word in node(rank, port)] for rank in range(2))
    ends = [*CUT, f"run.output_dir={tmp_path}"]

    with jobs.started([*first, *ends]) as one, jobs.started([*second, *ends]) as two:
        codes = [one.end(), two.end()]

    assert codes == [0, 0], one.text + two.text
    summary = jobs.summary_of(tmp_path / "quickstart")
    assert (summary["world_size"], summary["engine"]) == (ranks, "ddp")
    assert f"rank 0 of {ranks} on 2 nodes" in one.text + two.text
    assert losses(tmp_path / "quickstart") == pytest.approx(losses(one_process), rel=1e-5)

"""A job on a simulated cluster has the losses of one process, whichever command starts it. Over real ssh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import jobs
from tests.support.cluster_jobs import LITERAL, SCRIPTS, started
from tests.support.simulated import SimulatedCluster, needs_cluster, simulated_cluster

pytestmark = [pytest.mark.launchers, needs_cluster, pytest.mark.slow]

SHAPES = {"3 nodes x 1 rank": [1, 1, 1], "2 nodes x 2 ranks": [2, 2], "1 rank and 2": [1, 2]}
PAIRS = {
    "3 nodes x 1 rank": ("launch/torchrun.sh", "launch/mpirun.sh"),
    "2 nodes x 2 ranks": ("launch/deepspeed.sh", "torchrun"),
    "1 rank and 2": (*SCRIPTS, *LITERAL),
}
"""Every command to start a job, and two ways on every shape; the rest of the product is nightly."""

ON_ONE_SHAPE = [pytest.param(shape, marks=[] if shape == "1 rank and 2" else pytest.mark.nightly) for shape in SHAPES]
"""For what does not depend on the shape."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clusters") / "runs"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, folder: Path) -> Iterator[SimulatedCluster]:
    slots = SHAPES[request.param]
    with simulated_cluster(len(slots), slots=slots) as found:
        yield found


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The loss of every step on one process."""
    job = jobs.run([*jobs.python(), *jobs.settings(folder, "alone")])
    assert job.process.returncode == 0, job.text
    return losses(folder / "alone")


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in jobs.read_events(run)]


@pytest.mark.parametrize(
    ("cluster", "command"),
    [
        pytest.param(shape, command, marks=[] if command in PAIRS[shape] else pytest.mark.nightly)
        for shape in SHAPES
        for command in (*SCRIPTS, *LITERAL)
    ],
    indirect=["cluster"],
)
def test_every_way_to_start_it_gives_the_losses_of_one_process(
    command: str, cluster: SimulatedCluster, folder: Path, alone: list[float]
) -> None:
    name = f"{Path(command).name}-{len(cluster.names)}"
    with started(command, cluster, jobs.settings(folder, name, run__overwrite="true")) as job:
        code, _ = job.end()
    assert code == 0, job.first.text
    assert losses(folder / name) == pytest.approx(alone, rel=1e-5)
    assert jobs.summary_of(folder / name)["world_size"] == sum(cluster.status(node)["slots"] for node in cluster.names)


@pytest.mark.parametrize("cluster", ON_ONE_SHAPE, indirect=True)
def test_no_secret_leaves_the_node_unless_it_is_exported(
    cluster: SimulatedCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_shown")
    monkeypatch.setenv("MINE", "exported_never_shown")
    settings = jobs.settings(folder, "secret", **_endless())
    with started("launch/torchrun.sh", cluster, settings, "--export", "MINE") as job:
        job.wait_for(" 5/1000000")
        # Ranks on node1, where the script runs, have the script's environment, so this looks at another node.
        env = jobs._environment(job.ranks()[-1])
        job.first.process.terminate()
        job.end()
    assert "HF_TOKEN" not in env
    assert env["MINE"] == "exported_never_shown"
    assert "never_shown" not in job.first.text
    assert not any("never_shown" in file.read_text() for file in (folder / "secret").glob("*.*"))


def _endless() -> dict[str, str]:
    return {key.replace(".", "__"): value for key, value in jobs.ENDLESS.items()}


@pytest.mark.parametrize("cluster", ON_ONE_SHAPE, indirect=True)
def test_ranks_meet_on_the_cluster_interface_only(cluster: SimulatedCluster, folder: Path) -> None:
    with started("launch/deepspeed.sh", cluster, jobs.settings(folder, "bound", **_endless())) as job:
        job.wait_for(" 5/1000000")
        output = cluster.exec("node1", ["ss", "-Hltnp"]).stdout
        job.first.process.terminate()
        job.end()
    addresses = [line.split()[3] for line in output.splitlines() if "python" in line]
    assert addresses
    assert all(address.startswith(cluster.address("node1")) for address in addresses), output

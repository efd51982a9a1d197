"""Jobs on a simulated cluster, started in each way that users start them, and what can go wrong with them.

with simulated_cluster(2, private=[runs]) as cluster, started("launch/torchrun.sh", cluster, settings) as job:
    job.wait_for("step 5/")
    ...
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from dtrain.cluster.run_job import LEASH
from tests.support import jobs
from tests.support.simulated import SimulatedCluster

SCRIPTS = ("launch/torchrun.sh", "launch/deepspeed.sh", "launch/mpirun.sh")
LITERAL = ("torchrun", "deepspeed")
MAIN = str(jobs.ROOT / jobs.MAIN)
PYTHON = str(jobs.BIN / "python")
PORT = "29500"
"""Where ranks meet that torchrun or deepspeed starts, typed by hand."""


@dataclass
class ClusterJob:
    """One job: what was typed, on one node or on each. The first is what the user looks at."""

    typed: list[jobs.Job]

    @property
    def first(self) -> jobs.Job:
        return self.typed[0]

    def wait_for(self, text: str) -> None:
        self.first.wait_for(text)

    def ranks(self) -> list[int]:
        """Processes that run dtrain, in the order of ranks, wherever they are."""
        found = {pid: rank_of(pid) for job in self.typed for pid in job.ranks()}
        return sorted(found, key=lambda pid: found[pid])

    def launchers(self) -> dict[str, int]:
        """By node: the process that started its ranks."""
        return {jobs._environment(pid).get("HOSTNAME", ""): parent_of(pid) for pid in self.ranks()}

    def left(self) -> dict[int, list[str]]:
        """What still runs of it, on any node, leashes included."""
        marked = {pid: words for job in self.typed for pid, words in job.members().items()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if str(LEASH) in words[1:3]:
                marked[int(folder.name)] = words
        return marked

    def has_ended(self) -> bool:
        """Whether all that was typed has. A process that is just turning into another program has no environment yet,
        and so no mark: while a job starts there may be none of it in sight."""
        return all(job.has_ended() for job in self.typed)

    def end(self, limit_s: float = jobs.LIMIT_S) -> tuple[int, float]:
        """The exit code of what the user looks at, and the seconds until nothing was left anywhere."""
        begin = time.monotonic()
        deadline = begin + limit_s
        while ((left := self.left()) or not self.has_ended()) and time.monotonic() < deadline:
            time.sleep(0.05)
        took = time.monotonic() - begin
        is_over = not left and self.has_ended()
        assert is_over, f"still there after {limit_s:.0f} s: {left}; it printed:\n{self.first.text}"
        return self.first.end(10), took

    def last_line(self) -> str:
        """The last thing that the user sees of it."""
        said = [line for line in self.first.out if line.strip()]
        return said[-1] if said else ""

    def last_of_dtrain(self) -> str:
        """The last line with a message of dtrain's, from any rank."""
        found = [line for job in self.typed for line in job.out if "error:" in line]
        return found[-1] if found else ""


def rank_of(pid: int) -> int:
    env = jobs._environment(pid)
    return int(env.get("RANK", env.get("OMPI_COMM_WORLD_RANK", "0")))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def started(way: str, cluster: SimulatedCluster, settings: Sequence[str], *options: str) -> Iterator[ClusterJob]:
    """Starts the job from node1 (a torchrun typed by hand: on every node).

    options: of the launch script.
    """
    env = {**cluster.env, "PYTHON": PYTHON, "PATH": f"{jobs.BIN}{os.pathsep}{os.environ['PATH']}"}
    mark = uuid.uuid4().hex
    with ExitStack() as stack, NamedTemporaryFile("w", suffix=".deepspeed_env") as travels:
        # What deepspeed, typed by hand, does not pass on by itself.
        travels.write(f"{jobs.MARK}={mark}\nOMP_NUM_THREADS=1\n")
        travels.flush()
        env["DS_ENV_FILE"] = travels.name
        typed = [
            stack.enter_context(jobs.started(cluster.command(node, words), env=env, mark=mark))
            for node, words in _typed(way, cluster, settings, options)
        ]
        yield ClusterJob(typed)


def _typed(
    way: str, cluster: SimulatedCluster, settings: Sequence[str], options: Sequence[str]
) -> list[tuple[str, list[str]]]:
    if way in SCRIPTS:
        return [("node1", [str(jobs.ROOT / way), str(cluster.hostfile), *options, *settings])]
    if way == "deepspeed":
        words = [jobs.launcher("deepspeed"), "--hostfile", str(cluster.hostfile), *options, MAIN, *settings]
        return [("node1", words)]
    assert way == "torchrun"
    meeting = ["--nnodes", str(len(cluster.names)), "--master-addr", "node1", "--master-port", PORT]
    nodes = {node: cluster.status(node) for node in cluster.names}
    return [
        (
            node,
            [
                jobs.launcher("torchrun"),
                *meeting,
                "--node-rank",
                str(place),
                "--nproc-per-node",
                str(nodes[node]["slots"]),
                MAIN,
            ]
            + list(settings),
        )
        for place, node in enumerate(cluster.names)
        if nodes[node]["state"] == "up"  # nobody can type it on one that is off
    ]


# ---------------------------------------------------------------- faults


def kill_rank(cluster: SimulatedCluster, job: ClusterJob) -> None:
    os.kill(job.ranks()[-1], signal.SIGKILL)


def kill_last_launcher(cluster: SimulatedCluster, job: ClusterJob) -> None:
    os.kill(parent_of(job.ranks()[-1]), signal.SIGKILL)


def kill_first_launcher(cluster: SimulatedCluster, job: ClusterJob) -> None:
    os.kill(parent_of(job.ranks()[0]), signal.SIGKILL)


def cut(cluster: SimulatedCluster, job: ClusterJob) -> None:
    cluster.cut("node2")


def kill_node(cluster: SimulatedCluster, job: ClusterJob) -> None:
    cluster.kill_node("node2")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong while a job runs.

    within_s: how long everything may take to end everywhere. told: what the last line has to say, one of these.
    """

    strike: Callable[[SimulatedCluster, ClusterJob], None]
    within_s: float
    told: tuple[str, ...]


HANG_TIMEOUT_S = 10

WHILE_IT_RUNS = {
    "SIGKILL of a rank on node2": Fault(kill_rank, 10.0, (r"node2\) died without a word",)),
    "SIGKILL of the launcher on node2": Fault(
        kill_last_launcher, 10.0, (r"node2: .* was killed by SIGKILL", "node2.* died")
    ),
    "SIGKILL of the launcher on node1": Fault(
        kill_first_launcher, 10.0, (r"node1: .* was killed by SIGKILL", "node1.* died", "launcher .* has died")
    ),
    "node2 cut off": Fault(cut, HANG_TIMEOUT_S + 10.0, (r"node2\) hangs: nothing has been heard of it",)),
    "node2 without power": Fault(kill_node, HANG_TIMEOUT_S + 10.0, ("node2",)),
}


def replace_on(cluster: SimulatedCluster, node: str, path: Path, by: Path) -> None:
    """One node sees `by` where the others see `path`."""
    cluster.exec(node, ["mount", "--bind", str(by), str(path)], check=True)


def node_off(cluster: SimulatedCluster, folder: Path) -> None:
    cluster.kill_node("node2")


def wrong_key(cluster: SimulatedCluster, folder: Path) -> None:
    cluster.exec("node2", ["sh", "-c", "rm ~/.ssh/authorized_keys"], check=True)


def unknown_host_key(cluster: SimulatedCluster, folder: Path) -> None:
    cluster.exec("node1", ["sh", "-c", "sed -i /node2/d ~/.ssh/known_hosts"], check=True)


def no_sshd(cluster: SimulatedCluster, folder: Path) -> None:
    cluster.exec("node2", ["pkill", "-x", "sshd"], check=True)


def no_python(cluster: SimulatedCluster, folder: Path) -> None:
    empty = folder / "empty"
    empty.mkdir()
    replace_on(cluster, "node2", jobs.BIN, empty)


def other_torch(cluster: SimulatedCluster, folder: Path) -> None:
    """What pip knows of it; nothing else is looked at before the job starts."""
    (metadata,) = [
        Path(str(file.locate())) for file in importlib.metadata.files("torch") or () if file.name == "METADATA"
    ]
    other = folder / "METADATA"
    other.write_text(
        metadata.read_text().replace(f"Version: {importlib.metadata.version('torch')}", "Version: 2.12.0", 1)
    )
    replace_on(cluster, "node2", metadata, other)


def other_code(cluster: SimulatedCluster, folder: Path) -> None:
    other = folder / "loop.py"
    other.write_text((jobs.ROOT / "dtrain" / "training" / "loop.py").read_text() + "# mended here only\n")
    replace_on(cluster, "node2", jobs.ROOT / "dtrain" / "training" / "loop.py", other)


def clock_off(cluster: SimulatedCluster, folder: Path) -> None:
    """Every Python of the node says an hour more."""
    clock, own = folder / "clock", folder / "bin"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 3600\n")
    shutil.copytree(jobs.BIN, own, symlinks=True)
    wrapper = own / Path(PYTHON).name
    wrapper.unlink()
    wrapper.write_text(f'#!/bin/bash\nexport PYTHONPATH={clock}\nexec -a {PYTHON} {Path(PYTHON).resolve()} "$@"\n')
    wrapper.chmod(0o755)
    replace_on(cluster, "node2", jobs.BIN, own)


def port_taken(cluster: SimulatedCluster, folder: Path) -> None:
    listen = f"import socket; s = socket.create_server(('', {PORT})); print('there', flush=True); input()"
    holder = cluster.start("node1", [PYTHON, "-c", listen], stdin=-1)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "there\n"


def other_data(cluster: SimulatedCluster, folder: Path) -> None:
    """A label of the examples that jobs.settings has made in the folder is another."""
    train, other = folder / "made" / "cola" / "train.tsv", folder / "other.tsv"
    other.write_text(train.read_text().replace("\t1\t", "\t0\t", 1))
    replace_on(cluster, "node2", train, other)


@dataclass(frozen=True)
class Planted:
    """Something that is wrong before a job is started.

    told: what the last line has to say. code: the exit code. options: of the launch script.
    is_seen_at_once: a look at the hosts finds it, so that nothing is started.
    """

    plant: Callable[[SimulatedCluster, Path], None]
    told: str
    code: int = 4
    options: tuple[str, ...] = ()
    is_seen_at_once: bool = True


BEFORE_IT_STARTS = {
    "node2 off": Planted(node_off, r"node2: (it does not answer|there is no way to it)"),
    "sshd of node2 stopped": Planted(no_sshd, "node2: it is there, but no sshd answers"),
    "wrong key": Planted(wrong_key, "node2: its sshd does not take your key"),
    "unknown host key": Planted(unknown_host_key, "node2: its host key is not known here"),
    "python missing on node2": Planted(no_python, "node2: there is no Python at"),
    "another torch on node2": Planted(other_torch, r"node2: torch 2\.12\.0, but .* on node1"),
    "other code on node2": Planted(other_code, "node2: dtrain's code is another than on node1"),
    "clock of node2 an hour ahead": Planted(clock_off, "node2: its clock is 3600 s ahead"),
    "port taken on node1": Planted(port_taken, f"node1: port {PORT} is taken there", options=("--master-port", PORT)),
    "other data on node2": Planted(
        other_data, r"the data \(train\) on node2 differ from those on node1", code=3, is_seen_at_once=False
    ),
}
"""What is planted on a cluster of two nodes, and what the user reads."""

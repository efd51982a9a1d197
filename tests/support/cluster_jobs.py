"""Jobs on a simulated cluster, started by each command that users may use, and faults for them.

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

from dtrain.cluster.run_job import SUPERVISOR
from dtrain.distributed.launcher_env import NODE_RANK
from tests.support import jobs
from tests.support.simulated import SimulatedCluster

SCRIPTS = ("launch/dtrain.sh", "launch/torchrun.sh", "launch/deepspeed.sh", "launch/mpirun.sh")
LITERAL = ("torchrun", "deepspeed")
MAIN = str(jobs.ROOT / jobs.MAIN)
PYTHON = str(jobs.BIN / "python")
PORT = "29500"
"""The master's port of a job that is started by torchrun or deepspeed directly."""


@dataclass
class ClusterJob:
    """One job.

    Attributes:
        typed: the commands that the user started, on one node or on each. The user watches the first.
    """

    typed: list[jobs.Job]

    @property
    def first(self) -> jobs.Job:
        return self.typed[0]

    def wait_for(self, text: str) -> None:
        self.first.wait_for(text)

    def ranks(self) -> list[int]:
        """Returns the processes that run dtrain on any node, in the order of ranks."""
        found = {pid: rank_of(pid) for job in self.typed for pid in job.ranks()}
        return sorted(
            found, key=lambda pid: (found[pid], pid)
        )  # forks of one launcher are in the order of their starts

    def launchers(self) -> dict[str, int]:
        """Returns, by node, the process that started its ranks."""
        return {jobs._environment(pid).get("HOSTNAME", ""): parent_of(pid) for pid in self.ranks()}

    def remaining(self) -> dict[int, list[str]]:
        """Returns the job's processes on any node, supervisors included."""
        marked = {pid: words for job in self.typed for pid, words in job.members().items()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if str(SUPERVISOR) in words[1:3]:
                marked[int(folder.name)] = words
        return marked

    def has_ended(self) -> bool:
        """Returns whether all started commands have ended.

        `remaining` alone is not enough: a process that is just executing another program has no environment, and so no
        mark, so that while a job starts, no process may be found.
        """
        return all(job.has_ended() for job in self.typed)

    def end(self, limit_s: float = jobs.LIMIT_S) -> tuple[int, float]:
        """Returns the exit code of the first command, and the seconds until no process was left on any node."""
        begin = time.monotonic()
        deadline = begin + limit_s
        while ((left := self.remaining()) or not self.has_ended()) and time.monotonic() < deadline:
            time.sleep(0.05)
        took = time.monotonic() - begin
        is_over = not left and self.has_ended()
        assert is_over, f"still there after {limit_s:.0f} s: {left}; it printed:\n{self.first.text}"
        return self.first.end(10), took

    def last_line(self) -> str:
        """Returns the last line that the user sees."""
        lines = [line for line in self.first.out if line.strip()]
        return lines[-1] if lines else ""

    def last_of_dtrain(self) -> str:
        """Returns the last line with an error message of dtrain, from any rank."""
        lines = [line for job in self.typed for line in job.out if "error:" in line]
        return lines[-1] if lines else ""


def rank_of(pid: int) -> int:
    env = jobs._environment(pid)
    return int(env.get("RANK", env.get("OMPI_COMM_WORLD_RANK", env.get(NODE_RANK, "0"))))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def started(command: str, cluster: SimulatedCluster, settings: Sequence[str], *options: str) -> Iterator[ClusterJob]:
    """Starts the job from node1; with torchrun, on every node.

    Args:
        command: one of SCRIPTS or LITERAL.
        options: options of the launch script.
    """
    env = {**cluster.env, "PYTHON": PYTHON, "PATH": f"{jobs.BIN}{os.pathsep}{os.environ['PATH']}"}
    mark = uuid.uuid4().hex
    with ExitStack() as stack, NamedTemporaryFile("w", suffix=".deepspeed_env") as env_file:
        # Variables that deepspeed does not forward by itself.
        env_file.write(f"{jobs.MARK}={mark}\nOMP_NUM_THREADS=1\n")
        env_file.flush()
        env["DS_ENV_FILE"] = env_file.name
        typed = [
            stack.enter_context(jobs.started(cluster.command(node, words), env=env, mark=mark))
            for node, words in _typed(command, cluster, settings, options)
        ]
        yield ClusterJob(typed)


def _typed(
    command: str, cluster: SimulatedCluster, settings: Sequence[str], options: Sequence[str]
) -> list[tuple[str, list[str]]]:
    if command in SCRIPTS:
        return [("node1", [str(jobs.ROOT / command), str(cluster.hostfile), *options, *settings])]
    if command == "deepspeed":
        words = [jobs.launcher("deepspeed"), "--hostfile", str(cluster.hostfile), *options, MAIN, *settings]
        return [("node1", words)]
    assert command == "torchrun"
    rendezvous = ["--nnodes", str(len(cluster.names)), "--master-addr", "node1", "--master-port", PORT]
    nodes = {node: cluster.status(node) for node in cluster.names}
    return [
        (
            node,
            [
                jobs.launcher("torchrun"),
                *rendezvous,
                "--node-rank",
                str(place),
                "--nproc-per-node",
                str(nodes[node]["slots"]),
                MAIN,
            ]
            + list(settings),
        )
        for place, node in enumerate(cluster.names)
        if nodes[node]["state"] == "up"  # no command can be started on a node that is off
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
    """A fault while a job runs.

    Attributes:
        strike: causes the fault.
        within_s: time until no process may be left on any node.
        messages: patterns, one of which the last line must match.
        code: exit code of the script.
    """

    strike: Callable[[SimulatedCluster, ClusterJob], None]
    within_s: float
    messages: tuple[str, ...]
    code: int = 4


SAVED = r"launcher \(\w+\) on %s has died.* The checkpoint is saved"
"""The ranks outlive their launcher, so they save."""


HANG_TIMEOUT_S = 10

WHILE_IT_RUNS = {
    "SIGKILL of a rank on node2": Fault(kill_rank, 10.0, (r"node2\) exited without an error message",)),
    "SIGKILL of the launcher on node2": Fault(kill_last_launcher, 10.0, (SAVED % "node2",), code=75),
    "SIGKILL of the launcher on node1": Fault(kill_first_launcher, 10.0, (SAVED % "node1",), code=75),
    "node2 cut off": Fault(cut, HANG_TIMEOUT_S + 10.0, (r"node2\) hangs: no sign of life",)),
    "node2 without power": Fault(kill_node, HANG_TIMEOUT_S + 10.0, ("node2",)),
}


def replace_on(cluster: SimulatedCluster, node: str, path: Path, by: Path) -> None:
    """Makes one node see `by` at the path `path`."""
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
    """Changes the version in torch's metadata, which is all that is checked before a job starts."""
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
    other.write_text((jobs.ROOT / "dtrain" / "training" / "loop.py").read_text() + "# changed on this node only\n")
    replace_on(cluster, "node2", jobs.ROOT / "dtrain" / "training" / "loop.py", other)


def clock_off(cluster: SimulatedCluster, folder: Path) -> None:
    """Makes the clock of every Python on the node an hour fast."""
    clock, bin_folder = folder / "clock", folder / "bin"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 3600\n")
    shutil.copytree(jobs.BIN, bin_folder, symlinks=True)
    wrapper = bin_folder / Path(PYTHON).name
    wrapper.unlink()
    wrapper.write_text(f'#!/bin/bash\nexport PYTHONPATH={clock}\nexec -a {PYTHON} {Path(PYTHON).resolve()} "$@"\n')
    wrapper.chmod(0o755)
    replace_on(cluster, "node2", jobs.BIN, bin_folder)


def port_taken(cluster: SimulatedCluster, folder: Path) -> None:
    listen = f"import socket; s = socket.create_server(('', {PORT})); print('ready', flush=True); input()"
    holder = cluster.start("node1", [PYTHON, "-c", listen], stdin=-1)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"


def other_data(cluster: SimulatedCluster, folder: Path) -> None:
    """Changes a label of the examples that jobs.settings has made in the folder."""
    train, other = folder / "made" / "cola" / "train.tsv", folder / "other.tsv"
    other.write_text(train.read_text().replace("\t1\t", "\t0\t", 1))
    replace_on(cluster, "node2", train, other)


@dataclass(frozen=True)
class Planted:
    """A fault before a job is started.

    Attributes:
        plant: causes the fault.
        message: a pattern that the last line must match.
        code: the exit code.
        options: options of the launch script.
        is_found_by_preflight: the check of the hosts finds it, so that nothing is started.
    """

    plant: Callable[[SimulatedCluster, Path], None]
    message: str
    code: int = 4
    options: tuple[str, ...] = ()
    is_found_by_preflight: bool = True


BEFORE_IT_STARTS = {
    "node2 off": Planted(node_off, r"node2: (it does not answer|there is no route to it)"),
    "sshd of node2 stopped": Planted(no_sshd, "node2: the host is up, but no sshd answers"),
    "wrong key": Planted(wrong_key, "node2: its sshd rejects your key"),
    "unknown host key": Planted(unknown_host_key, "node2: its host key is not known here"),
    "python missing on node2": Planted(no_python, "node2: there is no Python at"),
    "another torch on node2": Planted(other_torch, r"node2: torch 2\.12\.0, but .* on node1"),
    "other code on node2": Planted(other_code, "node2: dtrain's code differs from node1"),
    "clock of node2 an hour ahead": Planted(clock_off, "node2: its clock is 3600 s ahead"),
    "port taken on node1": Planted(port_taken, f"node1: port {PORT} is in use there", options=("--master-port", PORT)),
    "other data on node2": Planted(
        other_data, r"the data \(train\) on node2 differ from those on node1", code=3, is_found_by_preflight=False
    ),
}
"""Faults on a cluster of two nodes."""

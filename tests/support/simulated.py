"""A simulated cluster for a test: nodes with a network, processes and an ssh server of their own, on this machine.

    with simulated_cluster(3, slots=2, rate_mbit=1000, delay_ms=5, private=[runs]) as cluster:
        cluster.exec("node1", ["ssh", "node2", "hostname"]).stdout
        with jobs.started(cluster.command("node1", jobs.torchrun())) as job: ...
        cluster.cut("node2")

Its state and hostfile are in a temporary folder, so that a test does not disturb a cluster that is already up. At the end
the cluster is taken down, with all processes on its nodes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import until

ROOT = Path(__file__).resolve().parents[2]
SIMULATE = str(ROOT / "launch" / "simulate-cluster")
LIMIT_S = 60.0
"""How long a command may take; most take less than a second."""

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def why_not() -> str | None:
    """Returns why this machine cannot run a simulated cluster; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a simulated cluster needs Linux and root"
    if not Path("/dev/net/tun").exists():
        return "a simulated cluster needs /dev/net/tun"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"a simulated cluster needs {', '.join(missing)}: launch/simulate-cluster install" if missing else None


needs_cluster = pytest.mark.cluster
"""For tests that start a cluster; conftest.py skips them if `why_not` returns a reason."""


@dataclass
class SimulatedCluster:
    """A running cluster.

    Attributes:
        folder: its state.
        hostfile: its nodes and slots.
        names: the names of its nodes.
        env: variables that a command of `command` needs in its environment.
        running: processes that `start` has started.
    """

    folder: Path
    hostfile: Path
    names: list[str]
    env: dict[str, str]
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, node: str, command: Sequence[str]) -> list[str]:
        """Returns the command that runs `command` on the node, in this folder; signals and the exit code are passed on.

        Its environment must include `env`.
        """
        return [SIMULATE, "exec", node, *command]

    def exec(
        self, node: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a node to its end, by default for LIMIT_S at most.

        Args:
            env: variables in addition to this environment.
            more: arguments of subprocess.run.
        """
        return self.run("exec", node, *command, env=env, **more)

    def start(
        self, node: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        """Starts a command on a node, with pipes to its output; it is ended with the cluster."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        environment = {**os.environ, **(env or {}), **self.env}
        process: subprocess.Popen[str] = subprocess.Popen(
            self.command(node, command), env=environment, text=True, errors="replace", **pipes
        )
        self.running.append(process)
        return process

    def cut(self, node: str) -> None:
        """Drops all packets from and to the node from now on."""
        self.run("cut", node, check=True)

    def heal(self, node: str) -> None:
        self.run("heal", node, check=True)

    def kill_node(self, node: str) -> None:
        """Ends the node as a power loss would."""
        self.run("kill", node, check=True)

    def address(self, node: str) -> str:
        address: str = self.status(node)["address"]
        return address

    def status(self, node: str) -> dict[str, Any]:
        """Returns address, slots, state, cut, sent_bytes, received_bytes and dropped_packets."""
        nodes = json.loads(self.run("status", "--json", check=True).stdout)["nodes"]
        found: dict[str, Any] = next(each for each in nodes if each["node"] == node)
        return found

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs launch/simulate-cluster.

        Args:
            more: arguments of subprocess.run.
        """
        return simulate(*arguments, env={**os.environ, **(env or {}), **self.env}, **more)

    def end_started(self) -> None:
        """Kills all processes of `start`. A test that shares the cluster with other tests calls it at its end."""
        for process in self.running:
            process.kill()  # and the command on the node with it
            process.wait(LIMIT_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.running.clear()


@contextmanager
def simulated_cluster(
    count: int,
    *,
    slots: int | Sequence[int] = 1,
    delay_ms: float = 0.0,
    rate_mbit: float | None = None,
    private: Sequence[Path | str] = (),
) -> Iterator[SimulatedCluster]:
    """Starts a cluster of `count` nodes, named node1 and up. Skips the test if this machine cannot run one.

    Args:
        slots: ranks in the hostfile, one number for all nodes or one for each.
        delay_ms: delay of each node's link in each direction.
        rate_mbit: rate of each node's link in each direction; None for no limit.
        private: folders that each node has its own copy of.
    """
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="dtrain-cluster-") as made:
        folder, hostfile = Path(made) / "state", Path(made) / "hostfile"
        names = [f"node{number}" for number in range(1, count + 1)]
        cluster = SimulatedCluster(folder, hostfile, names, {"DTRAIN_CLUSTER_DIR": str(folder)})
        each = [slots] if isinstance(slots, int) else slots
        options = ["--delay", str(delay_ms), "--slots", ",".join(map(str, each)), "--hostfile", str(hostfile)]
        if rate_mbit is not None:
            options += ["--rate", str(rate_mbit)]
        for path in private:
            options += ["--private", str(path)]
        try:
            started = cluster.run("up", str(count), *options)
            assert started.returncode == 0, started.stdout + started.stderr
            yield cluster
        finally:
            ended = cluster.run("down")
            cluster.end_started()
            assert ended.returncode == 0, ended.stderr


def simulate(*arguments: str, env: Mapping[str, str], **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs launch/simulate-cluster.

    Args:
        more: arguments of subprocess.run.
    """
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": LIMIT_S, **more}
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([SIMULATE, *arguments], env=env, **options)


def processes_with(word: str) -> dict[int, str]:
    """Returns the processes, on all nodes and on this machine, with a word in their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in command and int(path.parent.name) != os.getpid():
                found[int(path.parent.name)] = command
    return found


def gone(word: str, *, but: str | None = None, seconds: float = 10.0) -> bool:
    """Returns whether the processes with a word in their command lines end in time, except those that have `but` too."""
    return until(lambda: all(but is not None and but in command for command in processes_with(word).values()), seconds)

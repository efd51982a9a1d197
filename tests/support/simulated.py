"""A simulated cluster for a test: nodes with a network, processes and an ssh server of their own, on this machine.

    with simulated_cluster(3, slots=2, rate_mbit=1000, delay_ms=5, private=[runs]) as cluster:
        cluster.exec("node1", ["ssh", "node2", "hostname"]).stdout
        with jobs.started(cluster.command("node1", jobs.torchrun())) as job: ...
        cluster.cut("node2")

Its state and hostfile lie in a folder of their own, so that a test does not meet a cluster that somebody has up. At the
end everything is taken down, with whatever runs on the nodes.
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
    """What a simulated cluster lacks on this machine; None if nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a simulated cluster needs Linux and root"
    if not Path("/dev/net/tun").exists():
        return "a simulated cluster needs /dev/net/tun"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"a simulated cluster needs {', '.join(lacking)}: launch/simulate-cluster install" if lacking else None


needs_cluster = pytest.mark.cluster
"""For tests that bring one up; conftest.py skips them where `why_not` has a reason."""


@dataclass
class SimulatedCluster:
    """One that is up.

    folder: its state. hostfile: its nodes and slots. env: what `command` needs to find it; pass it on with them.
    """

    folder: Path
    hostfile: Path
    names: list[str]
    env: dict[str, str]
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, node: str, command: Sequence[str]) -> list[str]:
        """What to run here so that `command` runs on the node: in this folder, its signals and exit code passed on.

        Its environment must have `env`.
        """
        return [SIMULATE, "exec", node, *command]

    def exec(
        self, node: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a node to its end, LIMIT_S at most unless `timeout` says otherwise.

        env: on top of this environment. more: arguments of subprocess.run.
        """
        return self.run("exec", node, *command, env=env, **more)

    def start(
        self, node: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        """Starts a command on a node, output and errors in pipes; it is ended with the cluster."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        environment = {**os.environ, **(env or {}), **self.env}
        process: subprocess.Popen[str] = subprocess.Popen(
            self.command(node, command), env=environment, text=True, errors="replace", **pipes
        )
        self.running.append(process)
        return process

    def cut(self, node: str) -> None:
        """What the node sends and what is sent to it is lost from now on; nobody is told."""
        self.run("cut", node, check=True)

    def heal(self, node: str) -> None:
        self.run("heal", node, check=True)

    def kill_node(self, node: str) -> None:
        """The node loses power."""
        self.run("kill", node, check=True)

    def address(self, node: str) -> str:
        address: str = self.status(node)["address"]
        return address

    def status(self, node: str) -> dict[str, Any]:
        """address, slots, state, cut, sent_bytes, received_bytes, dropped_packets."""
        nodes = json.loads(self.run("status", "--json", check=True).stdout)["nodes"]
        found: dict[str, Any] = next(each for each in nodes if each["node"] == node)
        return found

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """launch/simulate-cluster with these arguments. more: arguments of subprocess.run."""
        return simulate(*arguments, env={**os.environ, **(env or {}), **self.env}, **more)

    def end_started(self) -> None:
        """Kills what `start` started and still runs; a test that keeps the cluster for others does so at its end."""
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
    """A cluster of `count` nodes, node1 and up. Skips the test where none can be.

    slots: ranks in the hostfile, of each node or one number each. delay_ms, rate_mbit: of each node's link, each way.
    private: folders of which each node has one of its own.
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
    """launch/simulate-cluster with these arguments. more: arguments of subprocess.run."""
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": LIMIT_S, **more}
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([SIMULATE, *arguments], env=env, **options)


def processes_with(word: str) -> dict[int, str]:
    """Processes, on all nodes and outside, with that word in their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in command and int(path.parent.name) != os.getpid():
                found[int(path.parent.name)] = command
    return found


def gone(word: str, *, but: str | None = None, seconds: float = 10.0) -> bool:
    """Whether no process has that word in its command line any more, or only ones that have `but` as well."""
    return until(lambda: all(but is not None and but in command for command in processes_with(word).values()), seconds)

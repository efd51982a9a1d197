"""A simulated cluster as it is written down: its folder, its nodes, and the processes that are its."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
MOST_NODES = 64
NODE_FOLDER = "/run/node"
"""Where a node sees its own part of the cluster's folder."""

HOME = f"{NODE_FOLDER}/home"
TMPDIR = "/run/tmp"
"""A node's own, and gone with it: mpirun's daemons do not start over what one with the same number has left behind."""

RECORD = "cluster.json"
END_S = 10.0
"""How long killed processes may take to be gone."""


class Problem(Exception):
    """What the user can mend. code: the command's exit code."""

    def __init__(self, message: str, code: int = 4) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Node:
    """slots: ranks that the hostfile gives it."""

    name: str
    address: str
    slots: int


@dataclass(frozen=True)
class Cluster:
    """What `up` was asked for.

    delay_ms: each way. rate_mbit: of each node's link, each way; None for as fast as it goes.
    private: folders that each node has one of its own of. made: folders that `up` made for them, the innermost first.
    """

    folder: Path
    hostfile: Path
    nodes: tuple[Node, ...]
    delay_ms: float
    rate_mbit: float | None
    private: tuple[str, ...]
    made: tuple[str, ...]
    started: float

    @property
    def threads(self) -> int:
        """Of each rank: nodes share the cores of this machine, and each would count all of them as its own."""
        return max(1, len(os.sched_getaffinity(0)) // max(1, sum(node.slots for node in self.nodes)))

    @property
    def link(self) -> str:
        rate = "no limit to the rate" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        return f"{rate}, {self.delay_ms:g} ms each way"

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise Problem(f"{name} is not a node of this cluster: {self.nodes[0].name} to {self.nodes[-1].name}.", 2)

    def part(self, node: Node) -> Path:
        """A node's part of the folder."""
        return self.folder / node.name

    def write(self) -> None:
        text = json.dumps({**asdict(self), "folder": str(self.folder), "hostfile": str(self.hostfile)}, indent=1)
        # Whole or not there, however this ends.
        new = self.folder / f"{RECORD}.new"
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.folder / RECORD)


def default_folder() -> Path:
    return Path(os.environ.get("DTRAIN_CLUSTER_DIR") or "/run/dtrain-cluster").resolve()


def read(folder: Path) -> Cluster:
    """The cluster in a folder.

    Raises:
        Problem: there is none.
    """
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        paths = {key: Path(found[key]) for key in ("folder", "hostfile")}
        lists = {key: tuple(found[key]) for key in ("private", "made")}
        return Cluster(**{**found, **paths, **lists, "nodes": tuple(Node(**node) for node in found["nodes"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise Problem(
            f"No simulated cluster is up ({folder} is not there). Start one: launch/simulate-cluster up 3"
            if not folder.exists()
            else f"{folder} holds no complete cluster: an `up` did not end. Remove it: launch/simulate-cluster down"
        ) from None


# Processes


def processes(folder: Path, script: str, *words: str) -> list[int]:
    """Living processes that run a script of this package for that cluster, in the order of their start."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            # Bytes: a name is cut after 15 of them, also within a character.
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # gone
            continue
        if _runs(command, folder, script, *words) and fields[0] not in (b"Z", b"X"):
            found.append((int(fields[19]), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def _runs(command: list[bytes], folder: Path, script: str, *words: str) -> bool:
    # By its command line and not by a number kept in a file, which may be another process's by now.
    if len(command) < 4 or Path(os.fsdecode(command[1])).name != script:
        return False
    return [os.fsdecode(word) for word in command[2 : 3 + len(words)]] == [str(folder), *words]


def init_of(cluster: Cluster, node: Node) -> int:
    """Process number of a node's init.

    Raises:
        Problem: the node is gone.
    """
    found = processes(cluster.folder, "node.py", node.name)
    if not found:
        raise Problem(f"{node.name} is not running: it was killed. `launch/simulate-cluster down` removes the rest.")
    return found[-1]


def kill_and_wait(list_processes: Callable[[], list[int]]) -> None:
    """Kills what `list_processes()` gives until it gives nothing.

    Raises:
        Problem: some are still there after END_S.
    """
    deadline = time.monotonic() + END_S
    while left := list_processes():
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise Problem(f"Processes {left} of the simulated cluster do not end.")
        time.sleep(0.01)


# The switch's control socket


@contextmanager
def _control_address(folder: Path) -> Iterator[str]:
    # Through a descriptor: a socket's address may have 107 characters, and a folder's path more.
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/control"
    finally:
        os.close(opened)


def control_socket(folder: Path) -> socket.socket:
    """One that listens, where `ask` looks for it."""
    control = socket.socket(socket.AF_UNIX)
    with _control_address(folder) as address:
        control.bind(address)
    control.listen(8)
    return control


def ask(folder: Path, **request: str) -> dict[str, dict[str, Any]]:
    """Has the switch cut or heal a node; gives every node's link.

    Raises:
        Problem: the switch is gone.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5.0)
        try:
            with _control_address(folder) as address:
                client.connect(address)
            client.sendall(json.dumps(request).encode())
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
            found: dict[str, dict[str, Any]] = json.loads(answer)
        except (OSError, ValueError) as error:
            raise Problem(
                f"The cluster's switch does not answer ({error}). Begin anew: launch/simulate-cluster down, then up."
            ) from None
    return found

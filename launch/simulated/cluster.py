"""The state of a simulated cluster: its folder, its nodes, and its processes."""

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
MAX_NODES = 64
NODE_FOLDER = "/run/node"
"""The path, on a node, of its part of the cluster's folder."""

HOME = f"{NODE_FOLDER}/home"
TMPDIR = "/run/tmp"
"""A node's temporary folder, which is removed with the node: files that are left over from an earlier daemon with the same
process ID would keep mpirun's daemons from starting."""

RECORD = "cluster.json"
END_S = 10.0
"""Time limit for killed processes to disappear."""


class ClusterError(Exception):
    """An error that the user can fix.

    Attributes:
        code: the command's exit code.
    """

    def __init__(self, message: str, code: int = 4) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: its host name.
        address: its IPv4 address.
        slots: number of ranks in the hostfile.
    """

    name: str
    address: str
    slots: int


@dataclass(frozen=True)
class Cluster:
    """The settings of `up`.

    Attributes:
        folder: the folder of the cluster's state.
        hostfile: the path of the hostfile that `up` writes.
        nodes: all nodes.
        delay_ms: delay of each node's link in each direction.
        rate_mbit: rate of each node's link in each direction; None for no limit.
        private: folders that each node has its own copy of.
        made: folders that `up` created for `private`, the innermost first.
        started: when `up` ran, in seconds since 1970.
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
        """Threads of each rank. Nodes share the cores of this machine, and by default each would use all of them."""
        return max(1, len(os.sched_getaffinity(0)) // max(1, sum(node.slots for node in self.nodes)))

    @property
    def link(self) -> str:
        rate = "no rate limit" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        return f"{rate}, {self.delay_ms:g} ms each way"

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(f"{name} is not a node of this cluster: {self.nodes[0].name} to {self.nodes[-1].name}.", 2)

    def part(self, node: Node) -> Path:
        """Returns a node's part of the folder."""
        return self.folder / node.name

    def write(self) -> None:
        text = json.dumps({**asdict(self), "folder": str(self.folder), "hostfile": str(self.hostfile)}, indent=1)
        # Replaced atomically, so that an interruption leaves no incomplete file.
        new = self.folder / f"{RECORD}.new"
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.folder / RECORD)


def default_folder() -> Path:
    return Path(os.environ.get("DTRAIN_CLUSTER_DIR") or "/run/dtrain-cluster").resolve()


def read(folder: Path) -> Cluster:
    """Returns the cluster in a folder.

    Raises:
        ClusterError: there is no cluster.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        paths = {key: Path(record[key]) for key in ("folder", "hostfile")}
        lists = {key: tuple(record[key]) for key in ("private", "made")}
        return Cluster(**{**record, **paths, **lists, "nodes": tuple(Node(**node) for node in record["nodes"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise ClusterError(
            f"No simulated cluster is up ({folder} does not exist). Start one: launch/simulate-cluster up 3"
            if not folder.exists()
            else f"{folder} contains no complete cluster: an `up` was interrupted. Remove it: launch/simulate-cluster down"
        ) from None


# Processes


def processes(folder: Path, script: str, *words: str) -> list[int]:
    """Returns running processes of a cluster that run a script of this package, in the order of their start."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            # Read as bytes: the kernel truncates a name to 15 bytes, perhaps in the middle of a character.
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # the process has ended
            continue
        if _runs(command, folder, script, *words) and fields[0] not in (b"Z", b"X"):
            found.append((int(fields[19]), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def _runs(command: list[bytes], folder: Path, script: str, *words: str) -> bool:
    # Identified by its command line: a process ID from a file might belong to another process by now.
    if len(command) < 4 or Path(os.fsdecode(command[1])).name != script:
        return False
    return [os.fsdecode(word) for word in command[2 : 3 + len(words)]] == [str(folder), *words]


def init_of(cluster: Cluster, node: Node) -> int:
    """Returns the process ID of a node's init.

    Raises:
        ClusterError: the node is not running.
    """
    found = processes(cluster.folder, "node.py", node.name)
    if not found:
        raise ClusterError(
            f"{node.name} is not running: it was killed. `launch/simulate-cluster down` removes the rest."
        )
    return found[-1]


def kill_and_wait(list_processes: Callable[[], list[int]]) -> None:
    """Kills the processes that `list_processes()` returns until it returns none.

    Raises:
        ClusterError: some still exist after END_S.
    """
    deadline = time.monotonic() + END_S
    while left := list_processes():
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise ClusterError(f"Processes {left} of the simulated cluster do not end after SIGKILL.")
        time.sleep(0.01)


# The switch's control socket


@contextmanager
def _control_address(folder: Path) -> Iterator[str]:
    # Through a descriptor: a socket's address is limited to 107 characters, and the folder's path may be longer.
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/control"
    finally:
        os.close(opened)


def control_socket(folder: Path) -> socket.socket:
    """Returns a listening socket at the address that `ask` uses."""
    control = socket.socket(socket.AF_UNIX)
    with _control_address(folder) as address:
        control.bind(address)
    control.listen(8)
    return control


def ask(folder: Path, **request: str) -> dict[str, dict[str, Any]]:
    """Asks the switch to cut or heal a node, and returns the state of every node's link.

    Raises:
        ClusterError: the switch does not answer.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5.0)
        try:
            with _control_address(folder) as address:
                client.connect(address)
            client.sendall(json.dumps(request).encode())
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
            links: dict[str, dict[str, Any]] = json.loads(answer)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"The cluster's switch does not answer ({error}). Start over: launch/simulate-cluster down, then up."
            ) from None
    return links

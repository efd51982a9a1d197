"""up, down, cut, heal, kill and status."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulated import belongings
from simulated.cluster import (
    RECORD,
    Cluster,
    Node,
    Problem,
    ask,
    control_socket,
    kill_and_wait,
    processes,
    read,
)

HERE = Path(__file__).resolve().parent
MARK = "# Written by launch/simulate-cluster for the cluster in "
BOOT_S = 30.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",  # root's files in a user's checkout could not be removed by the user
}
"""Of a node's init and of the switch. Nothing of the caller's, and no path to a virtual environment: a real node has none."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# up


def up(cluster: Cluster) -> None:
    """Starts every node and the switch, and writes the hostfile.

    Raises:
        Problem: one is up already, or a node does not start; then nothing is left.
    """
    _check_hostfile(cluster)
    for path in cluster.private:
        if Path(path).exists() and not Path(path).is_dir():
            raise Problem(f"--private {path} is not a folder.", 2)
    try:
        cluster.folder.parent.mkdir(parents=True, exist_ok=True)
        cluster.folder.mkdir(mode=0o755)
    except FileExistsError:
        raise Problem(
            f"A simulated cluster is up already, or was not taken down: {cluster.folder} is there. "
            "See it: launch/simulate-cluster status. Remove it: launch/simulate-cluster down"
        ) from None
    try:
        cluster = replace(cluster, made=_missing(cluster.private))
        cluster.write()
        for path in cluster.private:  # each node needs a place to put its own folder on
            Path(path).mkdir(parents=True, exist_ok=True)
        belongings.make(cluster)
        _start(cluster)
        cluster.hostfile.write_text(_hostfile(cluster), encoding="utf-8")
    except BaseException as error:
        _remove(cluster)
        if isinstance(error, OSError | subprocess.SubprocessError):
            raise Problem(f"The cluster does not come up, and nothing of it is left: {error}") from error
        raise
    say(f"{len(cluster.nodes)} nodes are up: {cluster.link}. Hostfile: {cluster.hostfile}")
    status(cluster.folder)


def _check_hostfile(cluster: Cluster) -> None:
    path = cluster.hostfile
    if not path.exists():
        if not path.parent.is_dir():
            raise Problem(f"--hostfile {path}: there is no folder {path.parent}.", 2)
        return
    first = path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else ""
    other = first.removeprefix(MARK)
    if not first.startswith(MARK):
        raise Problem(f"{path} was not written by simulate-cluster. Move it away, or name another: --hostfile FILE", 2)
    if Path(other) != cluster.folder and Path(other).exists():
        raise Problem(f"{path} belongs to the cluster in {other}. Take that one down, or name another: --hostfile FILE")


def _missing(paths: Sequence[str]) -> tuple[str, ...]:
    """Folders to make for these, the innermost first."""
    found = {str(each) for path in paths for each in (Path(path), *Path(path).parents) if not each.exists()}
    return tuple(sorted(found, key=len, reverse=True))


def _hostfile(cluster: Cluster) -> str:
    lines = [f"{MARK}{cluster.folder}", *(f"{node.name} slots={node.slots}" for node in cluster.nodes)]
    return "\n".join(lines) + "\n"


def _start(cluster: Cluster) -> None:
    deadline = time.monotonic() + BOOT_S
    sockets: list[socket.socket] = []
    devices: list[int] = []
    control = control_socket(cluster.folder)
    try:
        for node in cluster.nodes:
            sockets.append(_start_node(cluster, node))
        devices = [_device(node, ours, deadline) for node, ours in zip(cluster.nodes, sockets, strict=True)]
        _start_switch(cluster, control, list(zip(devices, sockets, strict=True)))
        for node, ours in zip(cluster.nodes, sockets, strict=True):
            _hear(node, ours, deadline, "ready")
        ask(cluster.folder)
    finally:
        for device in devices:
            os.close(device)
        for each in (*sockets, control):
            each.close()


def _start_node(cluster: Cluster, node: Node) -> socket.socket:
    # One message a packet: words and descriptors cannot run together.
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its, (cluster.part(node) / "init.log").open("w") as log:
        command = [sys.executable, str(HERE / "node.py"), str(cluster.folder), node.name, str(its.fileno())]
        parent = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=ENVIRONMENT,
            pass_fds=[its.fileno()],
            start_new_session=True,
        )
    # It ends once it has forked the node's init; where it does not, the init's word is missed next.
    with suppress(subprocess.TimeoutExpired):
        parent.wait(BOOT_S)
    return ours


def _device(node: Node, ours: socket.socket, deadline: float) -> int:
    _hear(node, ours, deadline, "pid")
    descriptors: list[int] = []
    _hear(node, ours, deadline, "device", descriptors)
    return descriptors[0]


def _hear(
    node: Node, ours: socket.socket, deadline: float, wanted: str, descriptors: list[int] | None = None
) -> dict[str, Any]:
    """The node's next message, which must be the wanted one."""
    ours.settimeout(max(deadline - time.monotonic(), 0.1))
    try:
        message, received, _, _ = socket.recv_fds(ours, 65536, 1)
    except TimeoutError:
        raise Problem(f"{node.name} did not come up within {BOOT_S:g} s.") from None
    words: dict[str, Any] = json.loads(message) if message else {"error": "it ended without a word"}
    if wanted not in words:
        raise Problem(f"{node.name} does not come up: {words.get('error', words)}")
    if descriptors is not None:
        descriptors += received
    return words


def _start_switch(cluster: Cluster, control: socket.socket, ends: list[tuple[int, socket.socket]]) -> None:
    numbers = [f"{device}:{alive.fileno()}" for device, alive in ends]
    command = [sys.executable, str(HERE / "relay.py"), str(cluster.folder), str(control.fileno()), *numbers]
    passed = [control.fileno(), *(number for device, alive in ends for number in (device, alive.fileno()))]
    with (cluster.folder / "switch.log").open("w") as log:
        # Its own session, and not waited for: it outlives this command.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=ENVIRONMENT,
            pass_fds=passed,
            start_new_session=True,
        )


# down


def down(folder: Path) -> None:
    """Ends every process of the cluster and removes its folder and hostfile, also what an interrupted `up` left.

    Raises:
        Problem: the folder is not a cluster's.
    """
    if not folder.exists():
        say(f"No simulated cluster is up ({folder} is not there).")
        return
    try:
        cluster = read(folder)
    except Problem:
        left = list(folder.iterdir())
        if not all(path.name.startswith(RECORD) for path in left):
            raise Problem(f"{folder} was not made by simulate-cluster: nothing is removed.") from None
        for path in left:  # an `up` killed at its first step
            path.unlink()
        folder.rmdir()
        return
    _remove(cluster)
    say(f"The simulated cluster in {folder} is gone.")


def _remove(cluster: Cluster) -> None:
    kill_and_wait(lambda: [*processes(cluster.folder, "node.py"), *processes(cluster.folder, "relay.py")])
    hostfile = cluster.hostfile
    if hostfile.is_file() and hostfile.read_text(encoding="utf-8").startswith(f"{MARK}{cluster.folder}\n"):
        hostfile.unlink()
    for path in cluster.made:
        if Path(path).is_dir() and not any(Path(path).iterdir()):
            Path(path).rmdir()
    shutil.rmtree(cluster.folder)


# Faults


def cut(cluster: Cluster, node: Node) -> None:
    """The node's switch port is dead: what it sends and what is sent to it is lost, and nobody is told."""
    ask(cluster.folder, cut=node.name)


def heal(cluster: Cluster, node: Node) -> None:
    ask(cluster.folder, heal=node.name)


def kill(cluster: Cluster, node: Node) -> None:
    """The node loses power: everything on it is gone, and no other node is told."""
    # First, or the kernel says goodbye to the others for the killed processes.
    ask(cluster.folder, cut=node.name)
    kill_and_wait(lambda: processes(cluster.folder, "node.py", node.name))


def status(folder: Path, *, as_json: bool = False) -> None:
    """Prints every node's address, slots, state, and bytes."""
    cluster = read(folder)
    links = ask(folder)
    rows = []
    for node in cluster.nodes:
        is_up = bool(processes(folder, "node.py", node.name))
        link = links[node.name]
        state = "killed" if not is_up else "cut" if link["cut"] else "up"
        rows.append({"node": node.name, "address": node.address, "slots": node.slots, "state": state, **link})
    if as_json:
        say(json.dumps({"rate_mbit": cluster.rate_mbit, "delay_ms": cluster.delay_ms, "nodes": rows}))
        return
    say(f"{'node':8}{'address':13}{'slots':>5}  {'state':8}{'sent':>12}{'received':>12}{'dropped':>9}")
    for row in rows:
        moved = "".join(f"{row[key] / 1e6:>9.1f} MB" for key in ("sent_bytes", "received_bytes"))
        say(f"{row['node']:8}{row['address']:13}{row['slots']:>5}  {row['state']:8}{moved}{row['dropped_packets']:>9}")

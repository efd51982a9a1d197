"""The commands up, down, cut, heal, kill and status."""

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

from simulated import node_files
from simulated.cluster import (
    RECORD,
    Cluster,
    ClusterError,
    Node,
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
    "PYTHONDONTWRITEBYTECODE": "1",  # the user could not remove root's files from the checkout
}
"""Environment of a node's init and of the switch: no variables of the caller and, as on a real node, no .venv on the PATH."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# up


def up(cluster: Cluster) -> None:
    """Starts every node and the switch, and writes the hostfile.

    Raises:
        ClusterError: a cluster is already up, or a node does not start. Then nothing remains.
    """
    _check_hostfile(cluster)
    for path in cluster.private:
        if Path(path).exists() and not Path(path).is_dir():
            raise ClusterError(f"--private {path} is not a folder.", 2)
    try:
        cluster.folder.parent.mkdir(parents=True, exist_ok=True)
        cluster.folder.mkdir(mode=0o755)
    except FileExistsError:
        raise ClusterError(
            f"A simulated cluster is already up, or was not removed: {cluster.folder} exists. "
            "Show it: launch/simulate-cluster status. Remove it: launch/simulate-cluster down"
        ) from None
    try:
        cluster = replace(cluster, made=_missing(cluster.private))
        cluster.write()
        for path in cluster.private:  # the mount point of each node's copy
            Path(path).mkdir(parents=True, exist_ok=True)
        node_files.create_files(cluster)
        _start(cluster)
        cluster.hostfile.write_text(_hostfile(cluster), encoding="utf-8")
    except BaseException as error:
        _remove(cluster)
        if isinstance(error, OSError | subprocess.SubprocessError):
            raise ClusterError(f"The cluster did not start, and was removed: {error}") from error
        raise
    say(f"{len(cluster.nodes)} nodes are up: {cluster.link}. Hostfile: {cluster.hostfile}")
    status(cluster.folder)


def _check_hostfile(cluster: Cluster) -> None:
    path = cluster.hostfile
    if not path.exists():
        if not path.parent.is_dir():
            raise ClusterError(f"--hostfile {path}: the folder {path.parent} does not exist.", 2)
        return
    first = path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else ""
    other = first.removeprefix(MARK)
    if not first.startswith(MARK):
        raise ClusterError(
            f"{path} was not written by simulate-cluster. Move it away, or use another path: --hostfile FILE", 2
        )
    if Path(other) != cluster.folder and Path(other).exists():
        raise ClusterError(
            f"{path} belongs to the cluster in {other}. Remove that cluster, or use another path: --hostfile FILE"
        )


def _missing(paths: Sequence[str]) -> tuple[str, ...]:
    """Returns the folders to create for these paths, the innermost first."""
    folders = {str(each) for path in paths for each in (Path(path), *Path(path).parents) if not each.exists()}
    return tuple(sorted(folders, key=len, reverse=True))


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
        devices = [_device(node, our_end, deadline) for node, our_end in zip(cluster.nodes, sockets, strict=True)]
        _start_switch(cluster, control, list(zip(devices, sockets, strict=True)))
        for node, our_end in zip(cluster.nodes, sockets, strict=True):
            _receive(node, our_end, deadline, "ready")
        ask(cluster.folder)
    finally:
        for device in devices:
            os.close(device)
        for each in (*sockets, control):
            each.close()


def _start_node(cluster: Cluster, node: Node) -> socket.socket:
    # One message per packet, so that messages and descriptors are not mixed.
    our_end, node_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with node_end, (cluster.part(node) / "init.log").open("w") as log:
        command = [sys.executable, str(HERE / "node.py"), str(cluster.folder), node.name, str(node_end.fileno())]
        parent = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=ENVIRONMENT,
            pass_fds=[node_end.fileno()],
            start_new_session=True,
        )
    # It ends after it has forked the node's init. If it does not, the message from init is missing, which is an error.
    with suppress(subprocess.TimeoutExpired):
        parent.wait(BOOT_S)
    return our_end


def _device(node: Node, our_end: socket.socket, deadline: float) -> int:
    _receive(node, our_end, deadline, "pid")
    descriptors: list[int] = []
    _receive(node, our_end, deadline, "device", descriptors)
    return descriptors[0]


def _receive(
    node: Node, our_end: socket.socket, deadline: float, wanted: str, descriptors: list[int] | None = None
) -> dict[str, Any]:
    """Returns the node's next message, which must have the wanted key."""
    our_end.settimeout(max(deadline - time.monotonic(), 0.1))
    try:
        message, received, _, _ = socket.recv_fds(our_end, 65536, 1)
    except TimeoutError:
        raise ClusterError(f"{node.name} did not start within {BOOT_S:g} s.") from None
    content: dict[str, Any] = json.loads(message) if message else {"error": "it ended without an error message"}
    if wanted not in content:
        raise ClusterError(f"{node.name} does not start: {content.get('error', content)}")
    if descriptors is not None:
        descriptors += received
    return content


def _start_switch(cluster: Cluster, control: socket.socket, ends: list[tuple[int, socket.socket]]) -> None:
    numbers = [f"{device}:{alive.fileno()}" for device, alive in ends]
    command = [sys.executable, str(HERE / "relay.py"), str(cluster.folder), str(control.fileno()), *numbers]
    passed = [control.fileno(), *(number for device, alive in ends for number in (device, alive.fileno()))]
    with (cluster.folder / "switch.log").open("w") as log:
        # It runs in its own session and is not waited for, because it must outlive this command.
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
    """Ends every process of the cluster and removes its folder and hostfile, also after an interrupted `up`.

    Raises:
        ClusterError: the folder is not that of a cluster.
    """
    if not folder.exists():
        say(f"No simulated cluster is up ({folder} does not exist).")
        return
    try:
        cluster = read(folder)
    except ClusterError:
        left = list(folder.iterdir())
        if not all(path.name.startswith(RECORD) for path in left):
            raise ClusterError(f"{folder} was not created by simulate-cluster. Nothing was removed.") from None
        for path in left:  # an `up` that was killed at its first step
            path.unlink()
        folder.rmdir()
        return
    _remove(cluster)
    say(f"The simulated cluster in {folder} is removed.")


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
    """Makes the node's switch port drop all packets in both directions, without an error."""
    ask(cluster.folder, cut=node.name)


def heal(cluster: Cluster, node: Node) -> None:
    """Ends a cut."""
    ask(cluster.folder, heal=node.name)


def kill(cluster: Cluster, node: Node) -> None:
    """Simulates a power loss: ends everything on the node, without a signal to the other nodes."""
    # The cut comes first. Otherwise the kernel would close the connections of the killed processes.
    ask(cluster.folder, cut=node.name)
    kill_and_wait(lambda: processes(cluster.folder, "node.py", node.name))


def status(folder: Path, *, as_json: bool = False) -> None:
    """Prints every node's address, slots, state and bytes."""
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

"""The doctor's agent on a host: follows orders, one JSON object a line, until its standard input ends.

Sent to the host after probe.py and host_facts.py, as one text (remote_source.py removes imports of dtrain), so it uses
the standard library only. The input ends when the doctor is done or has died; then everything that the agent opened or
wrote is removed.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dtrain.cluster.doctor.host_facts import collect_doctor_facts, find_route
from dtrain.cluster.probe import collect_basic_facts

PAYLOAD = bytes(64 * 1024)
"""Sent over every connection: with a wrong MTU, small packets arrive and large ones are lost."""

TOKEN_BYTES = 32
"""Length of the token that a listener sends first, so that another program on the port is not mistaken for it."""

listeners: list[socket.socket] = []
markers: list[Path] = []


def collect_facts(order: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts about this host."""
    return {**collect_basic_facts(order), **collect_doctor_facts(order)}


def read_clock(order: dict[str, Any]) -> dict[str, Any]:
    """Returns this host's time, in seconds since 1970."""
    return {"time": time.time()}


def open_listener(order: dict[str, Any]) -> dict[str, Any]:
    """Opens a port on the interface that leads to an address, and serves every connection until the agent ends.

    Args:
        order: `to`, the address; `token`, what to send on each connection.

    Returns:
        The route as `find_route` describes it, and `port`; or `problem`.
    """
    try:
        route = find_route(order["to"])
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listeners.append(listener)
    listener.bind((route["address"], 0))
    listener.listen(128)
    threading.Thread(target=_accept_peers, args=(listener, order["token"].encode()), daemon=True).start()
    return {**route, "port": listener.getsockname()[1]}


def _accept_peers(listener: socket.socket, token: bytes) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:  # the listener was closed
            return
        threading.Thread(target=_serve_peer, args=(peer, token), daemon=True).start()


def _serve_peer(peer: socket.socket, token: bytes) -> None:
    with peer:
        peer.settimeout(30.0)
        try:
            peer.sendall(token)
            _receive(peer, len(PAYLOAD))
            peer.sendall(PAYLOAD)
        except OSError:
            return


def _receive(peer: socket.socket, size: int) -> bytes:
    """Returns `size` bytes; fewer if the peer closes the connection."""
    received = bytearray()
    while len(received) < size and (chunk := peer.recv(size - len(received))):
        received += chunk
    return bytes(received)


def connect_to_targets(order: dict[str, Any]) -> dict[str, Any]:
    """Connects to all targets in parallel.

    Args:
        order: `targets`, each with host, address, port and token; `timeout_s` for each.

    Returns:
        For each host why it cannot be reached; an empty text if it can.
    """
    problems: dict[str, str] = {}
    threads = [
        threading.Thread(target=_connect_to_target, args=(target, order["timeout_s"], problems), daemon=True)
        for target in order["targets"]
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * order["timeout_s"] + 1.0
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    return {target["host"]: problems.get(target["host"], "no answer") for target in order["targets"]}


def _connect_to_target(target: dict[str, Any], timeout_s: float, problems: dict[str, str]) -> None:
    address = (target["address"], target["port"])
    try:
        peer = socket.create_connection(address, timeout=timeout_s)
    except TimeoutError:
        problems[target["host"]] = f"no answer within {timeout_s:g} s"
        return
    except OSError as error:
        problems[target["host"]] = error.strerror or str(error)
        return
    with peer:
        try:
            token = _receive(peer, TOKEN_BYTES).decode("latin-1")
            if token != target["token"]:
                problems[target["host"]] = f"another program answers at {address[0]}"
                return
            peer.sendall(PAYLOAD)
            received = len(_receive(peer, len(PAYLOAD)))
        except OSError:
            received = 0
    if received == len(PAYLOAD):
        problems[target["host"]] = ""
    else:
        problems[target["host"]] = f"it connects, but {len(PAYLOAD) // 1024} KiB do not get through"


def create_marker(order: dict[str, Any]) -> dict[str, Any]:
    """Creates an empty file, which is removed when the agent ends.

    Args:
        order: `folder`, where to create it, or in the nearest existing folder above it; `name`, the file's name.

    Returns:
        `path` of the file, or `problem`.
    """
    folder = Path(order["folder"])
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        path = folder / order["name"]
        path.touch(exist_ok=False)
    except OSError as error:
        return {"problem": f"{folder}: {error.strerror or error}"}
    markers.append(path)
    return {"path": str(path)}


def find_marker(order: dict[str, Any]) -> dict[str, Any]:
    """Returns `exists`, whether the file `path` of the order exists on this host, or `problem`."""
    try:
        return {"exists": Path(order["path"]).exists()}
    except OSError as error:
        return {"problem": error.strerror or str(error)}


ORDERS = {
    "facts": collect_facts,
    "clock": read_clock,
    "listen": open_listener,
    "connect": connect_to_targets,
    "create_marker": create_marker,
    "find_marker": find_marker,
}


def follow_orders() -> None:
    """Answers every order until the input ends."""
    try:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = ORDERS[order["order"]](order)
            except Exception as error:  # noqa: BLE001 - the doctor reports every error
                answer = {"problem": f"{type(error).__name__}: {error}"}
            # Begins with a newline, because a login script may have left a line open.
            sys.stdout.write("\n" + json.dumps({"number": order["number"], **answer}) + "\n")
            sys.stdout.flush()
    finally:
        for path in markers:
            path.unlink(missing_ok=True)
        for listener in listeners:
            listener.close()

"""The far end of the doctor's questions: answers orders, a JSON object a line, until its standard input ends.

Sent to the host behind probe.py and details.py, as one text (talk.py leaves out imports of dtrain): standard library
only. When the input ends (the doctor is done, or died), everything that it opened or wrote here is gone.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dtrain.cluster.doctor.host_facts import details, way_to
from dtrain.cluster.probe import basics

PAYLOAD = bytes(64 * 1024)
"""Sent over every connection: small packets pass where large ones are lost for want of MTU."""

HELLO = 32
"""Bytes of the word that a listener answers with: it could be somebody else's."""

listeners: list[socket.socket] = []
marks: list[Path] = []


def look(order: dict[str, Any]) -> dict[str, Any]:
    """What this host has."""
    return {**basics(order), **details(order)}


def clock(order: dict[str, Any]) -> dict[str, Any]:
    """The time here, in seconds since 1970."""
    return {"time": time.time()}


def listen(order: dict[str, Any]) -> dict[str, Any]:
    """Opens a port on the interface that leads to an address, and answers all who come until the end.

    order: `to`, an address; `word`, what to answer with.
    """
    try:
        found = way_to(order["to"])
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listeners.append(listener)
    listener.bind((found["address"], 0))
    listener.listen(128)
    threading.Thread(target=_accept, args=(listener, order["word"].encode()), daemon=True).start()
    return {**found, "port": listener.getsockname()[1]}


def _accept(listener: socket.socket, word: bytes) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:  # closed
            return
        threading.Thread(target=_serve, args=(peer, word), daemon=True).start()


def _serve(peer: socket.socket, word: bytes) -> None:
    with peer:
        peer.settimeout(30.0)
        try:
            peer.sendall(word)
            _receive(peer, len(PAYLOAD))
            peer.sendall(PAYLOAD)
        except OSError:
            return


def _receive(peer: socket.socket, size: int) -> bytes:
    """So many bytes, less at the other's end."""
    found = bytearray()
    while len(found) < size and (chunk := peer.recv(size - len(found))):
        found += chunk
    return bytes(found)


def reach(order: dict[str, Any]) -> dict[str, Any]:
    """Connects to all targets at once. order: `targets`: host, address, port and word of each; `seconds` for each.

    Gives for each host why it is not reached, empty where it is.
    """
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=_reach, args=(target, order["seconds"], found), daemon=True)
        for target in order["targets"]
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * order["seconds"] + 1.0
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    return {target["host"]: found.get(target["host"], "no answer") for target in order["targets"]}


def _reach(target: dict[str, Any], seconds: float, found: dict[str, str]) -> None:
    where = (target["address"], target["port"])
    try:
        peer = socket.create_connection(where, timeout=seconds)
    except TimeoutError:
        found[target["host"]] = f"no answer within {seconds:g} s"
        return
    except OSError as error:
        found[target["host"]] = error.strerror or str(error)
        return
    with peer:
        try:
            word = _receive(peer, HELLO).decode("latin-1")
            if word != target["word"]:
                found[target["host"]] = f"something else answers at {where[0]}"
                return
            peer.sendall(PAYLOAD)
            came = len(_receive(peer, len(PAYLOAD)))
        except OSError:
            came = 0
    if came == len(PAYLOAD):
        found[target["host"]] = ""
    else:
        found[target["host"]] = f"it connects, but {len(PAYLOAD) // 1024} KiB do not get through"


def mark(order: dict[str, Any]) -> dict[str, Any]:
    """Puts an empty file into a folder, or the nearest one above that is there. It is removed at the end."""
    folder = Path(order["folder"])
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        path = folder / order["name"]
        path.touch(exist_ok=False)
    except OSError as error:
        return {"problem": f"{folder}: {error.strerror or error}"}
    marks.append(path)
    return {"path": str(path)}


def see(order: dict[str, Any]) -> dict[str, Any]:
    """Whether a file is here as well."""
    try:
        return {"is_there": Path(order["path"]).exists()}
    except OSError as error:
        return {"problem": error.strerror or str(error)}


ORDERS = {"look": look, "clock": clock, "listen": listen, "reach": reach, "mark": mark, "see": see}


def answer() -> None:
    """Until the input ends."""
    try:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                said = ORDERS[order["do"]](order)
            except Exception as error:  # noqa: BLE001 - whatever it is, the doctor is to hear of it
                said = {"problem": f"{type(error).__name__}: {error}"}
            # On a line of its own, also where a login script has left one open.
            sys.stdout.write("\n" + json.dumps({"number": order["number"], **said}) + "\n")
            sys.stdout.flush()
    finally:
        for path in marks:
            path.unlink(missing_ok=True)
        for listener in listeners:
            listener.close()

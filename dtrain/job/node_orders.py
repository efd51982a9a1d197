"""Lets the coordinator of a job on several hosts start the ranks of this node, again and again: the node's side.

The coordinator (cluster/rounds.py) knows all hosts, so it decides who takes part in which start, called a round. This
process has imported everything and waits. One socket carries JSON lines in both directions:

    {"ready": "node2"}                     this node has imported, and this is its host name
    {"listen": {"address", "port"}}        open the socket where the ranks meet; answered by {"listening": port}
    {"start": {...}}                       the fields of `rounds.RoundOrder`: fork the ranks
    {"ended": restart, "code", "failure"}  all ranks of that start have ended
    {"stop": restart}                      kill the ranks of that start; without ranks, answer with their end
    {"finish": true}                       end; the end of the socket means the same

The kernel sends SIGIO when a line arrives, so that one sigtimedwait sees orders, ends of ranks and signals alike.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import MutableMapping
from typing import Any

from dtrain.distributed.launcher_env import ORDERS_FD

F_SETOWN_EX, F_OWNER_TID = 15, 0
"""From Linux's fcntl.h; Python's fcntl lacks them."""


class Orders:
    """This node's end of the channel.

    Attributes:
        socket: its socket, which ranks must close.
        is_closed: the other end has gone.
    """

    def __init__(self, file: int) -> None:
        """Takes over the socket. SIGIO must be blocked, because its default action ends the process."""
        self.socket, self.is_closed = socket.socket(fileno=file), False
        self._rest, self._waiting = b"", list[dict[str, Any]]()
        self.socket.set_inheritable(False)
        self.socket.setblocking(False)
        # To the main thread, which blocks it: a library's thread that does not would take it, and end the process.
        fcntl.fcntl(file, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, threading.get_native_id()))
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_ASYNC)

    def take(self) -> list[dict[str, Any]]:
        """Returns the orders that have arrived, and were not returned before."""
        self._receive()
        taken, self._waiting = self._waiting, []
        return taken

    def take_stop(self) -> bool:
        """Returns whether an order to stop the ranks has arrived; other orders wait for `take`."""
        self._receive()
        others = [order for order in self._waiting if "stop" not in order]
        has_stop, self._waiting = len(others) < len(self._waiting), others
        return has_stop

    def _receive(self) -> None:
        while not self.is_closed:
            try:
                received = self.socket.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                received = b""
            self.is_closed, self._rest = not received, self._rest + received
        *lines, self._rest = self._rest.split(b"\n")
        self._waiting += [json.loads(line) for line in lines]

    def report(self, **fields: Any) -> None:
        """Sends a line; nothing if the other end has gone."""
        self.socket.setblocking(True)
        try:
            self.socket.sendall(json.dumps(fields).encode() + b"\n")
        except OSError:
            self.is_closed = True
        finally:
            self.socket.setblocking(False)


def open_orders(env: MutableMapping[str, str]) -> Orders | None:
    """Returns the channel to the coordinator; None without one. Its variable is removed, so that ranks do not see it."""
    file = env.pop(ORDERS_FD, "")
    return Orders(int(file)) if file else None


def wait_for_orders(orders: Orders, signals: set[signal.Signals]) -> tuple[list[dict[str, Any]], bool]:
    """Waits while there are no ranks.

    Returns:
        The orders, none if the channel has ended; and whether a signal told the job to stop.
    """
    while True:
        if (found := orders.take()) or orders.is_closed:
            return found, False
        info = signal.sigwaitinfo(signals)
        if info.si_signo not in (signal.SIGIO, signal.SIGCHLD):
            return [], True

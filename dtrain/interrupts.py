"""Ctrl-C and SIGTERM: an exception in the main thread, and a way out when that thread does not hear it.

A Python signal handler waits until the running C call ends, and a collective may wait long for a peer. The C-level
wake-up does not: a helper thread then gives the main thread `grace_s` and ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dtrain.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(*, grace_s: float, before_exit: Callable[[str], None]) -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into `Interrupted`; a second one, or silence for grace_s, ends the process.

    Args:
        before_exit: called from a helper thread with the cause, before the process ends with code 1.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return
    hears, wakes = socket.socketpair()
    wakes.setblocking(False)
    done = threading.Event()
    before = {number: signal.signal(number, _raise_once) for number in SIGNALS}
    old_fd = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_if_deaf, args=(hears, done, grace_s, before_exit), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(old_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        wakes.close()  # the helper reads the end of it and leaves


def _raise_once(number: int, _frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, _exit_now)
    raise Interrupted(f"Stopped by {signal.Signals(number).name}. The last steps since the last export are lost.")


def _exit_now(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


def _end_if_deaf(
    hears: socket.socket, done: threading.Event, grace_s: float, before_exit: Callable[[str], None]
) -> None:
    with hears:
        heard = hears.recv(1)
    while heard and heard[0] not in SIGNALS:  # another handler's signal
        return
    if heard and not done.wait(grace_s):
        before_exit(f"stopped by {signal.Signals(heard[0]).name}, not heard within {grace_s:.0f} s")
        os._exit(1)

"""Ctrl-C and SIGTERM: an exception in the main thread, and a way out when that thread does not hear it.

A Python signal handler waits until the running C call ends, and a collective may wait long for a peer. The C-level
wake-up does not: a helper thread then gives the main thread `grace_s` and ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dtrain.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)

PATIENCE_S = 3.0
"""From then on a further signal ends the process at once. Sooner it may be the first one, passed on by a launcher."""

LAST_WORDS_S = 2.0
"""How long before_exit may take: it writes a file and a line, and either may block."""


@contextmanager
def interruptible(*, grace_s: float, before_exit: Callable[[str], None]) -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into `Interrupted`; silence for grace_s, or a later one, ends the process.

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
    os.register_at_fork(after_in_child=_forget_in_child)
    threading.Thread(target=_end_if_deaf, args=(hears, done, grace_s, before_exit), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(old_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        wakes.close()  # the helper reads the end of it and leaves


def ignore_further() -> None:
    """From here on signals change nothing: this process ends already, and a launcher tells it so once more."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _raise_once(number: int, _frame: FrameType | None) -> None:
    begin = time.monotonic()

    def again(number: int, _frame: FrameType | None) -> None:
        if time.monotonic() - begin > PATIENCE_S:
            os._exit(128 + number)

    for each in SIGNALS:
        signal.signal(each, again)
    raise Interrupted(f"Stopped by {signal.Signals(number).name}. The last steps since the last export are lost.")


def _forget_in_child() -> None:
    """A forked helper (a data worker, a pool) is told to end by its parent alone, and what it hears is not for us."""
    if signal.getsignal(signal.SIGTERM) is not _raise_once:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_if_deaf(
    hears: socket.socket, done: threading.Event, grace_s: float, before_exit: Callable[[str], None]
) -> None:
    heard = hears.recv(1)
    while heard and heard[0] not in SIGNALS:  # another handler's signal
        heard = hears.recv(1)
    if heard and not done.wait(grace_s):
        cause = f"Stopped by {signal.Signals(heard[0]).name}, which was not heard within {grace_s:.0f} s."
        words = threading.Thread(target=before_exit, args=(cause,), daemon=True)
        words.start()
        words.join(LAST_WORDS_S)
        os._exit(1)
    done.wait()  # a write into a socket that nobody holds would print an error
    hears.close()

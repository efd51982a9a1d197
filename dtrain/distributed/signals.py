"""Ctrl-C, SIGTERM and SIGUSR1: an exception in the main thread, and a way out when that thread does not hear it.

Where a run can save what it has, the first signal is only noted (`deferred`): the run ends in good order by itself.

A Python signal handler waits until the running C call ends, and a collective may wait long for a peer. The C-level
wake-up does not: a helper thread then gives the main thread `grace_s` and ends the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

from dtrain.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what Slurm's --signal and people send ahead of the end; mpirun passes it on and lives."""

PR_SET_PDEATHSIG = 1

PATIENCE_S = 3.0
"""From then on a further signal ends the process at once. Sooner it may be the first one, passed on by a launcher."""

LAST_WORDS_S = 2.0
"""How long before_exit may take: it writes a file and a line, and either may block."""


class Asked:
    """Whether a signal has asked the run to stop while signals were deferred, and which."""

    def __init__(self, signals: Collection[signal.Signals]) -> None:
        self.signals = frozenset(signals)
        self.number: int | None = None

    def note(self, number: int) -> None:
        """A signal came. The first is noted; a later one is the helper thread's business."""
        if self.number is None:
            self.number = number

    @property
    def name(self) -> str | None:
        """SIGTERM, ..."""
        return None if self.number is None else signal.Signals(self.number).name


_deferring: Asked | None = None
"""Signals are the process's, and so is this: set in `deferred` only."""


@contextmanager
def deferred(signals: Collection[signal.Signals]) -> Iterator[Asked]:
    """Inside, the first of these signals is only noted, for the run to see; a second one, 3 s later, ends the process."""
    global _deferring
    _deferring = asked = Asked(signals)
    try:
        yield asked
    finally:
        _deferring = None


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
        wakes.shutdown(socket.SHUT_RDWR)  # the helper reads the end of it and leaves, whoever has inherited this side
        wakes.close()


def ignore_further() -> None:
    """From here on signals change nothing: this process ends already, and a launcher tells it so once more."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _raise_once(number: int, _frame: FrameType | None) -> None:
    if _deferring is not None and number in _deferring.signals:
        _deferring.note(number)
        return
    for each in SIGNALS:
        signal.signal(each, _heard_already)
    raise Interrupted(f"Stopped by {signal.Signals(number).name}. The last steps since the last export are lost.")


def _heard_already(_number: int, _frame: FrameType | None) -> None:
    """A signal after the first, which the main thread is ending for: the helper thread's business."""


def _forget_in_child() -> None:
    """A forked helper (a data worker, a pool) is told to end by its parent alone, and what it hears is not for us."""
    if signal.getsignal(signal.SIGTERM) not in (_raise_once, _heard_already):
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a pool ends its processes
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def leave_to_parent() -> None:
    """In a helper process that its parent needs until it has stopped in good order: it hears none of our signals.

    Launchers send them to all processes of a rank (Slurm's --signal and scancel, torchrun): a helper that died of one
    would make an error of a stop with a checkpoint. Its parent's end ends it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _end_if_deaf(
    hears: socket.socket, done: threading.Event, grace_s: float, before_exit: Callable[[str], None]
) -> None:
    heard = _next_signal(hears)
    if heard:
        begin = time.monotonic()
        # What is deferred ends the run in good order, however long its step and its checkpoint take.
        is_deferred = _deferring is not None and heard in _deferring.signals
        try:
            again = _further_signal(hears, begin, None if is_deferred else begin + grace_s)
        except TimeoutError:
            if not done.is_set():
                name = signal.Signals(heard).name
                _leave(f"Stopped by {name}, which was not heard within {grace_s:.0f} s.", before_exit)
        else:
            if again and not done.is_set():
                name = signal.Signals(again).name
                _leave(f"Stopped at once by a second {name}: nothing more was saved.", before_exit)
    done.wait()  # a write into a socket that nobody holds would print an error
    hears.close()


def _further_signal(hears: socket.socket, begin: float, until: float | None) -> int | None:
    """The first signal that comes more than 3 s after `begin`; None when there will be none.

    Raises:
        TimeoutError: at the time `until`, and still nothing.
    """
    while True:
        if until is not None:
            hears.settimeout(max(until - time.monotonic(), 0.001))
        again = _next_signal(hears)
        if again is None or time.monotonic() - begin > PATIENCE_S:
            return again


def _next_signal(hears: socket.socket) -> int | None:
    """The number of the next of our signals; None when there will be none."""
    while heard := hears.recv(1):
        if heard[0] in SIGNALS:
            return heard[0]
    return None


def _leave(cause: str, before_exit: Callable[[str], None]) -> None:
    words = threading.Thread(target=before_exit, args=(cause,), daemon=True)
    words.start()
    words.join(LAST_WORDS_S)
    os._exit(1)

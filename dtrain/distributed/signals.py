"""Ctrl-C, SIGTERM and SIGUSR1: raise an exception in the main thread, and end the process if that thread is blocked.

Inside `deferred`, where a run can save its state, the first signal is only recorded, and the run ends in good order.

A Python signal handler waits until the running C call ends, and a collective may wait long for a peer. The C-level
wake-up does not wait: a helper thread reads it, gives the main thread `grace_s`, and then ends the process.
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
from functools import partial
from types import FrameType

from dtrain.distributed.bounded import call_with_timeout
from dtrain.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what Slurm's --signal sends ahead of the end of a job; mpirun passes it on and survives."""

PR_SET_PDEATHSIG = 1

REPEAT_AFTER_S = 3.0
"""A further signal after this time ends the process. Before, it may be the first one, passed on by a launcher."""

BEFORE_EXIT_S = 2.0
"""How long before_exit may take: it writes a file and a line, and either may block."""


class StopRequest:
    """Whether a signal requested a stop while signals were deferred, and which one.

    Attributes:
        signals: the signals that are deferred.
        number: the first that arrived; None for none.
    """

    def __init__(self, signals: Collection[signal.Signals]) -> None:
        self.signals = frozenset(signals)
        self.number: int | None = None

    def record(self, number: int) -> None:
        """Records the first signal. The helper thread handles later ones."""
        if self.number is None:
            self.number = number

    @property
    def name(self) -> str | None:
        """SIGTERM, ..."""
        return None if self.number is None else signal.Signals(self.number).name


_stop_request: StopRequest | None = None
"""The request of this process, because signal handlers belong to the process. Only `deferred` sets it."""


@contextmanager
def deferred(signals: Collection[signal.Signals]) -> Iterator[StopRequest]:
    """Defers these signals inside the block: the first is only recorded; one more than 3 s later ends the process."""
    global _stop_request
    _stop_request = request = StopRequest(signals)
    try:
        yield request
    finally:
        _stop_request = None


@contextmanager
def interruptible(*, grace_s: float, before_exit: Callable[[str], None]) -> Iterator[None]:
    """Turns the first signal into `Interrupted`. Ends the process if that has no effect, or at a later signal.

    Args:
        grace_s: how long the main thread may take to react.
        before_exit: called from a helper thread with the cause, before the process ends with code 1.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    done = threading.Event()
    old_handlers = {number: signal.signal(number, _raise_once) for number in SIGNALS}
    old_fd = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_reset_in_child)
    threading.Thread(target=_end_if_blocked, args=(read_end, done, grace_s, before_exit), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(old_fd)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        write_end.shutdown(
            socket.SHUT_RDWR
        )  # the helper thread reads the end of it, even if a child inherited this end
        write_end.close()


def ignore_further() -> None:
    """Ignores signals from now on: this process is already ending, and its launcher may send them again."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _raise_once(number: int, _frame: FrameType | None) -> None:
    if _stop_request is not None and number in _stop_request.signals:
        _stop_request.record(number)
        return
    for each in SIGNALS:
        signal.signal(each, _ignore_repeated)
    raise Interrupted(f"Stopped by {signal.Signals(number).name}. Steps since the last export are lost.")


def _ignore_repeated(_number: int, _frame: FrameType | None) -> None:
    """Handles a signal after the first one, which is already ending the main thread. The helper thread sees it."""


def _reset_in_child() -> None:
    """Resets a forked helper (a data worker, a pool): only its parent ends it, and it must not wake our thread."""
    if signal.getsignal(signal.SIGTERM) not in (_raise_once, _ignore_repeated):
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a pool ends its processes
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def leave_to_parent() -> None:
    """Ignores our signals in a helper process that its parent needs until it has stopped in good order.

    Launchers send signals to all processes of a rank (Slurm's --signal and scancel, torchrun). A helper that died of
    one would turn a stop with a checkpoint into an error. When the parent ends, the kernel kills the helper.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _end_if_blocked(
    read_end: socket.socket, done: threading.Event, grace_s: float, before_exit: Callable[[str], None]
) -> None:
    """Runs in the helper thread: ends the process if the main thread does not react to a signal, or at a later signal."""
    first = _next_signal(read_end)
    if first:
        begin = time.monotonic()
        # A deferred signal ends the run in good order, however long its step and its checkpoint take.
        is_deferred = _stop_request is not None and first in _stop_request.signals
        try:
            further = _further_signal(read_end, begin, None if is_deferred else begin + grace_s)
        except TimeoutError:
            if not done.is_set():
                name = signal.Signals(first).name
                _exit(f"Stopped by {name}: the process did not react within {grace_s:.0f} s.", before_exit)
        else:
            if further and not done.is_set():
                name = signal.Signals(further).name
                _exit(f"Stopped immediately by a second {name}: nothing more was saved.", before_exit)
    done.wait()  # a write into a socket without a reader would print an error
    read_end.close()


def _further_signal(read_end: socket.socket, begin: float, deadline: float | None) -> int | None:
    """Returns the first signal more than REPEAT_AFTER_S after `begin`; None if the other end is closed.

    Raises:
        TimeoutError: there was none until the deadline.
    """
    while True:
        if deadline is not None:
            read_end.settimeout(max(deadline - time.monotonic(), 0.001))
        further = _next_signal(read_end)
        if further is None or time.monotonic() - begin > REPEAT_AFTER_S:
            return further


def _next_signal(read_end: socket.socket) -> int | None:
    """Waits for the next of our signals and returns its number; None if the other end is closed."""
    while received := read_end.recv(1):
        if received[0] in SIGNALS:
            return received[0]
    return None


def _exit(cause: str, before_exit: Callable[[str], None]) -> None:
    call_with_timeout(partial(before_exit, cause), BEFORE_EXIT_S, None)
    os._exit(1)

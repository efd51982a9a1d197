"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP: what the first one does depends on what there is to save, a later one quits.

By default the first signal raises `Interrupted` in the main thread. Inside `deferred`, where a run has a state to save,
it is recorded, and raises `StopNow` only in work that may be given up (`StopRequest.attempt`).

A Python signal handler waits until the running C call ends, and a collective may wait long for a peer. The C-level
wake-up does not wait: a helper thread reads it, says at once what will happen, and ends the process if the main thread
does not react in time, or at a later signal.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from dtrain.console import log
from dtrain.distributed import linux_process
from dtrain.distributed.bounded import call_with_timeout
from dtrain.errors import Interrupted, Preempted, TopologyError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGUSR1 is what Slurm's --signal sends ahead of the end of a job; mpirun passes it on and survives. SIGHUP: the terminal
or the ssh connection is gone."""

REPEAT_AFTER_S = 3.0
"""A further signal after this time ends the process. Before, it may be the first one, passed on by a launcher."""

BEFORE_EXIT_S = 2.0
"""How long before_exit may take: it writes a file and a line, and either may block."""

POLL_S = 0.2

BeforeExit = Callable[[Interrupted | Preempted], None]


TellPeers = Callable[[int, str | None], bool]


def _tell_nobody(_number: int, _reason: str | None) -> bool:
    """Before the ranks have met, and after they have separated."""
    return True


class StopNow(KeyboardInterrupt):
    """Raised in the main thread by the first signal, inside `StopRequest.attempt`."""


class StopRequest:
    """Whether a signal requested a stop while signals were deferred, and which one.

    Attributes:
        number: the first that arrived; None for none.
        saved: returns why the process may end at any moment, if all that there is to save is on disk; else None. Called
            from the helper thread.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.saved: Callable[[], str | None] = lambda: None
        self._is_attempting = self._has_broken_off = False

    def record(self, number: int) -> None:
        """Records the first signal. The helper thread handles later ones."""
        if self.number is None:
            self.number = number

    def handle(self, number: int) -> None:
        """Handles a signal in the main thread.

        Raises:
            StopNow: the main thread is inside `attempt`.
        """
        self.record(number)
        if self._is_attempting:
            self._has_broken_off = True  # first: the helper thread may be about to answer
            self._is_attempting = False
            raise StopNow

    def attempt(self, work: Callable[[], object]) -> bool:
        """Runs work that a signal may break off at any point; it must not call collectives. Returns whether it ended."""
        try:
            try:
                self._is_attempting = True
                if self.number is not None:
                    return False
                work()
            finally:  # the signal may arrive here, too
                self._is_attempting = False
        except StopNow:
            return False
        return True

    @property
    def why(self) -> str | None:
        """Why the run is to stop; None if it is not."""
        if self.number is None:
            return None
        return _signals.reason or f"stop requested by {signal.Signals(self.number).name}"

    @property
    def answer(self) -> str:
        """What the run does about the first signal."""
        return "saving" if self._has_broken_off or self._is_attempting else "saving after this step"


class _Signals:
    """What the handlers of this process do. There is one, because signal handlers belong to the process.

    Attributes:
        request: set inside `deferred`.
        interrupted: makes the exception that the first signal raises outside of `deferred`.
        peers: tells other ranks about the first signal.
        first: the first signal since `interruptible` began.
        reason: why a rank has sent itself the first signal; None if it came from outside.
    """

    def __init__(self) -> None:
        self.request: StopRequest | None = None
        self.interrupted: Callable[[str], Interrupted] = interrupted_without_save
        self.peers: TellPeers = _tell_nobody
        self.first: int | None = None
        self.reason: str | None = None


def interrupted_without_save(name: str) -> Interrupted:
    """Returns what a command without a state to save raises."""
    return Interrupted(f"Stopped by {name}: nothing was saved.")


_signals = _Signals()


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Defers signals inside the block: the first is recorded; one more than REPEAT_AFTER_S later ends the process."""
    _signals.request = request = StopRequest()
    try:
        yield request
    finally:
        _signals.request = None


@contextmanager
def telling_peers(tell: TellPeers) -> Iterator[None]:
    """Calls `tell` with the first signal's number and the reason, from the helper thread, so that other ranks hear of it.

    It returns whether to print an answer: a launcher also sends signals when another rank has failed.
    """
    _signals.peers = tell
    try:
        yield
    finally:
        _signals.peers = _tell_nobody


def pass_on(number: int, reason: str | None) -> None:
    """Lets a signal that another rank received act on this process, unless it has had one itself."""
    if _signals.first is None and signal.getsignal(number) is _handle:
        _signals.reason = reason
        os.kill(os.getpid(), number)


def request_stop(reason: str) -> bool:
    """Asks a training run to stop as a SIGTERM would; returns whether this process is one. For any thread."""
    if _signals.interrupted is interrupted_without_save and _signals.request is None:
        return False
    _signals.reason = reason
    os.kill(os.getpid(), signal.SIGTERM)
    return True


def unsaved_ending(cause: TopologyError) -> Interrupted | TopologyError:
    """Returns the error with which a process ends that did not stop in time: a run without a step has lost nothing."""
    if _signals.request is None and _signals.interrupted is not interrupted_without_save:
        return _signals.interrupted(str(cause).rstrip("."))
    return cause


def is_stopping() -> bool:
    """Returns whether a signal has asked this process to stop."""
    return _signals.first is not None


@contextmanager
def interruptible(
    *,
    grace_s: float,
    before_exit: BeforeExit,
    interrupted: Callable[[str], Interrupted] = interrupted_without_save,
    repeat_after_s: float | None = None,
) -> Iterator[None]:
    """Turns the first signal into an exception. Ends the process if that has no effect, or at a later signal.

    Args:
        grace_s: how long the main thread may take to react.
        before_exit: called from a helper thread with the cause, before the process ends with that cause's code.
        interrupted: returns the exception for the name of a signal, or for another reason to stop.
        repeat_after_s: replaces REPEAT_AFTER_S.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    done = threading.Event()
    _signals.interrupted, _signals.first, _signals.reason = interrupted, None, None
    old_handlers = {number: signal.signal(number, _handle) for number in SIGNALS if not _is_ignored_hangup(number)}
    old_fd = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_reset_in_child)
    helper = partial(_watch, read_end, done, grace_s, before_exit, repeat_after_s)
    threading.Thread(target=helper, daemon=True).start()
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


def _is_ignored_hangup(number: int) -> bool:
    """Returns whether it is a SIGHUP that was ignored at the start: under nohup the job outlives its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def ignore_further() -> None:
    """Ignores signals until the end of `interruptible`: this process is ending, and its launcher may send them again."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (_handle, _ignore_repeated):
                signal.signal(number, signal.SIG_IGN)


def _handle(number: int, _frame: FrameType | None) -> None:
    _signals.first = _signals.first or number
    if _signals.request is not None:
        _signals.request.handle(number)
        return
    for each in SIGNALS:
        if signal.getsignal(each) is _handle:
            signal.signal(each, _ignore_repeated)
    raise _signals.interrupted(_signals.reason or signal.Signals(_signals.first).name)


def _ignore_repeated(_number: int, _frame: FrameType | None) -> None:
    """Handles a signal after the first one, which is already ending the main thread. The helper thread sees it."""


def _reset_in_child() -> None:
    """Resets a forked helper (a data worker, a pool): only its parent ends it, and it must not wake our thread."""
    if signal.getsignal(signal.SIGTERM) not in (_handle, _ignore_repeated):
        return
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a pool ends its processes


def leave_to_parent() -> None:
    """Ignores our signals in a helper process that its parent needs until it has stopped in good order.

    Launchers send signals to all processes of a rank (Slurm's --signal and scancel, torchrun). A helper that died of
    one would turn a stop with a checkpoint into an error. When the parent ends, the kernel kills the helper.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    linux_process.send_on_parent_death()


# ---------------------------------------------------------------- the helper thread


def _watch(
    read_end: socket.socket,
    done: threading.Event,
    grace_s: float,
    before_exit: BeforeExit,
    repeat_after_s: float | None,
) -> None:
    """Answers the first signal, and ends the process if the main thread does not react to it, or at a later signal."""
    first = _next_signal(read_end)
    if first and not done.is_set():
        request = _signals.request
        _answer(first, request)
        ending = _await_ending(
            read_end, first, request, grace_s, REPEAT_AFTER_S if repeat_after_s is None else repeat_after_s
        )
        if ending is not None and not done.is_set():
            call_with_timeout(partial(before_exit, ending), BEFORE_EXIT_S, None)
            os._exit(ending.exit_code)
    done.wait()  # a write into a socket without a reader would print an error
    read_end.close()


def _answer(number: int, request: StopRequest | None) -> None:
    """Tells the other ranks, and says at once what the signal does."""
    name, again = signal.Signals(number).name, "press Ctrl-C again" if number == signal.SIGINT else "send it again"
    _signals.first = _signals.first or number
    doing = "stopping" if request is None else f"{request.answer}; {again} to quit without saving"
    if request is not None:
        request.record(number)
    if _signals.peers(number, _signals.reason):
        log.info("%s: %s", _signals.reason or name, doing)


def _await_ending(
    read_end: socket.socket, first: int, request: StopRequest | None, grace_s: float, repeat_after_s: float
) -> Interrupted | Preempted | None:
    """Returns why the process must be ended from here; None if the main thread has ended in good order."""
    begin = time.monotonic()
    while True:
        read_end.settimeout(min(POLL_S, max(grace_s, 0.01)))
        try:
            further = _next_signal(read_end)
        except TimeoutError:
            if time.monotonic() - begin < grace_s:
                continue
            if request is None:
                error = _signals.interrupted(_signals.reason or signal.Signals(first).name)
                return Interrupted(f"The process did not react within {grace_s:.0f} s. {error}", error.exit_code)
            # A deferred signal ends the run in good order, however long its step and its checkpoint take.
            reason = request.saved()
            if reason is not None:
                return Preempted(reason)
            continue
        if further is None:
            return None
        if time.monotonic() - begin > repeat_after_s:
            name = signal.Signals(further).name
            return Interrupted(f"Stopped immediately by a second {name}: nothing more was saved.")


def _next_signal(read_end: socket.socket) -> int | None:
    """Waits for the next of our signals and returns its number; None if the other end is closed.

    Raises:
        TimeoutError: there was none in time, if a limit is set.
    """
    while received := read_end.recv(1):
        if received[0] in SIGNALS:
            return received[0]
    return None

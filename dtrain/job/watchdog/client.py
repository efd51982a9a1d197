"""The rank's side of being watched: the monitor is forked, a helper thread listens to it, and the heart beats.

The helper thread asks for the interpreter lock every second; what it writes then tells a rank that holds the lock from
one that waits. It ends the process on the monitor's word, whatever the main thread does.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.console import log
from dtrain.distributed.heartbeat import SIZE, Heartbeat, Phase
from dtrain.distributed.topology import Topology
from dtrain.job.watchdog import process, stacks
from dtrain.job.watchdog.evidence import Ward
from dtrain.job.watchdog.rules import Rules

TICK_S = 1.0
SERVING_S = 10.0
CLOSING_S = 2.0
HUSHED_S = 10.0


class News(NamedTuple):
    """Of a rank that has ended: what its exit.json would have. by_signal: it was told to end, as others may be."""

    rank: int
    host: str
    message: str
    code: int
    by_signal: bool


class Watch:
    """What the rank holds of its monitor. Where nothing watches, everything here does nothing."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        channel: socket.socket | None = None,
        pid: int | None = None,
        file: int | None = None,
    ) -> None:
        """
        Args:
            channel, pid: of the monitor. file: where stacks are written.
        """
        self.heartbeat = heartbeat
        self._file = file
        self._channel, self._pid = channel, pid
        self._news: News | None = None
        self._has_news, self._is_serving, self._is_hushed, self._is_left = (threading.Event() for _ in range(4))
        self._handlers: list[logging.Handler] = []
        self._where: Any = None
        self._why = ""
        self._is_closed = threading.Event()
        self._has_group = False
        self._thread = threading.get_ident()
        if channel is not None:
            threading.Thread(target=self._hear, name="monitor-ear", daemon=True).start()

    def alone(self) -> None:
        """From here on one process is watched, as a job of its own."""
        self._say({"serve": None})

    def join(self, where: Any) -> None:
        """From here on this rank is watched together with all others, whose process group has formed.

        Args:
            where: what `serve` gave on rank 0.
        """
        self._has_group = True
        if where is not None:
            self._say({"join": where})

    def serve(self, topology: Topology) -> Any:
        """On rank 0: its monitor opens the place where all monitors meet; gives it as JSON, or None."""
        if self._channel is None:
            return None
        address = "127.0.0.1" if topology.num_nodes == 1 else topology.master_addr
        self._say({"serve": {"address": address, "world_size": topology.world_size}})
        self._is_serving.wait(SERVING_S)
        if self._where is None:
            log.warning("Nobody watches for ranks that hang: %s", self._why or "rank 0's monitor does not answer")
        return self._where

    def failing(self, words: str, code: int, *, by_signal: bool) -> None:
        """This rank ends with an error, and will say so itself; the others are told."""
        self.heartbeat.at(Phase.ENDING)
        self._say({"failed": words, "code": code, "by_signal": by_signal})

    def news(self, within_s: float) -> News | None:
        """Which rank has ended first, if one has; waits a moment for the word of it."""
        if self._channel is not None:
            self._has_news.wait(within_s)
        return self._news

    def close(self) -> None:
        """Lets the monitor go, and waits for its end; one that stays to end other ranks goes by itself soon after."""
        if self._channel is None or self._pid is None:
            return
        self._say({"bye": True})
        deadline = time.monotonic() + CLOSING_S
        while not (ended := _ended(self._pid)) and not self._is_left.is_set() and time.monotonic() < deadline:
            time.sleep(0.005)
        if not (ended or self._is_left.is_set()):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
        self._is_closed.set()

    def _say(self, message: Any) -> None:
        if self._channel is not None:
            with suppress(OSError):  # the monitor has gone: nobody watches then
                self._channel.sendall(json.dumps(message).encode() + b"\n")

    def stay_quiet(self) -> None:
        """Waits for the end where the monitors have decided on it: they have the last word."""
        if self._is_hushed.is_set():
            threading.Event().wait(HUSHED_S)

    # ------------------------------------------------------------ the helper thread

    def _hear(self) -> None:
        assert self._channel is not None
        rest = b""
        while not self._is_closed.is_set():
            self.heartbeat.thread(_number() if self._has_group else -1)
            readable, _, _ = select.select([self._channel], [], [], TICK_S)
            if not readable:
                continue
            try:
                heard = self._channel.recv(2**16)
            except OSError:
                heard = b""
            if not heard:
                break
            *lines, rest = (rest + heard).split(b"\n")
            for line in lines:
                self._heed(json.loads(line))
        self._channel.close()

    def _heed(self, message: dict[str, Any]) -> None:
        if "hush" in message:
            self._hush() if message["hush"] else self._speak_again()
        match message:
            case {"ask": _, **more}:
                if self._file is not None and "hush" in more:
                    faulthandler.dump_traceback(self._file, all_threads=True)
                is_debugged = stacks.is_debugged(sys._current_frames().get(self._thread))
                self._say({"answer": [_collectives() if self._has_group else [], is_debugged]})
            case {"serving": where}:
                self._where, self._why = where, message.get("why", "")
                self._is_serving.set()
            case {"news": news}:
                self._news = News(**news)
                self._has_news.set()
            case {"staying": _}:
                self._is_left.set()
            case {"exit": code}:
                os._exit(code)

    def _hush(self) -> None:
        """What the main thread would still print or write down is of no use."""
        self._is_hushed.set()
        self._handlers += log.handlers
        log.handlers[:] = []
        log.disabled = True

    def _speak_again(self) -> None:
        """The end that was decided on is called off."""
        if self._is_hushed.is_set():
            log.disabled = False
            log.handlers[:], self._handlers = self._handlers, []
            self._is_hushed.clear()


@contextmanager
def watching(rank: int, rules: Rules, run_dir: Path) -> Iterator[Watch]:
    """A monitor for this process, from before its process group to after it.

    Forked here: call it before torch is imported, so that it shares little with the rank and costs neither time nor
    memory, and before anything is connected or put on a device.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        yield Watch(Heartbeat())
        return
    with _written_stacks() as file:
        memory = mmap.mmap(-1, SIZE)
        heartbeat = Heartbeat(memory)
        ours, theirs = socket.socketpair()
        thread, native_thread = threading.get_ident(), threading.get_native_id()
        ward = Ward(rank, os.getpid(), thread, native_thread, memory, file, theirs, rules, run_dir)
        watch = Watch(heartbeat, ours, _fork(ward, ours), file)
        theirs.close()
        try:
            yield watch
        finally:
            watch.close()


def _fork(ward: Ward, rank_side: socket.socket) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what is not written yet would be written twice
    if "torch" not in sys.modules:  # in a notebook it may be, and with it what is garbage one day
        gc.freeze()  # the rank's own collections would copy every page that is shared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: none of ours holds a lock
        pid = os.fork()
    if pid == 0:
        rank_side.close()
        process.run(ward)
    return pid


@contextmanager
def _written_stacks() -> Iterator[int | None]:
    """A file in memory that faulthandler writes all stacks to: at a signal, and when the interpreter dies.

    None where the signal is another's.
    """
    if signal.getsignal(stacks.SIGNAL) is not signal.SIG_DFL:
        yield None
        return
    file = os.memfd_create("stacks")
    faulthandler.register(stacks.SIGNAL, file=file, all_threads=False, chain=False)
    is_enabled_elsewhere = faulthandler.is_enabled()
    if not is_enabled_elsewhere:
        faulthandler.enable(file=file, all_threads=True)
    try:
        yield file
    finally:
        faulthandler.unregister(stacks.SIGNAL)
        if not is_enabled_elsewhere:
            faulthandler.disable()
        os.close(file)


def _ended(pid: int) -> bool:
    """Whether that child is gone, also if somebody else has collected it."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _number() -> int:
    from dtrain.job.watchdog import flight_recorder

    try:
        return flight_recorder.collective_number()
    except RuntimeError:  # a group that is being taken down
        return -1


def _collectives() -> Sequence[dict[str, Any]]:
    from dtrain.job.watchdog import flight_recorder

    try:
        return flight_recorder.last_collectives()
    except (RuntimeError, ValueError, KeyError):  # another torch, another recorder
        return []

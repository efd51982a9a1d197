"""The rank's side of the watchdog: forks the monitor, and answers it from a helper thread.

The helper thread acquires the interpreter lock (GIL) every second and records that in the heartbeat, which
distinguishes a rank that holds the lock from one that waits. It ends the process if the monitor tells it to, whatever
the main thread does.
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
from dtrain.distributed import signals
from dtrain.distributed.heartbeat import HEARTBEAT_BYTES, Heartbeat, Phase
from dtrain.distributed.topology import Topology
from dtrain.job.watchdog import process, stacks
from dtrain.job.watchdog.evidence import WatchedRank
from dtrain.job.watchdog.rules import HangSettings

TICK_S = 1.0
COORDINATOR_START_S = 10.0
CLOSING_S = 2.0
PEER_FAILURE_S = 0.1
"""How long the answer to a signal waits for the news that another rank has failed."""

SILENCED_S = 10.0


class PeerFailure(NamedTuple):
    """The rank that has failed first. Its exit.json would have these fields.

    Attributes:
        rank: its number.
        host: its host name.
        message: why it ended.
        code: its exit code.
        by_signal: whether a signal told it to end, as others may be told as well.
    """

    rank: int
    host: str
    message: str
    code: int
    by_signal: bool


class WatchdogClient:
    """A rank's connection to its monitor. Without a monitor, all methods do nothing."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        channel: socket.socket | None = None,
        pid: int | None = None,
        stacks_file: int | None = None,
    ) -> None:
        """
        Args:
            heartbeat: where the rank reports its progress.
            channel: socket to the monitor.
            pid: process id of the monitor.
            stacks_file: where faulthandler writes stacks.
        """
        self.heartbeat = heartbeat
        self._stacks_file = stacks_file
        self._channel, self._pid = channel, pid
        self._peer_failure: PeerFailure | None = None
        self._has_failure, self._has_coordinator, self._is_silenced = (threading.Event() for _ in range(3))
        self._is_monitor_staying, self._is_closed = threading.Event(), threading.Event()
        self._saved_handlers: list[logging.Handler] = []
        self._endpoint: Any = None
        self._endpoint_error = ""
        self._has_group = False
        self._main_thread = threading.get_ident()
        if channel is not None:
            threading.Thread(target=self._listen, name="monitor-listener", daemon=True).start()

    def watch_single_rank(self) -> None:
        """Starts to watch this process as a job with one rank."""
        self._send({"start_coordinator": None})

    def join(self, endpoint: Any) -> None:
        """Starts to watch this rank together with all others, after the process group has formed.

        Args:
            endpoint: the result of `start_coordinator` on rank 0.
        """
        self._has_group = True
        if endpoint is not None:
            self._send({"join": endpoint})

    def start_coordinator(self, topology: Topology) -> Any:
        """Starts the coordinator in the monitor of rank 0; returns its endpoint as JSON, or None if that fails."""
        if self._channel is None:
            return None
        address = "127.0.0.1" if topology.num_nodes == 1 else topology.master_addr
        self._send({"start_coordinator": {"address": address, "world_size": topology.world_size}})
        self._has_coordinator.wait(COORDINATOR_START_S)
        if self._endpoint is None:
            log.warning("Hangs are not detected: %s", self._endpoint_error or "rank 0's monitor does not answer")
        return self._endpoint

    def report_failure(self, message: str, code: int, *, by_signal: bool) -> None:
        """Tells the monitors that this rank ends with an error, which it will report itself."""
        self.heartbeat.at(Phase.ENDING)
        self._send({"failed": message, "code": code, "by_signal": by_signal})

    def pass_on_signal(self, number: int, reason: str | None) -> bool:
        """Tells the monitors that this rank got a signal to stop, so that all ranks get it.

        Returns:
            Whether the user needs an answer: not if the launcher stops this rank because another one has failed, or if
            the rank has saved and reported that already.
        """
        self._send({"signal": number, "reason": reason})
        failure = self.peer_failure(PEER_FAILURE_S)
        return (failure is None or failure.by_signal) and self.heartbeat.phase != Phase.ENDING

    def peer_failure(self, timeout_s: float) -> PeerFailure | None:
        """Returns which rank has failed first; waits until the monitor reports one, or for the time-out."""
        if self._channel is not None:
            self._has_failure.wait(timeout_s)
        return self._peer_failure

    def close(self) -> None:
        """Releases the monitor and waits until it has ended, unless it stays for a while to end other ranks."""
        if self._channel is None or self._pid is None:
            return
        self._send({"leaving": True})
        deadline = time.monotonic() + CLOSING_S
        while (
            not (ended := _has_ended(self._pid))
            and not self._is_monitor_staying.is_set()
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        if not (ended or self._is_monitor_staying.is_set()):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
        self._is_closed.set()

    def _send(self, message: Any) -> None:
        if self._channel is not None:
            with suppress(OSError):  # the monitor is gone
                self._channel.sendall(json.dumps(message).encode() + b"\n")

    def wait_if_silenced(self) -> None:
        """Waits for the end if the monitors have decided to end this rank: they print the message."""
        if self._is_silenced.is_set():
            threading.Event().wait(SILENCED_S)

    # ------------------------------------------------------------ the helper thread

    def _listen(self) -> None:
        assert self._channel is not None
        rest = b""
        while not self._is_closed.is_set():
            self.heartbeat.record_gil(_collective_number() if self._has_group else -1)
            readable, _, _ = select.select([self._channel], [], [], TICK_S)
            if not readable:
                continue
            try:
                received = self._channel.recv(2**16)
            except OSError:
                received = b""
            if not received:
                break
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                self._handle(json.loads(line))
        self._channel.close()

    def _handle(self, message: dict[str, Any]) -> None:
        if "silence" in message:
            self._silence() if message["silence"] else self._end_silence()
        match message:
            case {"query": _, **options}:
                if self._stacks_file is not None and "silence" in options:
                    faulthandler.dump_traceback(self._stacks_file, all_threads=True)
                is_debugged = stacks.is_debugged(sys._current_frames().get(self._main_thread))
                self._send({"answer": [_last_collectives() if self._has_group else [], is_debugged]})
            case {"coordinator": endpoint}:
                self._endpoint, self._endpoint_error = endpoint, message.get("error", "")
                self._has_coordinator.set()
            case {"failure": failure}:
                self._peer_failure = PeerFailure(**failure)
                self._has_failure.set()
            case {"staying": _}:
                self._is_monitor_staying.set()
            case {"signal": number, "reason": reason}:
                signals.pass_on(number, reason)
            case {"exit": code}:
                os._exit(code)

    def _silence(self) -> None:
        """Turns the log off: the monitors print the message, and the main thread must not add others."""
        self._is_silenced.set()
        self._saved_handlers += log.handlers
        log.handlers[:] = []
        log.disabled = True

    def _end_silence(self) -> None:
        """Turns the log on again, after the decision to end this rank was withdrawn."""
        if self._is_silenced.is_set():
            log.disabled = False
            log.handlers[:], self._saved_handlers = self._saved_handlers, []
            self._is_silenced.clear()


@contextmanager
def start_watchdog(
    rank: int, settings: HangSettings, run_dir: Path, launcher_error_file: Path | None = None
) -> Iterator[WatchdogClient]:
    """Runs a monitor for this process, from before its process group forms until after it is destroyed.

    Forks: call it before torch is imported, so that the monitor shares little with the rank and costs neither time nor
    memory, and before anything is connected or put on a device.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        yield WatchdogClient(Heartbeat())
        return
    with _stacks_file() as file:
        memory = mmap.mmap(-1, HEARTBEAT_BYTES)
        heartbeat = Heartbeat(memory)
        rank_end, monitor_end = socket.socketpair()
        thread, native_thread = threading.get_ident(), threading.get_native_id()
        files = (run_dir, launcher_error_file)
        watched = WatchedRank(rank, os.getpid(), thread, native_thread, memory, file, monitor_end, settings, *files)
        client = WatchdogClient(heartbeat, rank_end, _fork(watched, rank_end), file)
        monitor_end.close()
        try:
            yield client
        finally:
            client.close()


def _fork(watched: WatchedRank, rank_end: socket.socket) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # both processes would write what is still buffered
    if "torch" not in sys.modules:  # in a notebook it may be loaded, with objects that become garbage later
        gc.freeze()  # the rank's garbage collections would copy every shared page
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks with threads: none of ours holds a lock
        pid = os.fork()
    if pid == 0:
        rank_end.close()
        process.run(watched)
    return pid


@contextmanager
def _stacks_file() -> Iterator[int | None]:
    """Yields a file in memory to which faulthandler writes stacks: at a signal, and when the interpreter crashes.

    None if another handler has the signal.
    """
    if signal.getsignal(stacks.STACK_SIGNAL) is not signal.SIG_DFL:
        yield None
        return
    file = os.memfd_create("stacks")
    faulthandler.register(stacks.STACK_SIGNAL, file=file, all_threads=False, chain=False)
    was_enabled = faulthandler.is_enabled()
    if not was_enabled:
        faulthandler.enable(file=file, all_threads=True)
    try:
        yield file
    finally:
        faulthandler.unregister(stacks.STACK_SIGNAL)
        if not was_enabled:
            faulthandler.disable()
        os.close(file)


def _has_ended(pid: int) -> bool:
    """Returns whether that child is gone, also if other code has collected it."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _collective_number() -> int:
    from dtrain.job.watchdog import flight_recorder

    try:
        return flight_recorder.collective_number()
    except RuntimeError:  # the group is being destroyed
        return -1


def _last_collectives() -> Sequence[dict[str, Any]]:
    from dtrain.job.watchdog import flight_recorder

    try:
        return flight_recorder.last_collectives()
    except (RuntimeError, ValueError, KeyError):  # another version of torch, with another recorder
        return []

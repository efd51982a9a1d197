"""Runs one job on several hosts: starts a command on each, collects the output here, and ends all when one fails.

On every host a supervisor (remote_supervisor.py) runs the command. Only this process holds the pipe to the
supervisor's standard input. When this process ends for any reason, the pipes close and all commands end.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

from dtrain.cluster.job_outcome import HostResult, JobOutcome, combine_results, silent_result
from dtrain.cluster.round_watch import PING_INTERVAL_S, RoundWatch
from dtrain.cluster.rounds import RoundPlan
from dtrain.cluster.ssh import CONNECT_TIMEOUT_S, explain_exit, is_local, python_command, start_on
from dtrain.errors import Preempted

SUPERVISOR = Path(__file__).with_name("remote_supervisor.py")

SETTLE_S = 5.0
"""Time for the other hosts to end by themselves after one has failed; dtrain's own monitoring ends them within it."""

KILL_TIMEOUT_S = 3.0
"""Time for the hosts to answer after they are told to kill their commands."""

SILENCE_LIMIT_S = 9.0
"""After another host has failed, a host that has been silent for this long is not waited for."""

SILENCE_LIMIT_AFTER_SUCCESS_S = 60.0
"""The same limit after another host has succeeded. It is longer, because a busy network may delay the answer."""

ANSWER_TIMEOUT_S = 30.0
"""Time from the connection to a host's first answer; its disk may be slow."""

HARMLESS_CODES = (0, 75)
"""Exit codes that are not a failure, so that the other hosts have no time limit."""


@dataclass(frozen=True)
class HostCommand:
    """The command of one host.

    Attributes:
        host: the host's name.
        argv: the command.
        env: variables that are set in addition to the host's own environment.
    """

    host: str
    argv: Sequence[str]
    env: Mapping[str, str]


@dataclass(frozen=True)
class MultiHostJob:
    """The commands of all hosts.

    Attributes:
        launcher: the name of the program that is started on each host, for messages.
        commands: one for each host, in the order of ranks.
        folder: the working folder on every host.
        exit_file: exit.json, which dtrain writes when it ends; None for a command that writes none.
        ends_with_exit_file: a failure in exit.json ends the job, so a launcher that keeps running is ended. False for a
            launcher that restarts ranks.
        signal_map: the signal that ranks get for a signal to this process; unlisted signals are passed on unchanged.
        launcher_signals: signals that the launcher forwards to its ranks; all others are sent to the ranks directly.
        min_hosts: an elastic job continues while this many hosts, including the first, have not failed. None: the job
            needs all hosts.
        rounds: the launchers wait for orders, so that the job can start again and use spare hosts (rounds.py).
    """

    launcher: str
    commands: Sequence[HostCommand]
    folder: Path
    exit_file: Path | None = None
    ends_with_exit_file: bool = False
    signal_map: Mapping[int, int] | None = None
    launcher_signals: frozenset[int] = frozenset()
    min_hosts: int | None = None
    rounds: RoundPlan | None = None

    def is_over(self, results: Sequence[HostResult]) -> bool:
        """Returns whether the failures so far end the job, so that the other hosts must end too."""
        failed = [result.host for result in results if result.dtrain_code not in HARMLESS_CODES or not result.is_known]
        if self.min_hosts is None or not failed:
            return bool(failed)
        return len(self.commands) - len(failed) < self.min_hosts or self.commands[0].host in failed


class OutputSink(Protocol):
    """Receives the output of the hosts' commands."""

    def show(self, index: int, frame: Mapping[str, str]) -> None:
        """Takes text of a host, keyed by stream name, `out` or `err`. Must not block."""

    def finish(self) -> None:
        """Marks the end of the output. May block until all of it is written."""


class _Event(NamedTuple):
    """A message from a host, or a signal to this process.

    Attributes:
        host_index: the host's index; None for a signal.
        frame: the message.
    """

    host_index: int | None
    frame: dict[str, Any]


class _Connection:
    """The connection to one host's supervisor: its local process, and threads that read from it."""

    def __init__(self, index: int, command: HostCommand, job: MultiHostJob, events: SimpleQueue[_Event]) -> None:
        self.host, self.index, self._events = command.host, index, events
        self.is_local = is_local(command.host)
        # With restarts, silence means that a host is lost. A login may take longer than that.
        self.last_message_s = time.monotonic() + (
            CONNECT_TIMEOUT_S + ANSWER_TIMEOUT_S if job.rounds is not None else 0.0
        )
        self._stderr_lines: list[str] = []
        self.process = start_on(command.host, [*python_command(command.env), str(SUPERVISOR)])
        self.send(
            {
                "argv": list(command.argv),
                "env": dict(command.env),
                "cwd": str(job.folder),
                "exit_file": str(job.exit_file) if job.exit_file is not None else None,
                "ends_with_exit_file": job.ends_with_exit_file,
                "launcher_signals": sorted(job.launcher_signals),
                "takes_orders": job.rounds is not None,
            }
        )
        self._stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_reader.start()
        threading.Thread(target=self._read_frames, daemon=True).start()

    def send(self, order: Mapping[str, Any]) -> None:
        """Sends one line; does nothing if the supervisor has ended."""
        stream = self.process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps(order).encode() + b"\n")
            stream.flush()
        except OSError:
            return

    def _read_frames(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        has_ended = False
        for line in stream:
            self.last_message_s = time.monotonic()
            if not line.strip():
                continue
            try:
                frame = json.loads(line)
            except ValueError:
                frame = None
            if not isinstance(frame, dict):  # output of a login script on the host
                frame = {"err": line.decode("utf-8", "replace")}
            has_ended = has_ended or "end" in frame
            self._events.put(_Event(self.index, frame))
        if not has_ended:
            code = self.process.wait()
            self._stderr_reader.join(1.0)
            lost = explain_exit(self.host, code, "".join(self._stderr_lines))
            self._events.put(_Event(self.index, {"end": {"code": code, "record": None, "lost": lost}}))

    def _read_stderr(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        for line in stream:
            self._stderr_lines = [*self._stderr_lines[-20:], line.decode("utf-8", "replace")]


def run_job(job: MultiHostJob, *, output: OutputSink | None = None) -> JobOutcome:
    """Runs all commands to their end and returns how the job ended.

    Args:
        output: receives the commands' output; by default it is printed.
    """
    events: SimpleQueue[_Event] = SimpleQueue()
    output = output or _Printer([command.host for command in job.commands])
    with _signals_as_events(events):
        connections = [_Connection(index, command, job, events) for index, command in enumerate(job.commands)]
        try:
            return _wait_for_hosts(connections, job, events, output)
        finally:
            _disconnect(connections)
            output.finish()


def _wait_for_hosts(
    connections: Sequence[_Connection], job: MultiHostJob, events: SimpleQueue[_Event], output: OutputSink
) -> JobOutcome:
    """Waits until all commands have ended, or the remaining hosts no longer answer."""
    results, stop_signal = list[HostResult](), None
    deadline, was_killed, last_ping = math.inf, False, 0.0
    watch = RoundWatch(connections, job.rounds) if job.rounds is not None else None
    while running := [each for each in connections if each.host not in {result.host for result in results}]:
        now = time.monotonic()
        can_be_over = watch is None or watch.rounds.is_final
        if (was_killed and now > deadline) or (
            results and can_be_over and _are_silent(running, now, deadline < math.inf, job)
        ):
            results += [silent_result(connection.host) for connection in running]
            break
        if now > deadline:
            _send_to_all(running, {"kill": True})
            deadline, was_killed = now + KILL_TIMEOUT_S, True
        interval_s = PING_INTERVAL_S if watch is None else watch.ping_interval_s
        if now > last_ping + interval_s:
            _send_to_all(running, {"ping": True})
            last_ping = now
        if watch is not None:
            results += watch.look(running, now)
        wait_s = min(deadline, last_ping + interval_s, math.inf if watch is None else watch.rounds.deadline) - now
        event = _next_event(events, wait_s)
        if event is None:
            continue
        now = time.monotonic()
        if event.host_index is None:
            stop_signal = _map_signal(event.frame["signal"], job)
            _send_to_all(running, {"signal": stop_signal})
            if watch is not None:
                watch.stop()
        elif "end" in event.frame:
            if connections[event.host_index].host in {result.host for result in results}:
                continue  # it was given up before
            results.append(HostResult(connections[event.host_index].host, was_killed=was_killed, **event.frame["end"]))
            if watch is not None:
                watch.take_end(event.host_index, results[-1], now)
            # Hosts that were lost before the last start, and spare ones, do not count.
            counted = results if watch is None else watch.of_last_round(results)
            if deadline == math.inf and (watch is None or watch.rounds.is_final) and job.is_over(counted):
                deadline = now + SETTLE_S
        elif "report" in event.frame and watch is not None:
            watch.take_report(event.host_index, event.frame["report"], now)
        elif "ping" not in event.frame:
            output.show(event.host_index, event.frame)
    counted = results if watch is None else watch.of_last_round(results)
    outcome = combine_results(counted, job.launcher, is_elastic=job.min_hosts is not None, stop_signal=stop_signal)
    if watch is None or watch.rounds.has_begun or outcome.code or stop_signal is None:
        return outcome
    message = f"Stopped by {signal.Signals(stop_signal).name} before there were ranks: nothing is lost."
    return JobOutcome(Preempted.exit_code, message, stop_signal)


def _are_silent(running: Sequence[_Connection], now: float, is_over: bool, job: MultiHostJob) -> bool:
    """Returns whether all remaining hosts have been silent for so long that they are not waited for."""
    limit_s = SILENCE_LIMIT_S if is_over or job.min_hosts is not None else SILENCE_LIMIT_AFTER_SUCCESS_S
    return all(now - connection.last_message_s > limit_s for connection in running)


def _map_signal(number: int, job: MultiHostJob) -> int:
    """Returns the signal for the ranks. A closed terminal (SIGHUP) means stop, for which ranks handle SIGTERM."""
    number = int(signal.SIGTERM) if number == signal.SIGHUP else number
    return (job.signal_map or {}).get(number, number)


def _next_event(events: SimpleQueue[_Event], wait_s: float) -> _Event | None:
    try:
        return events.get(timeout=max(wait_s, 0.0))
    except Empty:
        return None


def _send_to_all(connections: Sequence[_Connection], order: Mapping[str, Any]) -> None:
    for connection in connections:
        connection.send(order)


def _disconnect(connections: Sequence[_Connection]) -> None:
    """Closes the pipes to the supervisors and waits until the local processes have ended."""
    for connection in connections:
        if connection.process.stdin is not None:
            try:
                connection.process.stdin.close()
            except OSError:
                continue
    for connection in connections:
        try:
            connection.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            connection.process.kill()
            connection.process.wait()


@contextmanager
def _signals_as_events(events: SimpleQueue[_Event]) -> Iterator[None]:
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    previous = {number: signal.getsignal(number) for number in numbers}
    # nohup ignores SIGHUP, and it must stay ignored.
    previous = {number: handler for number, handler in previous.items() if handler is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, lambda received, _: events.put(_Event(None, {"signal": int(received)})))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Printer:
    """Prints the output of the commands: the first host's unchanged, the others' with the host's name before each line.

    It prints in a thread, so that a blocked terminal (Ctrl-S, a pager) does not stop the monitoring of the job.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._open_line: tuple[int, str] | None = None
        self._texts: SimpleQueue[tuple[int, str, str] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._print_all, daemon=True)
        self._thread.start()

    def show(self, index: int, frame: Mapping[str, str]) -> None:
        for name, text in frame.items():
            self._texts.put((index, name, text))

    def finish(self) -> None:
        """Waits until everything is printed."""
        self._texts.put(None)
        self._thread.join()

    def _print_all(self) -> None:
        while (item := self._texts.get()) is not None:
            self._print(*item)
        if self._open_line is not None:
            _write(self._open_line[1], "\n")

    def _print(self, index: int, name: str, text: str) -> None:
        """Prints text. First ends the line that another stream has left open."""
        continues_line = self._open_line == (index, name)
        if self._open_line is not None and not continues_line:
            _write(self._open_line[1], "\n")
        self._open_line = None if text.endswith("\n") else (index, name)
        if index > 0:
            prefix, body = f"{self._hosts[index]}: ", text.removesuffix("\n")
            text = ("" if continues_line else prefix) + body.replace("\n", f"\n{prefix}") + text[len(body) :]
        _write(name, text)


def _write(name: str, text: str) -> None:
    """Writes to a standard stream. If it is closed (the terminal is gone, `| head`), redirects it to /dev/null."""
    stream = sys.stdout if name == "out" else sys.stderr
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

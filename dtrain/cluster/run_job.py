"""One job on several hosts: started on each, its output brought here, and ended everywhere when it ends anywhere.

Every host's part hangs on a leash (leash.py) that only this process holds: when this one dies, however it does, the
pipes close and all parts end.
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

from dtrain.cluster.job_outcome import Outcome, PartEnd, outcome
from dtrain.cluster.ssh import python_with, start_on, why_not

LEASH = Path(__file__).with_name("remote_supervisor.py")

SETTLE_S = 5.0
"""How long the other parts may take by themselves once one has failed: dtrain's own watch ends them within it."""

KILLED_S = 3.0
"""How long they may take when they are told to be killed."""

HERE_S = 3.0
"""How often each part hears that this process is there, and answers."""

UNHEARD_S = 9.0
"""A part that has not answered for so long is not waited for once another has failed."""

UNHEARD_AT_THE_END_S = 60.0
"""The same once another has ended well: a busy network is given more."""

UNASKED = (0, 75)
"""Ends that say nothing against the other parts: they may take their time."""


@dataclass(frozen=True)
class Part:
    """What one host runs. env: what is set there besides the host's own environment."""

    host: str
    argv: Sequence[str]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """All parts.

    launcher: what is started on each host, for messages.
    folder: the working folder on every host.
    note: where dtrain writes why it ended, below that folder; None for a command that does not.
    signals: what a signal to this process becomes for the ranks.
    note_is_end: what dtrain writes there is the end; a launcher that stays is ended. Not where it starts ranks again.
    launcher_takes: signals that the launcher passes on to its ranks; the others go to these directly.
    least: the job goes on without parts that fail while so many are left, and the first, where the others meet. None:
        it takes all of them.
    """

    launcher: str
    parts: Sequence[Part]
    folder: Path
    note: Path | None = None
    note_is_end: bool = False
    signals: Mapping[int, int] | None = None
    launcher_takes: frozenset[int] = frozenset()
    least: int | None = None

    def is_over(self, ends: Sequence[PartEnd]) -> bool:
        """Whether these ends are the end of the whole job, so that the other parts are to end as well."""
        failed = [end.host for end in ends if end.own_code not in UNASKED or not end.is_known]
        if self.least is None or not failed:
            return bool(failed)
        return len(self.parts) - len(failed) < self.least or self.parts[0].host in failed


class Screen(Protocol):
    """Where the parts' output goes."""

    def show(self, place: int, frame: Mapping[str, str]) -> None:
        """Takes text of a part: by the stream's name, out or err. Must not wait."""

    def finish(self) -> None:
        """There is no more; may wait until all of it is shown."""


class _Event(NamedTuple):
    """What happened to a part (by its place); None for a signal to this process."""

    part: int | None
    frame: dict[str, Any]


class _Part:
    """A part that runs: its process here, and the threads that read from it."""

    def __init__(self, place: int, part: Part, job: Job, events: SimpleQueue[_Event]) -> None:
        self.host, self._place, self._events = part.host, place, events
        self.heard_s = time.monotonic()
        self._complaints: list[str] = []
        self.process = start_on(part.host, [*python_with(part.env), str(LEASH)])
        spec = {
            "argv": list(part.argv),
            "env": dict(part.env),
            "cwd": str(job.folder),
            "note": str(job.note) if job.note is not None else None,
            "note_is_end": job.note_is_end,
            "launcher_takes": sorted(job.launcher_takes),
        }
        self.order(spec)
        self._listener = threading.Thread(target=self._listen_to_errors, daemon=True)
        self._listener.start()
        threading.Thread(target=self._listen, daemon=True).start()

    def order(self, what: Mapping[str, Any]) -> None:
        """Sends one line; a part that is gone hears nothing."""
        stream = self.process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps(what).encode() + b"\n")
            stream.flush()
        except OSError:
            return

    def _listen(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        ended = False
        for line in stream:
            self.heard_s = time.monotonic()
            if not line.strip():
                continue
            try:
                frame = json.loads(line)
            except ValueError:
                frame = None
            if not isinstance(frame, dict):  # a login script of the host that prints
                frame = {"err": line.decode("utf-8", "replace")}
            ended = ended or "end" in frame
            self._events.put(_Event(self._place, frame))
        if not ended:
            code = self.process.wait()
            self._listener.join(1.0)
            lost = why_not(self.host, code, "".join(self._complaints))
            self._events.put(_Event(self._place, {"end": {"code": code, "note": None, "lost": lost}}))

    def _listen_to_errors(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        for line in stream:
            self._complaints = [*self._complaints[-20:], line.decode("utf-8", "replace")]


def run_job(job: Job, *, screen: Screen | None = None) -> Outcome:
    """Runs all parts to their end; gives how the job ended.

    Args:
        screen: what takes the output; by default it is printed.
    """
    events: SimpleQueue[_Event] = SimpleQueue()
    screen = screen or _Printed([part.host for part in job.parts])
    with _signals_as_events(events):
        parts = [_Part(place, part, job, events) for place, part in enumerate(job.parts)]
        try:
            return _follow(parts, job, events, screen)
        finally:
            _let_go(parts)
            screen.finish()


def _follow(parts: Sequence[_Part], job: Job, events: SimpleQueue[_Event], screen: Screen) -> Outcome:
    """Until all parts have ended, or those that have not do not answer any more."""
    ends, asked = list[PartEnd](), None
    deadline, was_killed, greeted = math.inf, False, 0.0
    while left := [part for part in parts if part.host not in {end.host for end in ends}]:
        now = time.monotonic()
        if (was_killed and now > deadline) or (ends and _are_silent(left, now, deadline < math.inf, job)):
            ends += map(_silent, left)
            break
        if now > deadline:
            _tell(left, {"kill": True})
            deadline, was_killed = now + KILLED_S, True
        if now > greeted + HERE_S:
            _tell(left, {"here": True})
            greeted = now
        event = _next(events, min(deadline, greeted + HERE_S) - now)
        if event is None:
            continue
        if event.part is None:
            asked = _passed_on(event.frame["signal"], job)
            _tell(left, {"signal": asked})
        elif "end" in event.frame:
            ends.append(PartEnd(parts[event.part].host, was_killed=was_killed, **event.frame["end"]))
            if deadline == math.inf and job.is_over(ends):
                deadline = now + SETTLE_S
        elif "here" not in event.frame:
            screen.show(event.part, event.frame)
    return outcome(ends, job.launcher, is_elastic=job.least is not None, asked=asked)


def _are_silent(left: Sequence[_Part], now: float, is_over: bool, job: Job) -> bool:
    """Whether those that are left have not answered for so long that they are not waited for."""
    limit_s = UNHEARD_S if is_over or job.least is not None else UNHEARD_AT_THE_END_S
    return all(now - part.heard_s > limit_s for part in left)


def _passed_on(number: int, job: Job) -> int:
    """What the ranks get. A terminal that is closed tells the job to stop, and ranks know SIGTERM for that."""
    number = int(signal.SIGTERM) if number == signal.SIGHUP else number
    return (job.signals or {}).get(number, number)


def _next(events: SimpleQueue[_Event], wait_s: float) -> _Event | None:
    try:
        return events.get(timeout=max(wait_s, 0.0))
    except Empty:
        return None


def _silent(part: _Part) -> PartEnd:
    lost = f"{part.host}: it does not answer any more, so what runs there may still run; its ranks end by themselves."
    return PartEnd(part.host, 1, lost=lost, was_killed=True)


def _tell(parts: Sequence[_Part], order: Mapping[str, Any]) -> None:
    for part in parts:
        part.order(order)


def _let_go(parts: Sequence[_Part]) -> None:
    """Ends the leashes, and waits until what holds them here is gone."""
    for part in parts:
        if part.process.stdin is not None:
            try:
                part.process.stdin.close()
            except OSError:
                continue
    for part in parts:
        try:
            part.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            part.process.kill()
            part.process.wait()


@contextmanager
def _signals_as_events(events: SimpleQueue[_Event]) -> Iterator[None]:
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # nohup
    for number in before:
        signal.signal(number, lambda given, _: events.put(_Event(None, {"signal": int(given)})))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Printed:
    """What the parts print: the first host's as it is, the others' lines with the host's name before them.

    In a thread of its own: a terminal that is held up (Ctrl-S, a pager) must not keep the job from being watched.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._open: tuple[int, str] | None = None
        self._texts: SimpleQueue[tuple[int, str, str] | None] = SimpleQueue()
        self._printer = threading.Thread(target=self._print_all, daemon=True)
        self._printer.start()

    def show(self, place: int, frame: Mapping[str, str]) -> None:
        for name, text in frame.items():
            self._texts.put((place, name, text))

    def finish(self) -> None:
        """Waits until all is printed."""
        self._texts.put(None)
        self._printer.join()

    def _print_all(self) -> None:
        while (given := self._texts.get()) is not None:
            self._print(*given)
        if self._open is not None:
            _write(self._open[1], "\n")

    def _print(self, place: int, name: str, text: str) -> None:
        """A line that another stream has left open is ended first."""
        goes_on = self._open == (place, name)
        if self._open is not None and not goes_on:
            _write(self._open[1], "\n")
        self._open = None if text.endswith("\n") else (place, name)
        if place > 0:
            prefix, body = f"{self._hosts[place]}: ", text.removesuffix("\n")
            text = ("" if goes_on else prefix) + body.replace("\n", f"\n{prefix}") + text[len(body) :]
        _write(name, text)


def _write(name: str, text: str) -> None:
    """To a standard stream; once that is closed (a terminal that is gone, `| head`), to nowhere."""
    stream = sys.stdout if name == "out" else sys.stderr
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

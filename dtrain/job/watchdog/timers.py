"""Measures for how long a rank has been idle, stopped or without the interpreter lock, from one poll to the next."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.distributed.heartbeat import HeartbeatReading
from dtrain.job.watchdog.rules import HangSettings, RankState


def poll_period_s(settings: HangSettings) -> float:
    """Returns the seconds between two polls."""
    return 2.0 if settings.hang_timeout_s is None else min(2.0, max(0.1, settings.hang_timeout_s / 10))


OUTSIDE_FRACTION = 0.25
"""A rank counts as outside of collectives only after it has been seen so for this fraction of its limit."""


class IdleTimers:
    """Counts idle time only while the monitor itself was running.

    A rank that starts collectives is not idle, even without heartbeats between them. Nor is one that a debugger holds.
    """

    def __init__(self) -> None:
        self._progress, self._last_poll = (-1, -1), time.monotonic()
        self._idle_s = self._stopped_s = self._gil_blocked_s = self._in_collective_s = self._outside_s = 0.0
        self._gil_acquired_s = self._elapsed_s = 0.0
        self._in_collective: bool | None = None
        self._was_outside, self._outside_progress = False, (-1, -1)
        self._pending: list[tuple[str, int, str]] = []

    def poll(self, reading: HeartbeatReading, process_state: str, *, now: float, period_s: float) -> None:
        """Updates the timers. A pause of the whole machine counts as three periods at most."""
        elapsed, progress = min(now - self._last_poll, 3 * period_s), (reading.writes, reading.collective)
        is_traced = process_state == "t"  # by a debugger
        is_gil_free = reading.gil_acquired_s != self._gil_acquired_s
        self._idle_s = 0.0 if is_traced or progress != self._progress else self._idle_s + elapsed
        self._stopped_s = self._stopped_s + elapsed if process_state == "T" else 0.0
        self._gil_blocked_s = 0.0 if is_traced or is_gil_free else self._gil_blocked_s + elapsed
        self._progress, self._gil_acquired_s = progress, reading.gil_acquired_s
        self._last_poll, self._elapsed_s = now, elapsed
        self._in_collective = None
        if progress != self._outside_progress:
            self._was_outside, self._outside_progress = False, progress

    def add_answer(self, collectives: Sequence[Mapping[str, Any]], *, is_debugged: bool, limit_s: float) -> None:
        """Adds what the rank's helper thread has answered since the last poll; see evidence.HelperAnswer.

        Args:
            limit_s: how long the rank may be idle.
        """
        pending = [(each["group"], each["number"], each["name"]) for each in collectives if each["pending"]]
        was_outside, self._was_outside = self._was_outside, bool(collectives) and not pending
        self._outside_s = self._outside_s + self._elapsed_s if was_outside and self._was_outside else 0.0
        # A rank that waited in a collective until a moment ago was not idle outside of one.
        is_certain = pending or self._outside_s >= limit_s * OUTSIDE_FRACTION
        self._in_collective = bool(pending) if collectives and is_certain else None
        is_same = pending and pending == self._pending
        self._in_collective_s = self._in_collective_s + self._elapsed_s if is_same else 0.0
        self._pending = pending
        if is_debugged:
            self._idle_s = self._gil_blocked_s = 0.0

    def state(self, rank: int, reading: HeartbeatReading) -> RankState:
        """Returns the state for the coordinator."""
        return RankState(
            rank=rank,
            phase=reading.phase,
            step=reading.step,
            idle_s=self._idle_s,
            stopped_s=self._stopped_s,
            gil_blocked_s=self._gil_blocked_s,
            in_collective=self._in_collective,
            in_collective_s=self._in_collective_s,
            median_step_s=reading.median_step_s,
            steps_timed=reading.steps_timed,
            evaluations=reading.evaluations,
        )

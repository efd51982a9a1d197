"""How long a rank has been silent, stopped or deaf, from one look to the next."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.distributed.heartbeat import Pulse
from dtrain.job.watchdog.rules import Rules, Seen


def period_of(rules: Rules) -> float:
    """Seconds between two looks."""
    return 2.0 if rules.hang_timeout_s is None else min(2.0, max(0.1, rules.hang_timeout_s / 10))


FREE = 0.25
"""For so much of its limit a rank must be seen outside of all collectives before that is held against it."""


class Silence:
    """How long a rank has been silent, counted only while the monitor itself was awake.

    A rank that begins collectives goes on, also where nothing beats between them; one that a debugger holds is not
    silent by itself.
    """

    def __init__(self) -> None:
        self._beats, self._last = (-1, -1), time.monotonic()
        self._silent_s = self._stopped_s = self._deaf_s = self._waited_s = self._free_s = 0.0
        self._lock_s = self._passed_s = 0.0
        self._waits: bool | None = None
        self._is_free, self._seen_free = False, (-1, -1)
        self._pending: list[tuple[str, int, str]] = []

    def observe(self, pulse: Pulse, state: str, *, now: float, period_s: float) -> None:
        """One look. After a pause of the whole machine no more than three periods are counted."""
        passed, beats = min(now - self._last, 3 * period_s), (pulse.number, pulse.collective)
        is_held = state == "t"  # by a debugger
        self._silent_s = 0.0 if is_held or beats != self._beats else self._silent_s + passed
        self._stopped_s = self._stopped_s + passed if state == "T" else 0.0
        self._deaf_s = 0.0 if is_held or pulse.lock_s != self._lock_s else self._deaf_s + passed
        self._beats, self._lock_s, self._last, self._passed_s = beats, pulse.lock_s, now, passed
        self._waits = None
        if beats != self._seen_free:
            self._is_free, self._seen_free = False, beats

    def answered(self, collectives: Sequence[Mapping[str, Any]], *, is_debugged: bool, limit_s: float) -> None:
        """What the rank's helper thread says since the last look; see witness.Answer.

        Args:
            limit_s: how long the rank may be silent.
        """
        pending = [(each["group"], each["number"], each["name"]) for each in collectives if each["pending"]]
        was_free, self._is_free = self._is_free, bool(collectives) and not pending
        self._free_s = self._free_s + self._passed_s if was_free and self._is_free else 0.0
        # One that was waiting until a moment ago has not been silent by itself.
        is_sure = pending or self._free_s >= limit_s * FREE
        self._waits = bool(pending) if collectives and is_sure else None
        self._waited_s = self._waited_s + self._passed_s if pending and pending == self._pending else 0.0
        self._pending = pending
        if is_debugged:
            self._silent_s = self._deaf_s = 0.0

    def seen(self, rank: int, pulse: Pulse) -> Seen:
        """As the hub wants it."""
        return Seen(
            rank=rank,
            phase=pulse.phase,
            step=pulse.step,
            silent_s=self._silent_s,
            stopped_s=self._stopped_s,
            deaf_s=self._deaf_s,
            waits=self._waits,
            waited_s=self._waited_s,
            median_s=pulse.median_s,
            steps_timed=pulse.steps_timed,
            evaluations=pulse.evaluations,
        )

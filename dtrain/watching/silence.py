"""How long a rank has been silent, stopped or deaf, from one look to the next."""

from __future__ import annotations

import time

from dtrain.heartbeat import Pulse
from dtrain.watching.verdict import Rules, Seen


def period_of(rules: Rules) -> float:
    """Seconds between two looks."""
    return 2.0 if rules.hang_timeout_s is None else min(2.0, max(0.1, rules.hang_timeout_s / 10))


class Silence:
    """How long a rank has been silent, counted only while the monitor itself was awake."""

    def __init__(self) -> None:
        self._number, self._last = -1, time.monotonic()
        self._silent_s = self._stopped_s = self._deaf_s = 0.0
        self._lock_s = 0.0

    def observe(self, pulse: Pulse, state: str, *, now: float, period_s: float) -> None:
        """One look. After a pause of the whole machine no more than three periods are counted."""
        passed = min(now - self._last, 3 * period_s)
        self._silent_s = 0.0 if pulse.number != self._number else self._silent_s + passed
        self._stopped_s = self._stopped_s + passed if state == "T" else 0.0
        self._deaf_s = 0.0 if pulse.lock_s != self._lock_s else self._deaf_s + passed
        self._number, self._lock_s, self._last = pulse.number, pulse.lock_s, now

    def seen(self, rank: int, pulse: Pulse) -> Seen:
        """As the hub wants it."""
        return Seen(
            rank=rank,
            phase=pulse.phase,
            step=pulse.step,
            silent_s=self._silent_s,
            stopped_s=self._stopped_s,
            deaf_s=self._deaf_s,
            median_s=pulse.median_s,
            steps_timed=pulse.steps_timed,
        )

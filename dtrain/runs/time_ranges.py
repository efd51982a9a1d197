"""Ranges of steps and of time, sorted once and then searched: a run may have as many of them as lines."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


class StepRanges:
    """Ranges of steps, which may overlap."""

    def __init__(self) -> None:
        self._added: list[range] = []
        self._merged: list[range] = []

    def add(self, steps: range) -> None:
        """Adds a range."""
        if steps:
            self._added.append(steps)

    def count(self, first: int, end: int) -> int:
        """Returns how many steps from `first` up to `end` (excluded) are in any of them. Nothing may be added afterwards."""
        if len(self._merged) == 0 < len(self._added):
            self._merge()
        at = bisect_right(self._merged, first, key=lambda steps: steps.stop)
        found = 0
        while at < len(self._merged) and self._merged[at].start < end:
            found += min(self._merged[at].stop, end) - max(self._merged[at].start, first)
            at += 1
        return found

    def _merge(self) -> None:
        for steps in sorted(self._added, key=lambda steps: steps.start):
            if self._merged and steps.start <= self._merged[-1].stop:
                last = self._merged.pop()
                steps = range(last.start, max(last.stop, steps.stop))
            self._merged.append(steps)


class Waits:
    """Waits, each with its start and end in seconds. They may be added in any order."""

    def __init__(self) -> None:
        self._waits: list[tuple[float, float]] = []
        self._latest_ends: list[float] | None = None

    def add(self, begin: float, end: float) -> None:
        """Adds a wait."""
        self._waits.append((begin, end))

    def between(self, since: float, now: float) -> Sequence[tuple[float, float]]:
        """Returns those that may overlap that time. Nothing may be added afterwards."""
        if self._latest_ends is None:
            self._waits.sort()
            self._latest_ends = list(accumulate((end for _, end in self._waits), max))
        first = bisect_right(self._latest_ends, since)
        return self._waits[first : bisect_left(self._waits, (now,), lo=first)]

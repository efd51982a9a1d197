"""The result of a row, and what is computed of samples."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.suite.race import Lane


@dataclass
class RowResult:
    """One row of the table, as it was measured.

    Attributes:
        name: as on the command line.
        title: what is compared, in a few words.
        workload: model, data and sizes in one sentence.
        lanes: the contestants; the first is dtrain.
        columns: what the Markdown table shows: heading to (key of figures or samples, factor, decimals).
        compared: ratios in the table: heading to key of samples.
        checks: sentences about deterministic figures, and whether they hold.
        notes: what a reader must know of this run.
        seconds: how long the row took.
    """

    name: str
    title: str
    workload: str
    lanes: list[Lane]
    columns: dict[str, tuple[str, float, int]] = field(default_factory=dict)
    compared: dict[str, str] = field(default_factory=lambda: {"CPU / dtrain": "cpu_s", "wall / dtrain": "wall_s"})
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def reference(self, lane: Lane) -> Lane | None:
        """Returns the lane that one is compared with: dtrain, on as many ranks; None for dtrain itself."""
        ranks = re.search(r", \d+ ranks?$", lane.name)
        own = self.lane("dtrain" + (ranks.group() if ranks else ""))
        return None if own is lane else own

    def lane(self, name: str) -> Lane | None:
        """Returns a contestant that ran; None if it did not, or is not part of the row."""
        return next((lane for lane in self.lanes if lane.name == name and lane.ran), None)


def value_of(lane: Lane, key: str) -> float | None:
    """Returns a figure, or the median of a quantity's samples."""
    if key in lane.samples:
        return statistics.median(lane.samples[key])
    value = lane.figures.get(key)
    return float(value) if isinstance(value, int | float) else None


def ratio(lane: Lane, reference: Lane, key: str) -> float | None:
    """Returns the median, over the rounds, of lane / reference: above 1 means that the reference is faster.

    None where a time, as a difference of two runs, is not above zero: then it is smaller than the noise.
    """
    ours, theirs = lane.samples.get(key, []), reference.samples.get(key, [])
    if any(value <= 0 for value in (*ours, *theirs)):
        return None
    if ours and len(ours) == len(theirs):
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    mine, other = value_of(lane, key), value_of(reference, key)
    return mine / other if mine is not None and other else None


def difference(lane: Lane, reference: Lane, key: str) -> float | None:
    """Returns the median, over the rounds, of lane - reference."""
    ours, theirs = lane.samples.get(key, []), reference.samples.get(key, [])
    if not ours or len(ours) != len(theirs):
        return None
    return statistics.median(a - b for a, b in zip(ours, theirs, strict=True))


def merge_counts(timed: Sequence[Lane], counted: Sequence[Lane]) -> list[Lane]:
    """Returns the timed lanes with the counts of the same contestants."""
    counts = {lane.name: lane for lane in counted}
    for lane in timed:
        other = counts.get(lane.name)
        if other is not None and lane.ran:
            if other.ran:
                lane.figures = {**lane.figures, **_without_times(other.figures)}
            else:
                lane.figures["counting"] = other.status
    return list(timed)


def _without_times(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in ("process_cpu_s", "peak_memory_bytes")}


def close(a: float | None, b: float | None, tolerance: float) -> bool:
    """Returns whether two losses agree, relative to the first."""
    return a is not None and b is not None and abs(a - b) <= tolerance * abs(a)

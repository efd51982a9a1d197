"""Names the rank that all others wait for: a pure rule over what each rank measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FACTOR = 1.3
"""A rank that works this many times as long as the median rank is a straggler."""


@dataclass(frozen=True)
class RankWork:
    """One rank's own work in some steps. Waiting for other ranks is not work.

    Attributes:
        compute_s: seconds in forward and backward passes.
        data_s: seconds waiting for its own batches.
        computed: tokens computed, with padding; 0 if unknown.
        micro_batches: number of micro-batches run.
    """

    compute_s: float
    data_s: float
    computed: int
    micro_batches: int

    @property
    def seconds(self) -> float:
        return self.compute_s + self.data_s


@dataclass(frozen=True)
class Straggler:
    """The slowest rank.

    Attributes:
        rank: its number.
        factor: its time over the median rank's, for the same work.
        part: what takes longer: forward and backward, or the wait for its batches.
    """

    rank: int
    factor: float
    part: Literal["compute", "data"]


def find_straggler(ranks: Sequence[RankWork]) -> Straggler | None:
    """Returns the slowest rank if it is FACTOR times slower than the median; None if there is none, or only one rank.

    A rank may have more work than others by design, so it must be slow by each measure: in all, per micro-batch and per
    token. Of an even number of ranks the median is the lower one: of two ranks the faster.
    """
    if len(ranks) < 2:
        return None
    factors = [min(ratios) for ratios in zip(*_ratios(ranks), strict=True)]
    factor = max(factors)
    if factor < FACTOR:
        return None
    slowest = factors.index(factor)
    excess_compute = ranks[slowest].compute_s - statistics.median_low(each.compute_s for each in ranks)
    excess_data = ranks[slowest].data_s - statistics.median_low(each.data_s for each in ranks)
    return Straggler(slowest, factor, "data" if excess_data > excess_compute else "compute")


def _ratios(ranks: Sequence[RankWork]) -> list[list[float]]:
    """Returns each rank's time over the median rank's by three measures: in all, per micro-batch, and per token."""
    shares: list[list[float]] = [[1.0] * len(ranks), [float(each.micro_batches) for each in ranks]]
    if all(each.computed for each in ranks):
        shares.append([float(each.computed) for each in ranks])
    measures = []
    for share in shares:
        times = [each.seconds / max(part, 1.0) for each, part in zip(ranks, share, strict=True)]
        median = statistics.median_low(times)
        measures.append([value / median if median > 0 else 1.0 for value in times])
    return measures

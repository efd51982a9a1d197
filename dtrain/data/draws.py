"""Which rows of a table are validation rows, and which `data.limit` keeps: drawn by a hash of the seed and the row.

A pure function of `data.split_seed`, the rows' numbers in the source and their classes, so every rank, node, world size
and resume gets the same rows. The rows that are drawn keep the order of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from dtrain.data.seeding import derive_seed

Method = Literal["stratified", "mixed", "end"]
"""How rows are drawn. `end` draws nothing: the last rows are the validation split, and a limit keeps the first."""

Indices = npt.NDArray[np.int64]


def draw(
    numbers: Sequence[int], count: int, *, seed: int, classes: Sequence[str] | None, keeps_each: bool = False
) -> Indices:
    """Returns the indices of `count` rows, ascending.

    Rows are taken in the order of a hash of the seed and their number, so other rows barely change which ones are taken.
    Rows of one source row (the questions of an article) have one number and stay together as far as possible.

    Args:
        numbers: line or row in the source of each row.
        count: rows to take.
        classes: label of each row, to take each label in proportion; None: all rows alike.
        keeps_each: the rows that are not taken keep at least one row of each class (for the training split). Then fewer
            than `count` rows may be taken.
    """
    hashes = _mix(np.asarray(numbers, dtype=np.uint64) ^ np.uint64(derive_seed(seed, "split") & (2**64 - 1)))
    order = np.lexsort((np.arange(len(hashes)), hashes))
    if classes is None:
        return np.sort(order[:count])
    groups: dict[str, list[int]] = {}
    for index in order.tolist():
        groups.setdefault(classes[index], []).append(index)
    names = sorted(groups)
    shares = _apportion([len(groups[name]) for name in names], count, reserve=1 if keeps_each else 0)
    return np.sort(
        np.array([i for name, k in zip(names, shares, strict=True) for i in groups[name][:k]], dtype=np.int64)
    )


def _apportion(sizes: Sequence[int], count: int, *, reserve: int) -> list[int]:
    """Returns how many rows of each class are taken: in proportion, by largest remainders (Hamilton's method).

    While there are rows enough, each class that can give one gives at least one, so that no class is missing.
    """
    total = sum(sizes)
    most = [max(size - reserve, 0) for size in sizes]
    shares = [min(count * size // total, limit) for size, limit in zip(sizes, most, strict=True)]
    wanting = [number for number, (share, limit) in enumerate(zip(shares, most, strict=True)) if share == 0 < limit]
    if count >= sum(limit > 0 for limit in most):
        for number in wanting:
            shares[number] = 1
    # An integer remainder, so that the order is exact on every machine. Ties go to the larger, then the earlier class.
    by_remainder = sorted(range(len(sizes)), key=lambda n: (-((count * sizes[n]) % total), -sizes[n], n))
    while sum(shares) < min(count, sum(most)):
        for number in by_remainder:
            if shares[number] < most[number] and sum(shares) < count:
                shares[number] += 1
    while sum(shares) > count:  # the rare classes' single rows come from the largest classes
        shares[max(range(len(sizes)), key=lambda n: (shares[n], -n))] -= 1
    return shares


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Returns a hash of each value: splitmix64's finalizer (Steele, Lea, Flood 2014), which is a bijection."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

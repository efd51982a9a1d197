"""Which examples a step takes, and how ranks share them out: pure functions of the config and the data (laws 2 and 3).

Nothing here knows an engine or a launcher; a rank only ever picks from a list that is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dtrain.data.seeding import derive

WORD = 2**64
SCATTER = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: indices 0..size-1, sorted by a 64-bit hash of (seed, epoch, index).

    The hash is SplitMix64's finaliser (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195), so that the order
    depends on no library's random stream. No two indices share one, and each is computed back from it: sorting the
    hashes alone takes a third of the time of sorting indices by them.
    """
    first = np.uint64(derive(seed, "order", epoch))
    hashes = np.arange(size, dtype=np.uint64)
    hashes += first
    _mix(hashes)
    hashes.sort()
    _unmix(hashes)
    hashes -= first
    order = hashes.astype(np.int64)
    order.setflags(write=False)
    return order


def _mix(values: npt.NDArray[np.uint64]) -> None:
    """The hash, in place; arithmetic modulo 2^64."""
    values *= np.uint64(SCATTER)
    for shift, factor in MIX:
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(LAST_SHIFT)


def _unmix(values: npt.NDArray[np.uint64]) -> None:
    """Back from the hash, in place: each step of `_mix` undone, the last one first."""
    for shift, factor in ((LAST_SHIFT, None), *((shift, factor) for shift, factor in reversed(MIX))):
        if factor is not None:
            values *= np.uint64(pow(factor, -1, WORD))
        values ^= values >> np.uint64(shift) ^ values >> np.uint64(2 * shift)
    values *= np.uint64(pow(SCATTER, -1, WORD))


def chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    """Runs of `size`, the last one shorter: the fixed list of micro-batches."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


@dataclass(frozen=True)
class StepPlan:
    """What every step of the training takes. Steps count from 0 here and run on over epochs.

    num_examples: rows of the training split. global_batch_size, micro_batch_size: examples.
    """

    num_examples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """The last one of an epoch takes what is left."""
        return -(-self.num_examples // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """0-based epoch in which a step lies."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Example indices of one step, in order."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start, stop = k * self.global_batch_size, min((k + 1) * self.global_batch_size, self.num_examples)
        if not self.shuffle:
            return list(range(start, stop))
        part: list[int] = permutation(self.seed, epoch, self.num_examples)[start:stop].tolist()
        return part

    def micro_batches(self, step: int) -> list[list[int]]:
        """The step's fixed list of micro-batches, each a list of example indices."""
        return chunks(self.indices(step), self.micro_batch_size)


@dataclass(frozen=True)
class Turn:
    """One micro-batch that a rank runs. `counted` is False for a stand-in, whose loss is multiplied by 0."""

    micro_batch: int
    counted: bool


def turns(num_micro_batches: int, *, rank: int, world_size: int, lock_step: bool) -> list[Turn]:
    """The micro-batches of one rank: every world_size-th, so that long and short ones spread.

    A rank without one runs a stand-in of micro-batch 0, since gradients cross ranks in a collective that all must
    reach. Under `lock_step` every micro-batch is such a collective, and all ranks take equally many turns.
    """
    own = [Turn(index, counted=True) for index in range(rank, num_micro_batches, world_size)]
    wanted = -(-num_micro_batches // world_size) if lock_step else 1
    return own + [Turn(0, counted=False)] * (wanted - len(own))

"""Decides which examples a step takes and which rank runs them: pure functions of config and data (laws 2 and 3).

Independent of engines and launchers: every rank picks from a list that is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dtrain.data.seeding import derive_seed

MODULUS = 2**64
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """Returns the order of an epoch: indices 0..size-1, sorted by a 64-bit hash of (seed, epoch, index).

    The hash is SplitMix64's finalizer (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195), so the order does not
    depend on a library's random generator. All hashes differ, and the index can be computed back from its hash: sorting
    only the hashes takes a third of the time of sorting indices by hash.
    """
    first = np.uint64(derive_seed(seed, "order", epoch))
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
    """Applies the hash in place, modulo 2^64."""
    values *= np.uint64(GOLDEN_GAMMA)
    for shift, factor in MIX_STEPS:
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(LAST_SHIFT)


def _unmix(values: npt.NDArray[np.uint64]) -> None:
    """Inverts the hash in place: undoes each step of `_mix`, the last one first."""
    for shift, factor in ((LAST_SHIFT, None), *((shift, factor) for shift, factor in reversed(MIX_STEPS))):
        if factor is not None:
            values *= np.uint64(pow(factor, -1, MODULUS))
        values ^= values >> np.uint64(shift) ^ values >> np.uint64(2 * shift)
    values *= np.uint64(pow(GOLDEN_GAMMA, -1, MODULUS))


def chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    """Splits indices into lists of `size`; the last one may be shorter. This is the fixed list of micro-batches."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


@dataclass(frozen=True)
class StepPlan:
    """Selects the examples of each training step. Steps count from 0 and continue over epochs.

    Attributes:
        num_examples: rows of the training split.
        global_batch_size: examples per step, over all ranks.
        micro_batch_size: examples per forward pass.
        seed: seed of the random order.
        shuffle: whether the order is random; if not, it is that of the file.
    """

    num_examples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch. The last step takes the remaining examples."""
        return -(-self.num_examples // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """Returns the 0-based epoch of a step."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Returns the example indices of one step, in order."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start, stop = k * self.global_batch_size, min((k + 1) * self.global_batch_size, self.num_examples)
        if not self.shuffle:
            return list(range(start, stop))
        indices: list[int] = permutation(self.seed, epoch, self.num_examples)[start:stop].tolist()
        return indices

    def micro_batches(self, step: int) -> list[list[int]]:
        """Returns the step's fixed list of micro-batches, each a list of example indices."""
        return chunks(self.indices(step), self.micro_batch_size)


@dataclass(frozen=True)
class Assignment:
    """A micro-batch that a rank runs.

    Attributes:
        micro_batch: index in the step's list.
        counted: False for a dummy, whose loss is multiplied by 0.
    """

    micro_batch: int
    counted: bool


def assign_micro_batches(num_micro_batches: int, *, rank: int, world_size: int, lock_step: bool) -> list[Assignment]:
    """Returns the micro-batches of one rank: every world_size-th, to mix long and short ones.

    A rank without one runs micro-batch 0 as a dummy, because gradients are reduced in a collective that all ranks must
    reach. With `lock_step` every micro-batch is such a collective, so all ranks run the same number of micro-batches.
    """
    assigned = [Assignment(index, counted=True) for index in range(rank, num_micro_batches, world_size)]
    wanted = -(-num_micro_batches // world_size) if lock_step else 1
    return assigned + [Assignment(0, counted=False)] * (wanted - len(assigned))

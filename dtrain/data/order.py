"""Decides which examples a step takes and which rank runs them: pure functions of config and data (laws 2 and 3).

Independent of engines and launchers: every rank picks from a list that is the same everywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dtrain.data.lengths import RowLengths
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


def chunks_by_tokens(indices: Sequence[int], lengths: RowLengths, limit: int) -> list[list[int]]:
    """Splits indices, in their order, into lists that compute at most `limit` tokens each, padding included.

    A row that has more alone gets a list of its own: build.step_plan refuses such a limit.
    """
    lists: list[list[int]] = []
    rows, widest = 0, [0] * len(lengths.widths)
    for index in indices:
        rows += int(lengths.sequences[index])
        widest = [max(w, int(of[index])) for w, of in zip(widest, lengths.widths.values(), strict=True)]
        if not lists or rows * (sum(widest) + lengths.generated) > limit:
            lists.append([])
            rows = int(lengths.sequences[index])
            widest = [int(of[index]) for of in lengths.widths.values()]
        lists[-1].append(index)
    return lists


@dataclass(frozen=True)
class StepPlan:
    """Selects the examples of each training step. Steps count from 0 and continue over epochs.

    Attributes:
        num_examples: rows of the training split.
        global_batch_size: examples per step, over all ranks.
        micro_batch_size: examples per forward pass.
        seed: seed of the random order.
        shuffle: whether the order is random; if not, it is that of the file.
        lengths: tokens of each row; None: unknown, or not used.
        sort_by_length: whether a step's examples are sorted by length before they are cut into micro-batches.
        micro_batch_tokens: largest number of tokens that a micro-batch computes, padding included, instead of
            micro_batch_size; needs lengths.
    """

    num_examples: int
    global_batch_size: int
    micro_batch_size: int
    _: KW_ONLY
    seed: int
    shuffle: bool
    lengths: RowLengths | None = field(default=None, repr=False, compare=False)
    sort_by_length: bool = False
    micro_batch_tokens: int | None = None

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
        """Returns the step's fixed list of micro-batches, each a list of example indices, the shortest rows first.

        The shortest come first because a rank without work runs micro-batch 0 (see assign_micro_batches).
        """
        indices = self.indices(step)
        if self.lengths is not None and self.sort_by_length:
            indices = self.lengths.order(indices)
        if self.lengths is not None and self.micro_batch_tokens is not None:
            return chunks_by_tokens(indices, self.lengths, self.micro_batch_tokens)
        return chunks(indices, self.micro_batch_size)

    def costs(self, micro_batches: Sequence[Sequence[int]]) -> list[int] | None:
        """Returns the tokens that each micro-batch computes, padding included; None: all count the same."""
        return None if self.lengths is None else [self.lengths.cost(indices) for indices in micro_batches]

    @property
    def size_setting(self) -> str:
        """The setting that limits the size of a micro-batch."""
        return "train.micro_batch_size" if self.micro_batch_tokens is None else "train.micro_batch_tokens"


@dataclass(frozen=True)
class Assignment:
    """A micro-batch that a rank runs.

    Attributes:
        micro_batch: index in the step's list.
        counted: False for a dummy, whose loss is multiplied by 0.
    """

    micro_batch: int
    counted: bool


def assign_micro_batches(
    num_micro_batches: int,
    *,
    rank: int,
    world_size: int,
    lock_step: bool,
    costs: Sequence[int] | None = None,
    shares: Sequence[int] | None = None,
) -> list[Assignment]:
    """Returns the micro-batches of one rank, the most expensive first, so that all ranks finish at about the same time.

    The next most expensive one goes to the rank with the least to do (Graham 1969, doi:10.1137/0117039: at most 4/3 of
    the best time). Where all cost the same, that is every world_size-th.

    A rank without one runs micro-batch 0 as a dummy, because gradients are reduced in a collective that all ranks must
    reach. With `lock_step` every micro-batch is such a collective, so all ranks run the same number of micro-batches, and
    those that run at the same time have like costs.

    Args:
        costs: of each micro-batch, in any unit; None: equal.
        shares: as `contiguous_shares` returns them, if each rank takes neighbors, in their order; None: as above.
    """
    if shares is not None:
        taken = [Assignment(index, counted=True) for index, owner in enumerate(shares) if owner == rank]
        return taken or [Assignment(0, counted=False)]
    by_cost = list(range(num_micro_batches))
    if costs is not None:
        by_cost.sort(key=lambda index: (-costs[index], index))
    if costs is None or lock_step or world_size == 1:
        mine = by_cost[rank::world_size]
    else:
        mine = _share_by_cost(by_cost, costs, world_size)[rank]
    assigned = [Assignment(index, counted=True) for index in mine]
    wanted = -(-num_micro_batches // world_size) if lock_step else 1
    return assigned + [Assignment(0, counted=False)] * (wanted - len(assigned))


def contiguous_shares(num_micro_batches: int, *, world_size: int, costs: Sequence[int] | None = None) -> list[int]:
    """Returns the rank of each micro-batch, where each rank takes neighbors: the largest cost of a rank is the least possible.

    Args:
        costs: as in `assign_micro_batches`.
    """
    costs = [1] * num_micro_batches if costs is None else costs
    low, high = max(costs, default=0), sum(costs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fill(costs, middle)[-1] < world_size else (middle + 1, high)
    return _fill(costs, low)


def _fill(costs: Sequence[int], limit: int) -> list[int]:
    """Returns the rank of each micro-batch if every rank takes what comes next, up to a limit that no single one exceeds."""
    ranks, rank, load = [], 0, 0
    for cost in costs:
        rank, load = (rank, load + cost) if load + cost <= limit else (rank + 1, cost)
        ranks.append(rank)
    return ranks


def _share_by_cost(by_cost: Sequence[int], costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Returns each rank's part of a list that starts with the most expensive ones."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, 0, rank) for rank in range(world_size)]  # equal loads: first the rank with fewer, then the lower one
    for index in by_cost:
        load, number, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], number + 1, rank))
    return shares

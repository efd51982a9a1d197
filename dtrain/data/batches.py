"""Yields batches on the host, in order: this rank's micro-batches of each training step or of an evaluation.

Worker processes only prepare batches ahead of time. They draw no random numbers and do not affect the results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtrain.data.columns import fast_rows
from dtrain.data.lengths import RowLengths
from dtrain.data.order import (
    Assignment,
    StepPlan,
    assign_micro_batches,
    chunks,
    chunks_by_tokens,
    contiguous_shares,
)
from dtrain.data.seeding import DataPosition
from dtrain.data.worker_batches import PackedBatch, exit_without_thread, pack, unpack
from dtrain.distributed.process_limit import process_limit_error
from dtrain.distributed.signals import leave_to_parent
from dtrain.distributed.topology import Topology
from dtrain.errors import ERROR_TYPES, DtrainError

BatchTensors = dict[str, torch.Tensor]


class Rows(Protocol):
    """A split that returns examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> Mapping[str, Sequence[Any]]: ...


Collate = Callable[[Mapping[str, Sequence[Any]], DataPosition], BatchTensors]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of this rank.

    Attributes:
        index: position in the fixed list of micro-batches of the step (or evaluation).
        counted: False for a dummy micro-batch (see order.assign_micro_batches).
        example_index: indices of the examples in the split.
        tensors: on the host; the first dimension is the example.
    """

    index: int
    counted: bool
    example_index: tuple[int, ...]
    tensors: BatchTensors


@dataclass(frozen=True)
class StepBatches:
    """This rank's part of one step.

    Attributes:
        step: 0-based.
        examples: number of examples of the complete step, over all ranks.
        micro_batches: those of this rank, in order.
        size_setting: the setting that limits the size of a micro-batch.
        shares: the rank of each micro-batch of the complete step, by index, where shares are contiguous; else empty.
    """

    step: int
    examples: int
    micro_batches: tuple[MicroBatch, ...]
    size_setting: str = "train.micro_batch_size"
    shares: tuple[int, ...] = ()


def step_batches(
    plan: StepPlan,
    rows: Rows,
    collate: Collate,
    topology: Topology,
    *,
    lock_step: bool,
    start: int,
    stop: int,
    workers: int,
    contiguous: bool = False,
) -> Generator[StepBatches, None, None]:
    """Yields this rank's micro-batches of the steps from `start` to `stop`, excluding `stop`.

    Args:
        contiguous: whether each rank takes neighbors, in their order (see order.contiguous_shares).
    """
    planned: deque[tuple[int, int, int, list[int], Assignment, Sequence[int]]] = deque()

    def positions() -> Iterator[DataPosition]:
        """Plans each step once. Workers, which prepare batches ahead, read it ahead."""
        for step in range(start, stop):
            micro_batches = plan.micro_batches(step)
            number, size, costs = len(micro_batches), topology.world_size, plan.costs(micro_batches)
            shares = contiguous_shares(number, world_size=size, costs=costs) if contiguous else None
            assigned = assign_micro_batches(
                number, rank=topology.rank, world_size=size, lock_step=lock_step, costs=costs, shares=shares
            )
            examples = sum(map(len, micro_batches))
            for assignment in assigned:
                indices = micro_batches[assignment.micro_batch]
                planned.append((step, len(assigned), examples, indices, assignment, shares or ()))
                yield DataPosition(plan.epoch_of(step), indices)

    step_micro_batches: list[MicroBatch] = []
    for tensors in _collate_in_order(rows, collate, positions(), workers=workers):
        step, count, examples, indices, assignment, ranks = planned.popleft()
        if plan.lengths is not None:
            plan.lengths.check(tensors, indices)
        step_micro_batches.append(MicroBatch(assignment.micro_batch, assignment.counted, tuple(indices), tensors))
        if len(step_micro_batches) == count:
            yield StepBatches(step, examples, tuple(step_micro_batches), plan.size_setting, tuple(ranks))
            step_micro_batches = []


def evaluation_batches(
    rows: Rows,
    collate: Collate,
    topology: Topology,
    *,
    micro_batch_size: int,
    lock_step: bool,
    workers: int,
    lengths: RowLengths | None = None,
    micro_batch_tokens: int | None = None,
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches of a complete split. Dummies are included only with `lock_step`.

    Args:
        micro_batch_tokens: largest number of tokens of a micro-batch, padding included, instead of micro_batch_size; needs
            lengths. A row that has more gets a micro-batch of its own.
        lengths: tokens of each row: rows of like length share a micro-batch, the longest run first, and ranks get
            micro-batches by cost. None: file order.
    """
    indices = range(len(rows)) if lengths is None else lengths.order(range(len(rows)))
    if lengths is not None and micro_batch_tokens is not None:
        micro_batches = chunks_by_tokens(indices, lengths, micro_batch_tokens)
    else:
        micro_batches = chunks(indices, micro_batch_size)
    assigned = assign_micro_batches(
        len(micro_batches),
        rank=topology.rank,
        world_size=topology.world_size,
        lock_step=lock_step,
        costs=None if lengths is None else [lengths.cost(batch) for batch in micro_batches],
    )
    assigned = [assignment for assignment in assigned if assignment.counted or lock_step]
    positions = (DataPosition(0, micro_batches[assignment.micro_batch]) for assignment in assigned)
    prepared = _collate_in_order(rows, collate, positions, workers=workers)
    for assignment, tensors in zip(assigned, prepared, strict=True):
        batch = micro_batches[assignment.micro_batch]
        if lengths is not None:
            lengths.check(tensors, batch)
        yield MicroBatch(assignment.micro_batch, assignment.counted, tuple(batch), tensors)


class WorkerError(NamedTuple):
    """An error that a worker process returns to its rank.

    Attributes:
        kind: name of the error class in errors.ERROR_TYPES.
        message: the error message.
    """

    kind: str
    message: str


class _CollatedDataset(Dataset[PackedBatch | WorkerError]):
    """Maps positions to batches. Returns user errors as values, so that the user does not see the worker's traceback."""

    def __init__(self, rows: Rows, collate: Collate) -> None:
        self._rows, self._collate = rows, collate

    def __getitem__(self, position: DataPosition) -> PackedBatch | WorkerError:
        try:
            return pack(self._collate(self._rows[list(position.example_index)], position))
        except DtrainError as error:
            return WorkerError(type(error).__name__, str(error))


class _FixedOrderSampler(Sampler[DataPosition]):
    def __init__(self, positions: Iterable[DataPosition]) -> None:
        self._positions = positions

    def __iter__(self) -> Iterator[DataPosition]:
        return iter(self._positions)


def _collate_in_order(
    rows: Rows, collate: Collate, positions: Iterable[DataPosition], *, workers: int
) -> Iterator[BatchTensors]:
    rows = fast_rows(rows)
    if workers == 0:
        return (collate(rows[list(position.example_index)], position) for position in positions)
    # DataLoader draws a base seed. A separate generator keeps that from advancing torch's global random state.
    loader = DataLoader(
        _CollatedDataset(rows, collate),
        batch_size=None,
        sampler=_FixedOrderSampler(positions),
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=_start_worker,
    )
    try:
        batches_ahead: Any = iter(loader)
    except OSError as error:
        if (limit := process_limit_error(error)) is not None:
            raise limit from None
        raise DtrainError(
            f"data.workers={workers}: the worker processes cannot be started: {error}. They need a little room in /dev/shm "
            "(docker run --shm-size 1g), open files (ulimit -n) and processes (ulimit -u). data.workers=0 needs none of these"
        ) from None
    for worker in batches_ahead._workers:
        # torch, or Python at exit, ends workers with SIGTERM, which they ignore (see leave_to_parent). Use SIGKILL.
        worker._popen.terminate = worker._popen.kill
    return map(_unpack, batches_ahead)


def _start_worker(_worker: int) -> None:
    leave_to_parent()
    exit_without_thread()


def _unpack(result: PackedBatch | WorkerError) -> BatchTensors:
    if isinstance(result, WorkerError):
        raise ERROR_TYPES[result.kind](result.message)
    return unpack(result)

"""Batches on the host, in order: this rank's micro-batches of each step, and those of an evaluation.

Workers only prepare ahead; they draw nothing at random and change no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtrain.data.order import StepPlan, Turn, chunks, turns
from dtrain.data.seeding import Place
from dtrain.distributed.signals import leave_to_parent
from dtrain.distributed.topology import Topology
from dtrain.errors import ERROR_TYPES, DtrainError

Tensors = dict[str, torch.Tensor]


class Rows(Protocol):
    """Examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> Mapping[str, Sequence[Any]]: ...


Collate = Callable[[Mapping[str, Sequence[Any]], Place], Tensors]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of this rank.

    index: place in the step's (or evaluation's) fixed list. counted: False for a stand-in (see order.turns).
    example_index: indices in the split. tensors: first dimension is the example; on the host.
    """

    index: int
    counted: bool
    example_index: tuple[int, ...]
    tensors: Tensors


@dataclass(frozen=True)
class StepBatches:
    """This rank's part of one step. step: 0-based. examples: of the whole step, over all ranks."""

    step: int
    examples: int
    micro_batches: tuple[MicroBatch, ...]


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
) -> Iterator[StepBatches]:
    """This rank's micro-batches of the steps from `start` up to, not including, `stop`."""

    def wanted() -> Iterator[tuple[int, int, Turn, list[int]]]:
        for step in range(start, stop):
            micro_batches = plan.micro_batches(step)
            own = turns(len(micro_batches), rank=topology.rank, world_size=topology.world_size, lock_step=lock_step)
            for turn in own:
                yield step, len(own), turn, micro_batches[turn.micro_batch]

    gathered: list[MicroBatch] = []
    places = (Place(plan.epoch_of(step), indices) for step, _, _, indices in wanted())
    prepared = _collated(rows, collate, places, workers=workers)
    for (step, count, turn, indices), tensors in zip(wanted(), prepared, strict=True):
        gathered.append(MicroBatch(turn.micro_batch, turn.counted, tuple(indices), tensors))
        if len(gathered) == count:
            yield StepBatches(step, len(plan.indices(step)), tuple(gathered))
            gathered = []


def evaluation_batches(
    rows: Rows, collate: Collate, topology: Topology, *, micro_batch_size: int, lock_step: bool, workers: int
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a whole split, in file order. Stand-ins appear under `lock_step` only."""
    micro_batches = chunks(range(len(rows)), micro_batch_size)
    own = turns(len(micro_batches), rank=topology.rank, world_size=topology.world_size, lock_step=lock_step)
    own = [turn for turn in own if turn.counted or lock_step]
    prepared = _collated(rows, collate, (Place(0, micro_batches[turn.micro_batch]) for turn in own), workers=workers)
    for turn, tensors in zip(own, prepared, strict=True):
        yield MicroBatch(turn.micro_batch, turn.counted, tuple(micro_batches[turn.micro_batch]), tensors)


class Failed(NamedTuple):
    """An error on its way out of a worker process. kind: its name in errors.ERROR_TYPES."""

    kind: str
    message: str


class _Collated(Dataset[Tensors | Failed]):
    """Places to batches, in a worker or here. What a user can mend comes as a value, not through the worker's traceback."""

    def __init__(self, rows: Rows, collate: Collate) -> None:
        self._rows, self._collate = rows, collate

    def __getitem__(self, place: Place) -> Tensors | Failed:
        try:
            return self._collate(self._rows[list(place.example_index)], place)
        except DtrainError as error:
            return Failed(type(error).__name__, str(error))


class _InOrder(Sampler[Place]):
    def __init__(self, places: Iterable[Place]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)


def _collated(rows: Rows, collate: Collate, places: Iterable[Place], *, workers: int) -> Iterator[Tensors]:
    if workers == 0:
        batches = _Collated(rows, collate)
        return map(_unless_failed, (batches[place] for place in places))
    # A generator of its own: DataLoader draws a base seed, which would otherwise move torch's global stream.
    loader = DataLoader(
        _Collated(rows, collate),
        batch_size=None,
        sampler=_InOrder(places),
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_rank,
    )
    ahead: Any = iter(loader)
    for worker in ahead._workers:
        # Whoever ends it, torch when the loader goes or Python when this process does, is not heard with less.
        worker._popen.terminate = worker._popen.kill
    return map(_unless_failed, ahead)


def _leave_signals_to_rank(_worker: int) -> None:
    leave_to_parent()


def _unless_failed(made: Tensors | Failed) -> Tensors:
    if isinstance(made, Failed):
        raise ERROR_TYPES[made.kind](made.message)
    return made

"""Checks that all ranks still hold the same weights: a bit that flips on one rank would spoil a run silently."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from dtrain.distributed.collectives import all_gather, all_gather_object, all_reduce_max
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import TopologyError
from dtrain.training.monitors.protocol import Decision, Log, StepEnd, StepRecord

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type that shows the bits of an element, by the size of the element in bytes."""

_SPREAD = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: multiples of it differ in all bits (Knuth, TAOCP vol. 3, 6.4)."""


class Replicas:
    """Compares the weights every `train.check_replicas` steps, and after the last one. A collective at those steps.

    Two int64 values cross ranks if all weights are equal. The bits must be equal, not only the numbers: every rank of
    ddp and of ZeRO 0 to 2 makes the same update from the same sum.
    """

    def __init__(self, every: int, module: Callable[[], nn.Module], context: RankContext, tracker: Log) -> None:
        """
        Args:
            module: returns the bare model, complete on each rank; a thaw may have wrapped it in another engine.
        """
        self._every = every
        self._module = module
        self._context = context
        self._tracker = tracker

    def needs_at_once(self, end: StepEnd) -> bool:
        return end.step % self._every == 0 or end.is_last

    def after_step(self, record: StepRecord) -> Decision:
        if record.step % self._every == 0 or record.is_last:
            self._check(record.step)
        return Decision.CONTINUE

    def _check(self, step: int) -> None:
        names, hashes = hashes_of(self._module())
        if _all_have(hashes, self._context):
            return
        by_rank = [tuple(part.tolist()) for part in all_gather(hashes, self._context)]
        processes = all_gather_object([socket.gethostname(), os.getpid()], self._context)
        suspects, differing = _minority(by_rank), _first_difference(by_rank)
        self._tracker.event(
            "fault",
            kind="replicas",
            step=step,
            ranks=suspects or list(range(len(processes))),
            hosts=[processes[rank][0] for rank in suspects or range(len(processes))],
            parameter=names[differing],
            agreed=bool(suspects),
        )
        raise TopologyError(_message(step, suspects, processes, names[differing]))


def hashes_of(module: nn.Module) -> tuple[list[str], torch.Tensor]:
    """Returns the parameters' names, frozen ones too, and the sum of each one's element bits: (parameters,) int64, host.

    Any single flipped bit changes it. An update that only one rank made changes it except with probability 2^-32.
    """
    named = list(module.named_parameters())
    sums = [_bits(parameter.detach()).sum(dtype=torch.int64) for _, parameter in named]
    return [name for name, _ in named], torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _all_have(hashes: torch.Tensor, context: RankContext) -> bool:
    """Collective. Returns whether all ranks have the same hashes, by one number made of them all, with int64 wrap-around."""
    factors = torch.arange(1, len(hashes) + 1, dtype=torch.int64) * torch.tensor(_SPREAD - 2**64, dtype=torch.int64)
    mixed = (hashes * (factors | 1)).sum()
    # One all-reduce gives the largest number and, by its complement, the smallest.
    largest, smallest = all_reduce_max(torch.stack([mixed, ~mixed]), context)
    return bool(largest == ~smallest)


def _minority(by_rank: Sequence[tuple[int, ...]]) -> list[int]:
    """Returns the ranks that differ from the majority; empty if there is no majority."""
    majority = max(by_rank, key=by_rank.count)
    if 2 * by_rank.count(majority) <= len(by_rank):
        return []
    return [rank for rank, hashes in enumerate(by_rank) if hashes != majority]


def _first_difference(by_rank: Sequence[tuple[int, ...]]) -> int:
    return next(index for index, values in enumerate(zip(*by_rank, strict=True)) if len(set(values)) > 1)


def _message(step: int, suspects: Sequence[int], processes: Sequence[Sequence[object]], parameter: str) -> str:
    def name(rank: int) -> str:
        host, pid = processes[rank]
        return f"rank {rank} (process {pid} on {host})"

    if suspects:
        others = len(processes) - len(suspects)
        finding = f"the weights of {_joined(map(name, suspects))} are not those of the other {others} ranks"
    else:
        finding = f"the weights of {_joined(map(name, range(len(processes))))} differ, and there is no majority"
    return (
        f"After step {step} {finding}; the first parameter that differs is {parameter}. Failing memory, a failing device "
        "or nodes of different hardware cause this. Start again without that node: the run resumes from its newest "
        "checkpoint before the fault, or from the beginning."
    )


def _joined(names: Iterator[str]) -> str:
    *first, last = names
    shown = first[:8] + ([f"{len(first) - 8} more"] if len(first) > 8 else [])
    return f"{', '.join(shown)} and {last}" if shown else last

"""Whether all ranks still hold the same weights: a bit that flips on one of them spoils a run without a word."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from dtrain.distributed.collectives import all_gather, all_gather_object, all_reduce_max
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import TopologyError
from dtrain.training.monitors.protocol import Decision, Log, StepRecord

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size of an element: what shows its bits."""

_SPREAD = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: multiples of it differ in all bits (Knuth, TAOCP vol. 3, 6.4)."""


class Replicas:
    """Compares the weights every `train.check_replicas` steps, and after the last one. A collective at those steps.

    One int64 crosses ranks where all is well. The bits must be equal, not only the numbers: every rank of ddp and of
    ZeRO 0 to 2 makes the same update from the same sum.
    """

    def __init__(self, every: int, module: Callable[[], nn.Module], context: RankContext, tracker: Log) -> None:
        """
        Args:
            module: gives the bare model, whole on each rank; thawing may have put another engine around it.
        """
        self._every = every
        self._module = module
        self._context = context
        self._tracker = tracker

    def after_step(self, record: StepRecord) -> Decision:
        if record.step % self._every == 0 or record.is_last:
            self._check(record.step)
        return Decision.CONTINUE

    def _check(self, step: int) -> None:
        names, hashes = hashes_of(self._module())
        if _all_have(hashes, self._context):
            return
        everyones = [tuple(part.tolist()) for part in all_gather(hashes, self._context)]
        places = all_gather_object([socket.gethostname(), os.getpid()], self._context)
        odd, differing = _odd_ones(everyones), _first_difference(everyones)
        self._tracker.event(
            "fault",
            kind="replicas",
            step=step,
            ranks=odd or list(range(len(places))),
            hosts=[places[rank][0] for rank in odd or range(len(places))],
            parameter=names[differing],
            agreed=bool(odd),
        )
        raise TopologyError(_words(step, odd, places, names[differing]))


def hashes_of(module: nn.Module) -> tuple[list[str], torch.Tensor]:
    """Names of the parameters, frozen ones too, and for each the sum of its elements' bits: (parameters,) int64, host.

    Any one flipped bit changes it, and so does any update that one rank alone has made, short of a chance of 2^-32.
    """
    named = list(module.named_parameters())
    sums = [_bits(parameter.detach()).sum(dtype=torch.int64) for _, parameter in named]
    return [name for name, _ in named], torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _all_have(hashes: torch.Tensor, context: RankContext) -> bool:
    """Collective. Whether all ranks have the same; by one number made of all, which wraps around as int64 does."""
    places = torch.arange(1, len(hashes) + 1, dtype=torch.int64) * torch.tensor(_SPREAD - 2**64, dtype=torch.int64)
    mixed = (hashes * (places | 1)).sum()
    # The largest and, by its complement, the smallest of all ranks' numbers.
    largest, smallest = all_reduce_max(torch.stack([mixed, ~mixed]), context)
    return bool(largest == ~smallest)


def _odd_ones(everyones: Sequence[tuple[int, ...]]) -> list[int]:
    """Ranks that are not like the majority; none where there is no majority."""
    usual = max(everyones, key=everyones.count)
    if 2 * everyones.count(usual) <= len(everyones):
        return []
    return [rank for rank, own in enumerate(everyones) if own != usual]


def _first_difference(everyones: Sequence[tuple[int, ...]]) -> int:
    return next(index for index, values in enumerate(zip(*everyones, strict=True)) if len(set(values)) > 1)


def _words(step: int, odd: Sequence[int], places: Sequence[Sequence[object]], parameter: str) -> str:
    def name(rank: int) -> str:
        host, pid = places[rank]
        return f"rank {rank} (process {pid} on {host})"

    if odd:
        said = f"the weights of {_joined(map(name, odd))} are not those of the other {len(places) - len(odd)} ranks"
    else:
        said = f"the weights of {_joined(map(name, range(len(places))))} differ, and it cannot be told whose are right"
    return (
        f"After step {step} {said}; the first parameter that differs is {parameter}. Memory or a device that fails does "
        "this, and so do nodes of different hardware. Start again without that node: the run goes on from its newest "
        "checkpoint before the fault, or from the beginning."
    )


def _joined(names: Iterator[str]) -> str:
    *first, last = names
    shown = first[:8] + ([f"{len(first) - 8} more"] if len(first) > 8 else [])
    return f"{', '.join(shown)} and {last}" if shown else last

"""Which sequences of a packed row share a call of attention, padded to the longest of them.

A call for each length would compute nothing in vain, but on a CPU a call, forward and backward, costs as much as the scores of
many tokens (0.3 ms with dropout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dtrain.models.host_copy import array_to

CALL_COST = 1500
"""What a call costs, in scores of a head that it could compute instead. Measured with 4 to 12 heads on a CPU."""

MOST_LENGTHS = 48
"""Distinct lengths up to which the cheapest calls are searched; more are rounded up first."""


class Group(NamedTuple):
    """Neighboring sequences of one length in the packed row."""

    sequences: int
    length: int


@dataclass(frozen=True, eq=False)
class Call:
    """Neighboring sequences of the packed row that share a call.

    Attributes:
        sequences: their number.
        length: that of the longest.
        is_token: (sequences, 1, 1, length), False for padding; None if all have that length.
    """

    sequences: int
    length: int
    is_token: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Calls:
    """The calls of a packed row.

    Attributes:
        calls: in the order of the sequences.
        source: (positions of all calls,) int64, the place in the packed row of each position; padding shows the first token of its
            sequence. None if no call has padding.
        target: (tokens,) int64, the position of each token of the packed row; None if no call has padding.
    """

    calls: tuple[Call, ...]
    source: torch.Tensor | None
    target: torch.Tensor | None


def plan_calls(groups: Sequence[Group], device: torch.device, *, shares: bool = True) -> Calls:
    """Returns the calls that compute a packed row of these groups at the least cost.

    Args:
        shares: whether several groups may share a call.
    """
    calls, sources, targets = [], [], []
    first_token = first_position = 0
    for members in cheapest(groups) if shares else [[group] for group in groups]:
        lengths = np.concatenate([np.full(group.sequences, group.length) for group in members])
        longest, tokens = int(lengths.max()), int(lengths.sum())
        is_token = np.arange(longest) < lengths[:, None]
        starts = first_token + np.cumsum(lengths) - lengths
        sources.append(np.where(is_token, starts[:, None] + np.arange(longest), starts[:, None]).reshape(-1))
        targets.append(first_position + np.flatnonzero(is_token))
        mask = None if len(members) == 1 else array_to(is_token[:, None, None, :], device)
        calls.append(Call(len(lengths), longest, mask))
        first_token += tokens
        first_position += is_token.size
    if first_token == first_position:
        return Calls(tuple(calls), None, None)
    return Calls(tuple(calls), array_to(np.concatenate(sources), device), array_to(np.concatenate(targets), device))


def cheapest(groups: Sequence[Group]) -> list[list[Group]]:
    """Returns the groups, which are in ascending order of length, in those that share a call: the least cost by CALL_COST."""
    if len(groups) > MOST_LENGTHS:
        step = -(-groups[-1].length // MOST_LENGTHS)
        units: list[list[Group]] = []
        for group in groups:
            if not units or -(-units[-1][-1].length // step) != -(-group.length // step):
                units.append([])
            units[-1].append(group)
    else:
        units = [[group] for group in groups]
    counts = [sum(group.sequences for group in unit) for unit in units]
    squares = [unit[-1].length ** 2 for unit in units]
    costs, starts = [0], [0]  # of the first n units: the least cost, and where its last call starts
    for stop in range(1, len(units) + 1):
        sequences, best, chosen = 0, None, 0
        for start in range(stop - 1, -1, -1):
            sequences += counts[start]
            cost = costs[start] + CALL_COST + sequences * squares[stop - 1]
            if best is None or cost < best:
                best, chosen = cost, start
        costs.append(best or 0)
        starts.append(chosen)
    parts: list[list[Group]] = []
    stop = len(units)
    while stop:
        parts.append([group for unit in units[starts[stop] : stop] for group in unit])
        stop = starts[stop]
    return parts[::-1]

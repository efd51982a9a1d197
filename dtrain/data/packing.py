"""Arranges tokens in rows for a causal language model: blocks, sliding windows, several documents per row.

A segment is a run of tokens. All but the last are inputs, and all but the first may be targets. A row of the table holds
consecutive segments: `input_ids` has their tokens, `lengths` the number of tokens of each segment, and `scored` how many
of its last targets count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """A run of tokens.

    Attributes:
        ids: token ids.
        scored: how many of the last targets count. The targets before them are only context.
    """

    ids: Sequence[int]
    scored: int


def split_into_segments(ids: Sequence[int], *, max_length: int, stride: int) -> Iterator[Segment]:
    """Yields windows of at most max_length inputs, one every `stride` tokens. Each token but the first is scored once.

    The first window scores all its targets. A later one scores only the targets that the previous one did not reach, so
    each target has at least max_length - stride + 1 tokens of context, or all preceding ones. With stride = max_length,
    the windows are blocks that overlap by one token. Fewer than two tokens have no target and give no segment.

    Args:
        stride: tokens, 1 to max_length.
    """
    reached = 1
    for start in range(0, len(ids), stride):
        if reached >= len(ids):
            return
        stop = min(start + max_length + 1, len(ids))
        yield Segment(ids[start:stop], stop - reached)
        reached = stop


def pack_segments(segments: Iterable[Segment], *, row_length: int | None) -> dict[str, list[Any]]:
    """Returns the columns of the table, with the segments in order.

    A segment is never split, so that the context of its tokens does not depend on its neighbors.

    Args:
        row_length: each row takes as many segments as fit in this number of inputs; None: one segment.
    """
    rows: list[list[Segment]] = []
    left = 0
    for segment in segments:
        inputs = len(segment.ids) - 1
        if row_length is None or inputs > left:
            rows.append([])
            left = row_length or 0
        rows[-1].append(segment)
        left -= inputs
    return {
        "input_ids": [[token for segment in row for token in segment.ids] for row in rows],
        "lengths": [[len(segment.ids) for segment in row] for row in rows],
        "scored": [[segment.scored for segment in row] for row in rows],
    }

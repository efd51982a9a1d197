"""How tokens are laid out for a causal language model: blocks, sliding windows, several documents to a row.

A piece is a run of tokens, of which each but the last is an input and each but the first may be a target. In a row of
the table pieces stand one behind another: `input_ids` holds their tokens, `lengths` the number of tokens of each,
`scored` how many of its last targets count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """ids: the tokens. scored: how many of the last targets count; those before them are context only."""

    ids: Sequence[int]
    scored: int


def pieces_of(ids: Sequence[int], *, max_length: int, stride: int) -> Iterator[Piece]:
    """Windows of at most max_length inputs that begin every `stride` tokens; each token but the first is scored once.

    The first window scores all its targets, a further one only those that the one before did not reach. So each has at
    least max_length - stride + 1 tokens of context, or all there are. With stride = max_length these are blocks that
    overlap by one token. Fewer than two tokens hold no target, and give no piece.

    Args:
        stride: tokens, 1 to max_length.
    """
    reached = 1
    for start in range(0, len(ids), stride):
        if reached >= len(ids):
            return
        stop = min(start + max_length + 1, len(ids))
        yield Piece(ids[start:stop], stop - reached)
        reached = stop


def rows_of(pieces: Iterable[Piece], *, room: int | None) -> dict[str, list[Any]]:
    """The table's columns, pieces in order.

    A piece is never cut, so that what its tokens see does not depend on what stands beside it.

    Args:
        room: a row takes as many pieces as have together no more than so many inputs; None: one.
    """
    rows: list[list[Piece]] = []
    left = 0
    for piece in pieces:
        inputs = len(piece.ids) - 1
        if room is None or inputs > left:
            rows.append([])
            left = room or 0
        rows[-1].append(piece)
        left -= inputs
    return {
        "input_ids": [[token for piece in row for token in piece.ids] for row in rows],
        "lengths": [[len(piece.ids) for piece in row] for row in rows],
        "scored": [[piece.scored for piece in row] for row in rows],
    }

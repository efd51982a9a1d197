"""Which positions of a padded batch are tokens, and how they lie in one row without padding.

The sequences are sorted by length, so that those of equal length are neighbors: attention computes each such group as one
batch without a mask (unpadding_attention.py). Packing and unpacking are plain tensor functions; nothing is remembered
between two forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

NAME = "dtrain_unpadded"
"""Name of the attention over a packed row in transformers. It is not written to config.json."""


class Group(NamedTuple):
    """Neighboring sequences of one length in the packed row."""

    sequences: int
    length: int


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The place of each token of a batch in the packed row.

    Attributes:
        rows: rows of the padded batch.
        width: positions in each row of the padded batch.
        index: (tokens,) int64, the position in the flattened batch of each token of the packed row.
        groups: the groups of the packed row, in order.
        is_causal: whether a token sees only the tokens before it, and itself.
    """

    rows: int
    width: int
    index: torch.Tensor
    groups: tuple[Group, ...]
    is_causal: bool

    @property
    def tokens(self) -> int:
        """The length of the packed row."""
        return self.index.shape[0]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Returns (rows, width, ...) as (1, tokens, ...). A first dimension of 1 is repeated for each row."""
        if padded.shape[0] == 1:
            padded = padded.expand(self.rows, *padded.shape[1:])
        self._check(tuple(padded.shape[:2]) == (self.rows, self.width), padded)
        return padded.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Returns (1, tokens, ...) as (rows, width, ...), with zeros for padding."""
        self._check(tuple(packed.shape[:2]) == (1, self.tokens), packed)
        flat = packed.new_zeros(self.rows * self.width, *packed.shape[2:])
        return flat.index_copy(0, self.index, packed[0]).view(self.rows, self.width, *packed.shape[2:])

    def columns(self) -> torch.Tensor:
        """Returns (1, tokens) int64, the place of each token in its row of the padded batch."""
        return (self.index % self.width)[None]

    def _check(self, fits: bool, tensor: torch.Tensor) -> None:
        # A layout of another batch would mix examples without any other sign.
        assert fits, f"a layout of {self.rows} x {self.width} with {self.tokens} tokens got {tuple(tensor.shape)}"


def layout_of_mask(mask: torch.Tensor, *, is_causal: bool) -> PackedLayout | None:
    """Returns the layout of a batch with padding; None if nothing can be saved, or nothing is left to compute.

    Args:
        mask: (rows, width), 0 for padding. It is copied to the host once.
        is_causal: see PackedLayout. The tokens of a row must then be neighbors. If it is False, the first position of a
            row must be a token, because heads read its state. None is returned if it is otherwise.
    """
    is_token = mask.detach().cpu().numpy() != 0
    lengths = is_token.sum(axis=1)
    rows, width = is_token.shape
    if lengths.min(initial=width) == width or lengths.max() == 0:
        return None
    if not is_causal and not (is_token[:, 0] | (lengths == 0)).all():
        return None
    if is_causal and not ((is_token[:, 1:] & ~is_token[:, :-1]).sum(axis=1) + is_token[:, 0] <= 1).all():
        return None
    row, column = is_token[(order := np.argsort(lengths, kind="stable"))].nonzero()
    return _layout(rows, width, order[row] * width + column, lengths[order], mask.device, is_causal=is_causal)


def layout_of_documents(mask: torch.Tensor, positions: torch.Tensor) -> PackedLayout | None:
    """Returns the layout of rows that hold several documents; None if the mask separates something else.

    Args:
        mask: (rows, 1, width, width), boolean, or 0 for visible tokens and a negative number elsewhere.
        positions: (rows, width), from 0 in each document. Each document becomes a sequence of its own.
    """
    if mask.dim() != 4 or positions.dim() != 2 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    places = positions.detach().cpu()
    rows, width = places.shape
    if mask.shape[0] != rows or mask.shape[2] != width:
        return None
    is_first = torch.ones_like(places, dtype=torch.bool)
    is_first[:, 1:] = places[:, 1:] != places[:, :-1] + 1
    document = is_first.long().cumsum(dim=1)
    expected = (document[:, :, None] == document[:, None, :]).tril()
    seen = mask.detach()[:, 0]
    if not torch.equal((seen if seen.dtype == torch.bool else seen == 0).cpu(), expected):
        return None
    starts = np.flatnonzero(is_first.flatten().numpy())
    lengths = np.diff(starts, append=rows * width)
    order = np.argsort(lengths, kind="stable")
    index = np.concatenate([np.arange(starts[number], starts[number] + lengths[number]) for number in order])
    return _layout(rows, width, index, lengths[order], mask.device, is_causal=True)


def _layout(
    rows: int, width: int, index: np.ndarray, lengths: np.ndarray, device: torch.device, *, is_causal: bool
) -> PackedLayout:
    """Returns the layout of sequences in ascending order of length. Empty ones have no token."""
    values, counts = np.unique(lengths, return_counts=True)
    groups = tuple(Group(int(count), int(length)) for length, count in zip(values, counts, strict=True) if length)
    return PackedLayout(rows, width, torch.from_numpy(index).to(device, non_blocking=True), groups, is_causal)

"""Which positions of a padded batch are tokens, and how they lie in one row without padding.

The sequences are sorted by length, so that those of equal length are neighbors: attention computes each such group as one
batch without a mask (unpadding_attention.py). Packing and unpacking are plain tensor functions; nothing is remembered
between two forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch

from dtrain.models.host_copy import array_to, host_copy, on_host
from dtrain.models.unpadding_calls import Calls, Group, plan_calls

NAME = "dtrain_unpadded"
"""Name of the attention over a packed row in transformers. It is not written to config.json."""


class Kernel(NamedTuple):
    """A way to compute all sequences of a packed row in one call (unpadding_kernels.py).

    Attributes:
        dtype: of the states.
    """

    name: Literal["varlen", "flash", "nested"]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The place of each token of a batch in the packed row.

    Attributes:
        rows: rows of the padded batch.
        width: positions in each row of the padded batch.
        index: (tokens,) int64, the position in the flattened batch of each token of the packed row.
        groups: the groups of the packed row, in order.
        is_causal: whether a token sees only the tokens before it, and itself.
        kernels: those that may compute its attention.
        starts: (sequences + 1,) int32, the place in the packed row where each sequence begins, and the end; None if no
            kernel may be used.
        shares_calls: whether sequences of like length share a call of attention by groups; if not, those of equal length.
    """

    rows: int
    width: int
    index: torch.Tensor
    groups: tuple[Group, ...]
    is_causal: bool
    kernels: frozenset[Kernel] = frozenset()
    starts: torch.Tensor | None = None
    shares_calls: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether the batch has no padding, so that packing is a matter of shapes."""
        return self.groups == (Group(self.rows, self.width),)

    @property
    def tokens(self) -> int:
        """The length of the packed row."""
        return self.index.shape[0]

    @cached_property
    def calls(self) -> Calls:
        """The calls of attention by groups."""
        return plan_calls(self.groups, self.index.device, shares=self.shares_calls)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Returns (rows, width, ...) as (1, tokens, ...). A first dimension of 1 is repeated for each row."""
        if padded.shape[0] == 1:
            padded = padded.expand(self.rows, *padded.shape[1:])
        self._check(tuple(padded.shape[:2]) == (self.rows, self.width), padded)
        flat = padded.flatten(0, 1)
        return (flat if self.is_whole else flat.index_select(0, self.index))[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Returns (1, tokens, ...) as (rows, width, ...), with zeros for padding."""
        self._check(tuple(packed.shape[:2]) == (1, self.tokens), packed)
        if self.is_whole:
            return packed[0].reshape(self.rows, self.width, *packed.shape[2:])
        flat = packed.new_zeros(self.rows * self.width, *packed.shape[2:])
        return flat.index_copy(0, self.index, packed[0]).view(self.rows, self.width, *packed.shape[2:])

    def columns(self) -> torch.Tensor:
        """Returns (1, tokens) int64, the place of each token in its row of the padded batch."""
        return (self.index % self.width)[None]

    def _check(self, fits: bool, tensor: torch.Tensor) -> None:
        # A layout of another batch would mix examples without any other sign.
        assert fits, f"a layout of {self.rows} x {self.width} with {self.tokens} tokens got {tuple(tensor.shape)}"


def layout_of_mask(
    mask: torch.Tensor,
    *,
    is_causal: bool,
    needs_neighbors: bool = False,
    kernels: frozenset[Kernel] = frozenset(),
) -> PackedLayout | None:
    """Returns the layout of a batch with padding; None if nothing can be saved, or nothing is left to compute.

    A batch without padding has a layout if it is on a device and the host knows its mask: transformers would fetch the
    mask to find that out.

    Args:
        mask: (rows, width), 0 for padding. It is fetched from the device if the host does not know it (host_copy.py).
        is_causal: see PackedLayout. The tokens of a row must then be neighbors. If it is False, the first position of a
            row must be a token, because heads read its state. None is returned if it is otherwise.
        needs_neighbors: whether the tokens of a row must be neighbors anyway.
        kernels: those that work on the device.
    """
    is_remembered = mask.device.type != "cpu" and host_copy(mask) is not None
    is_token = on_host(mask).numpy() != 0
    if is_token.all() and not is_remembered:  # the usual case of texts of one length
        return None
    lengths = is_token.sum(axis=1)
    rows, width = is_token.shape
    if lengths.max(initial=0) == 0:
        return None
    if not is_causal and not (is_token[:, 0] | (lengths == 0)).all():
        return None
    if (is_causal or needs_neighbors) and not (_runs(is_token) <= 1).all():
        return None
    row, column = is_token[(order := np.argsort(lengths, kind="stable"))].nonzero()
    index = order[row] * width + column
    return make_layout(rows, width, index, lengths[order], mask.device, is_causal=is_causal, kernels=kernels)


def _runs(is_token: np.ndarray) -> np.ndarray:
    """Returns (rows,), in how many pieces the tokens of a row lie."""
    runs: np.ndarray = (is_token[:, 1:] & ~is_token[:, :-1]).sum(axis=1) + is_token[:, 0]
    return runs


def layout_of_whole_rows(rows: int, width: int, device: torch.device) -> PackedLayout:
    """Returns the layout of a decoder's batch without padding."""
    return make_layout(rows, width, np.arange(rows * width), np.full(rows, width), device, is_causal=True)


def layout_of_documents(
    mask: torch.Tensor, positions: torch.Tensor, *, kernels: frozenset[Kernel] = frozenset()
) -> PackedLayout | None:
    """Returns the layout of rows that hold several documents; None if the mask separates something else.

    Args:
        mask: (rows, 1, width, width), boolean, or 0 for visible tokens and a negative number elsewhere. If it is on a
            device, the host may know (rows, width) instead, the number of each token's document: then the mask separates
            those, and is not looked at.
        positions: (rows, width), from 0 in each document. Each document becomes a sequence of its own.
        kernels: those that work on the device.
    """
    if mask.dim() != 4 or positions.dim() != 2 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    rows, width = positions.shape
    if mask.shape[0] != rows or mask.shape[2] != width:
        return None
    known = host_copy(mask)
    is_first = np.ones((rows, width), dtype=bool)
    if known is not None and known.dim() == 2:
        numbers = known.numpy()
        is_first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    else:
        places = on_host(positions)
        is_first[:, 1:] = (places[:, 1:] != places[:, :-1] + 1).numpy()
        document = torch.from_numpy(is_first).long().cumsum(dim=1)
        expected = (document[:, :, None] == document[:, None, :]).tril()
        seen = mask.detach()[:, 0]
        if not torch.equal((seen if seen.dtype == torch.bool else seen == 0).cpu(), expected):
            return None
    starts = np.flatnonzero(is_first)
    lengths = np.diff(starts, append=rows * width)
    order = np.argsort(lengths, kind="stable")
    index = np.concatenate([np.arange(starts[number], starts[number] + lengths[number]) for number in order])
    return make_layout(rows, width, index, lengths[order], mask.device, is_causal=True, kernels=kernels)


def make_layout(
    rows: int,
    width: int,
    index: np.ndarray,
    lengths: np.ndarray,
    device: torch.device,
    *,
    is_causal: bool,
    kernels: frozenset[Kernel] = frozenset(),
) -> PackedLayout:
    """Returns the layout of sequences in ascending order of length. Empty ones have no token."""
    values, counts = np.unique(lengths, return_counts=True)
    groups = tuple(Group(int(count), int(length)) for length, count in zip(values, counts, strict=True) if length)
    starts = None
    if kernels:
        ends = np.cumsum(lengths[lengths > 0])
        starts = array_to(np.concatenate([[0], ends]).astype(np.int32), device)
    return PackedLayout(rows, width, array_to(index, device), groups, is_causal, kernels, starts)

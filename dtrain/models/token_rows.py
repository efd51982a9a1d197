"""Rows of tokens as a model's call gets them: their real tokens, without padding, and a key for each row.

A model in eval mode gives each row a result that depends on the row's tokens alone, so the key finds the result again in any
batch, epoch, split and run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtrain.models.host_copy import on_host

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The tensors that a call may have. With any other one, the result may depend on more than the tokens."""

KEY_BYTES = 16

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenRows:
    """The rows of one call.

    Attributes:
        ids: (rows, length) token ids; padding is on the right.
        types: (rows, length) token types, if the call has them.
        counts: (rows,) real tokens of each row.
    """

    ids: IndexArray
    types: IndexArray | None
    counts: IndexArray

    @property
    def length(self) -> int:
        """The padded length."""
        return int(self.ids.shape[1])

    def keys(self) -> list[bytes]:
        """Returns a hash of each row's real tokens and their types."""
        return [_key(row) for row in self.rows()]

    def rows(self) -> Iterator[tuple[IndexArray, IndexArray | None]]:
        """Yields the real tokens and types of each row."""
        for row, count in enumerate(self.counts.tolist()):
            yield self.ids[row, :count], None if self.types is None else self.types[row, :count]

    def places(self) -> IndexArray:
        """Returns the index of each real token, row by row, in the flattened (rows * length) call."""
        starts = np.arange(len(self.counts), dtype=np.int64) * self.length
        return ranges(starts, self.counts)


def ranges(starts: IndexArray, counts: IndexArray) -> IndexArray:
    """Returns start, start + 1, ... of each pair, `count` numbers, one after the other."""
    ends = np.cumsum(counts)
    positions: IndexArray = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
    positions += np.repeat(starts - (ends - counts), counts)
    return positions


def _key(row: tuple[IndexArray, IndexArray | None]) -> bytes:
    ids, types = row
    digest = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(ids).tobytes())
    if types is not None:
        digest.update(np.ascontiguousarray(types).tobytes())
    return digest.digest()


def token_rows(inputs: Mapping[str, Any]) -> TokenRows | None:
    """Returns the rows of a call; None if its result may depend on more than each row's tokens, or padding is on the left.

    Args:
        inputs: the arguments of the call by name.
    """
    ids, mask, types = (inputs.get(name) for name in INPUTS)
    if not torch.is_tensor(ids) or ids.dim() != 2 or any(_is_more(name, value) for name, value in inputs.items()):
        return None
    host = on_host(ids).numpy()
    if mask is None:
        counts = np.full(len(host), host.shape[1], dtype=np.int64)
    else:
        if not torch.is_tensor(mask) or mask.shape != ids.shape:
            return None
        real = on_host(mask).numpy() != 0
        counts = real.sum(axis=1, dtype=np.int64)
        if not (real == (np.arange(host.shape[1]) < counts[:, None])).all():
            return None
    if types is not None and (not torch.is_tensor(types) or types.shape != ids.shape):
        return None
    return TokenRows(host, None if types is None else on_host(types).numpy(), counts)


def _is_more(name: str, value: Any) -> bool:
    """Returns whether an argument changes the result, or asks for more of it."""
    if name == "return_dict":
        return value is False
    if name in INPUTS or value is None or value is False:
        return False
    return torch.is_tensor(value) or name == "past_key_values" or name.startswith("output_") or name == "use_cache"

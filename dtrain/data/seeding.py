"""Seeds for random draws that depend on the position in the data, not on the rank (law 5).

A seed is a hash of its position, so neighboring steps have independent random streams and no state has to be saved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class DataPosition(NamedTuple):
    """The position of a batch in the data, for random draws that depend on it (law 5).

    Attributes:
        epoch: 0-based.
        example_index: each row's index in its split.
    """

    epoch: int
    example_index: Sequence[int]


def derive_seed(*parts: int | str) -> int:
    """Returns a 64-bit seed, e.g. `derive_seed(seed, "dropout", step, micro_batch)`. It is the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_all(*parts: int | str) -> None:
    """Seeds torch (the host and this rank's CUDA device), numpy and `random` with `derive_seed(*parts)`."""
    seed = derive_seed(*parts)
    # torch.manual_seed would format the complete call stack each time if there is no CUDA, here once per micro-batch.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    random.seed(seed)

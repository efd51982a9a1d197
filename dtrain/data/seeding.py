"""Random draws that belong to a place in the data, not to a rank (law 5).

A seed is a hash of what it stands for, so that neighbouring steps do not share a stream and nothing has to be saved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Place(NamedTuple):
    """Where rows stand, for draws that belong to the data (law 5): the epoch, from 0 on, and each one's index in its split."""

    epoch: int
    example_index: Sequence[int]


def derive(*parts: int | str) -> int:
    """A 64-bit seed for that place, e.g. `derive(seed, "dropout", step, micro_batch)`; equal on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_all(*parts: int | str) -> None:
    """Seeds torch (the host and this rank's CUDA device), numpy and `random` for that place."""
    seed = derive(*parts)
    # Not torch.manual_seed: without CUDA it formats the whole call stack each time, here once per micro-batch.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    random.seed(seed)

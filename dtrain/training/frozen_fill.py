"""Computes rows of the frozen part of a model for its store, and compares what is stored with what the model computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dtrain.console import log
from dtrain.data.frozen_store import FrozenStore
from dtrain.models.frozen_border import are_close, tensors_of
from dtrain.models.frozen_prefix import Border
from dtrain.training.frozen_rows import DistinctRows

GROUP_TOKENS = 2048
"""Tokens that are computed together. More need more memory; fewer leave the processor idle."""

PART_BYTES = 1 << 26
"""Size at which finished rows are published, so that a run that is stopped while it computes them keeps them."""


def compute_rows(border: Border, rows: DistinctRows, group: Sequence[int], module: nn.Module) -> torch.Tensor:
    """Returns the vectors of a group of rows of equal length, one after the other: (vectors, width)."""
    ids, types = rows.batch(group)
    vectors = border.compute(tensors_of(ids, types, module))
    return vectors.reshape(-1, vectors.shape[-1])


def compute_missing(
    store: FrozenStore,
    border: Border,
    rows: DistinctRows,
    groups: Sequence[Sequence[int]],
    counts: Sequence[int],
    module: nn.Module,
    *,
    progress: Callable[[], None],
) -> None:
    """Computes groups of rows and publishes those that the store does not have.

    A group is computed as a whole, so that a row gets the bits that it had before it was lost. A row that is stored is not
    published again: a run that is resumed reads the bits that it read before, whatever other runs add.

    Args:
        counts: vectors of each row.
        progress: called after each group.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    done: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    finished: list[int] = []
    begin, size = time.monotonic(), 0
    for number, group in enumerate(groups):
        vectors = compute_rows(border, rows, group, module).cpu().contiguous().view(torch.uint8).numpy()
        for row, own in zip(group, np.split(vectors, len(group)), strict=True):
            if rows.keys[row] not in store:
                finished.append(row)
                done.append(own)
                size += own.nbytes
        progress()
        if size >= PART_BYTES or number == len(groups) - 1:
            keys = [rows.keys[row] for row in finished]
            store.write(keys, [counts[row] for row in finished], np.concatenate(done))
            done, finished, size = [], [], 0
    if groups:
        log.info("freeze.cache: done in %.1f s", time.monotonic() - begin)


def is_same(
    store: FrozenStore, border: Border, rows: DistinctRows, groups: Sequence[Sequence[int]], module: nn.Module
) -> bool:
    """Returns whether what is stored is what this model computes, by the first and the last group that is stored."""
    stored = [group for group in groups if all(rows.keys[row] in store for row in group)]
    for group in [*stored[:1], *stored[-1:]]:
        expected = compute_rows(border, rows, group, module)
        counts = [len(rows.ids[row]) if border.is_per_token else 1 for row in group]
        found = store.read([rows.keys[row] for row in group], counts)
        if found is None:
            return False
        vectors = torch.from_numpy(found).view(expected.dtype)
        if vectors.shape != expected.shape or not are_close(vectors.to(expected.device), expected):
            return False
    return True

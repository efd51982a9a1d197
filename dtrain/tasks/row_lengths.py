"""How many tokens each row of a task's split has, by which rows are sorted and micro-batches are formed."""

from __future__ import annotations

from dtrain.data.lengths import RowLengths, token_lengths
from dtrain.tasks.protocol import Task


def row_lengths(task: Task, split: str) -> RowLengths | None:
    """Returns the lengths of a split's rows; None where they are not known (images, rows that are no Arrow table).

    A task says it by `row_lengths` (protocol.HasRowLengths). Otherwise `input_ids` counts; batches have that width if the
    task pads as told (protocol.PadsRows). Call it after trial.try_model, which decides the padding.
    """
    own = getattr(task, "row_lengths", None)  # no isinstance: the task may be wrapped (router_loss.py)
    if own is not None:
        lengths: RowLengths | None = own(split)
        return lengths
    padding = getattr(task, "padding", None)
    length = None if padding is None else padding.length
    return token_lengths(task.splits[split], length=length, is_promised=padding is not None)

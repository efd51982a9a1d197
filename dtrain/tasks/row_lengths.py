"""How many tokens each row of a task's split has, by which rows are sorted and micro-batches are formed."""

from __future__ import annotations

from dtrain.data.lengths import RowLengths, token_lengths
from dtrain.errors import ConfigError
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


def unknown_lengths(limit: int, section: str) -> ConfigError:
    """Returns the error for a number of tokens as the limit of a micro-batch, where rows have no known number of tokens.

    Args:
        section: section of the setting: train or evaluation.
    """
    return ConfigError(
        f"{section}.micro_batch_tokens={limit} needs the number of tokens of each row, which this task's rows do not have "
        f"(images, or rows of your own that are no table with input_ids). Set {section}.micro_batch_tokens=null, and "
        f"{section}.micro_batch_size, or give your task row_lengths (docs/new-task.md)."
    )

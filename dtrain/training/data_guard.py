"""Checks that a resumed run has the data it began with, because its position in the data is a number."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.schema import Config
from dtrain.errors import DataError
from dtrain.tasks.protocol import Task


def fingerprints(task: Task) -> Mapping[str, str]:
    """Returns the SHA-256 of each split's prepared rows; empty for the user's own task."""
    hashes: Mapping[str, str] = getattr(task.splits, "fingerprints", {})
    return hashes


def check(task: Task, checkpoint: SelectedCheckpoint, config: Config) -> None:
    """Compares the data with the checkpoint's.

    Raises:
        DataError: they differ, and `checkpoint.allow_changes` does not allow it.
    """
    if "data" in config.checkpoint.allow_changes:
        return
    saved_rows, rows = checkpoint.state["rows"]["train"], len(task.splits["train"])
    saved_hashes, hashes = checkpoint.state["data"], fingerprints(task)
    changed = [split for split in hashes if split in saved_hashes and hashes[split] != saved_hashes[split]]
    if saved_rows != rows:
        problem = f"The training data has {rows} examples, but the checkpoint of step {checkpoint.step} was made with {saved_rows}."
    elif changed:
        problem = (
            f"The data have changed since the checkpoint of step {checkpoint.step}: split {', '.join(changed)} has other "
            "examples, another order, or was made with another tokenizer."
        )
    else:
        return
    raise DataError(
        f"{problem} Restore the data, choose another run.name, or resume anyway with checkpoint.allow_changes='[data]'."
    )

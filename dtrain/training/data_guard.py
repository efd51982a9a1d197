"""Whether a run that goes on has the data that it began with: its place in them is a number."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.schema import Config
from dtrain.errors import DataError
from dtrain.tasks.protocol import Task


def fingerprints(task: Task) -> Mapping[str, str]:
    """SHA-256 over the rows of each split as they were prepared; none for a task of the user's own."""
    found: Mapping[str, str] = getattr(task.splits, "fingerprints", {})
    return found


def check(task: Task, checkpoint: SelectedCheckpoint, config: Config) -> None:
    """Compares the data with those of the checkpoint.

    Raises:
        DataError: they are others, and `checkpoint.allow_changes` does not name them.
    """
    if "data" in config.checkpoint.allow_changes:
        return
    was, now = checkpoint.state["rows"]["train"], len(task.splits["train"])
    before, here = checkpoint.state["data"], fingerprints(task)
    other = [split for split in here if split in before and here[split] != before[split]]
    if was != now:
        what = (
            f"The training data has {now} examples, but the checkpoint of step {checkpoint.step} was made with {was}."
        )
    elif other:
        what = (
            f"The data have changed since the checkpoint of step {checkpoint.step}: split {', '.join(other)} has other "
            "examples, another order, or was made with another tokenizer."
        )
    else:
        return
    raise DataError(
        f"{what} Bring the data back, choose another run.name, or go on all the same by checkpoint.allow_changes='[data]'."
    )

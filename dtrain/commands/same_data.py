"""Whether a run that goes on has the data that it began with: its place in them is a number."""

from __future__ import annotations

import hashlib
import json

from dtrain.checkpoint.choosing import Chosen
from dtrain.errors import DataError
from dtrain.schema import Config
from dtrain.tasks.protocol import Split, Task

SEEN = 256
"""Rows that are looked at; their number does not grow with the data."""


def glance(rows: Split) -> str:
    """SHA-256 over up to SEEN rows, spread evenly: tells other data, other order and other tokens, not each single change."""
    count = len(rows)
    places = sorted({round(part * (count - 1) / (SEEN - 1)) for part in range(SEEN)}) if count else []
    columns = rows[places] if places else {}
    text = json.dumps(sorted((name, list(values)) for name, values in columns.items()), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check(task: Task, seen: str | None, checkpoint: Chosen, config: Config) -> None:
    """Compares the data with those of the checkpoint.

    Args:
        seen: a glance at the training data; None where they cannot be compared so.

    Raises:
        DataError: they are others, and `checkpoint.allow_changes` does not name them.
    """
    if "data" in config.checkpoint.allow_changes:
        return
    was, now = checkpoint.state["rows"]["train"], len(task.splits["train"])
    if was != now:
        what = (
            f"The training data has {now} examples, but the checkpoint of step {checkpoint.step} was made with {was}."
        )
    elif None not in (seen, checkpoint.state["data"]) and seen != checkpoint.state["data"]:
        what = (
            f"The training data has as many examples ({now}) as when the checkpoint of step {checkpoint.step} was made, but "
            "others, in another order, or with other tokens."
        )
    else:
        return
    raise DataError(
        f"{what} Bring the data back, choose another run.name, or go on all the same by checkpoint.allow_changes='[data]'."
    )

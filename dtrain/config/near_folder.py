"""Finds the folder that a misspelled path may mean."""

from __future__ import annotations

import difflib
from pathlib import Path

SIMILARITY = 0.75
"""How alike two names must be, as difflib counts it: `run` and `runs`, `quikstart` and `quickstart`."""


RUNS = Path("runs")
"""The default of run.output_dir."""


def near_folder(name: str) -> Path | None:
    """Returns an existing folder whose path is spelled like `name`, or almost so; None if there is none.

    Each part of the path is taken as it is where it exists, else the nearest name of a folder there.
    """
    path = Path(name).expanduser()
    found = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        if (found / part).is_dir():
            found /= part
            continue
        try:
            folders = [entry.name for entry in found.iterdir() if entry.is_dir()]
        except OSError:  # it may not be read
            return None
        nearest = difflib.get_close_matches(part, folders, 1, SIMILARITY)
        if not nearest:
            return None
        found /= nearest[0]
    return found


def did_you_mean(name: str) -> str:
    """Returns a question that offers the folder that a wrong path may mean, with a space before it; empty if none is near."""
    near = near_folder(name) or near_folder(str(RUNS / name)) if Path(name).parts else None
    return "" if near is None else f" Did you mean {near}?"

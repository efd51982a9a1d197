"""Imports libraries without garbage collections. Needs no torch.

torch and transformers create more than a million objects while they are imported, and hardly one of them is garbage. Python's
collector looks at all of them again and again: that took a quarter of the time from the start to the first step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections(*, keep: bool) -> Iterator[None]:
    """Turns the collector off inside the block, and on again if it was on.

    Args:
        keep: no later collection looks at the objects that exist at the end. Only for a process whose objects of that moment
            live as long as it does: those that become garbage later stay in memory.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if keep:
            gc.freeze()
        if was_on:
            gc.enable()

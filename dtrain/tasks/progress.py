"""Shows how far long work is: a bar on a terminal, else a line in the log every ten seconds.

Fast work shows neither.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
from tqdm import tqdm

from dtrain.console import log

QUIET_S = 2.0
"""Seconds without a bar."""

LOG_EVERY_S = 10.0


@contextmanager
def progress(
    what: str,
    total: int,
    *,
    of: str = "data",
    processes: int = 1,
    is_shown: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of rows that are done since its last call; it may be too high.

    Args:
        what: what is counted, e.g. `train: rows tokenized`.
        of: what the lines in the log begin with.
        is_shown: false on a rank that does not report.
        processes: with several, the rows are counted elsewhere: `datasets` shows its own bar on a terminal.
    """
    if not is_shown:
        yield _do_nothing
        return
    is_terminal = sys.stderr.isatty()
    if processes > 1:
        if is_terminal:
            datasets.enable_progress_bars()
        try:
            yield _do_nothing  # it is sent to the other processes
        finally:
            datasets.disable_progress_bars()
        return
    done, logged = 0, clock()
    with tqdm(
        desc=what, total=total, unit=" rows", delay=QUIET_S, leave=False, disable=not is_terminal, dynamic_ncols=True
    ) as bar:

        def advance(rows: int) -> None:
            nonlocal done, logged
            rows = min(rows, total - done)
            done += rows
            bar.update(rows)
            if not is_terminal and done < total and clock() - logged >= LOG_EVERY_S:
                logged = clock()
                log.info("%s: %s: %d of %d (%.0f %%)", of, what, done, total, 100 * done / total)

        yield advance


def _do_nothing(_rows: int) -> None:
    return

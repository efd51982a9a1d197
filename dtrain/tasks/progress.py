"""Shows how far long work is: a bar on a terminal, else a line in the log every ten seconds.

Fast work shows neither.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from tqdm import tqdm

from dtrain.console import log

QUIET_S = 2.0
"""Seconds without a bar."""

LOG_EVERY_S = 10.0

NUMBER = struct.Struct("<q")


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
        processes: with several, the function that is yielded is sent to them. On a terminal `datasets` shows its own bar.
    """
    if not is_shown:
        yield _do_nothing
        return
    is_terminal = sys.stderr.isatty()
    if processes > 1 and is_terminal:
        datasets.enable_progress_bars()
        try:
            yield _do_nothing
        finally:
            datasets.disable_progress_bars()
        return
    if processes > 1:
        with TemporaryDirectory() as folder:
            count = FileCount(Path(folder) / "rows")
            with _reported(f"{of}: {what}", total, count):
                yield count
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
                _report(f"{of}: {what}", done, total)

        yield advance


@dataclass(frozen=True)
class FileCount:
    """Counts the rows of several processes. Each call appends its number to a file, which needs no lock.

    Attributes:
        path: the file; it is made by the first call.
    """

    path: Path

    def __call__(self, rows: int) -> None:
        with self.path.open("ab") as file:
            file.write(NUMBER.pack(rows))

    def total(self) -> int:
        """Returns the sum of all calls."""
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        return sum(number for (number,) in NUMBER.iter_unpack(content[: len(content) // NUMBER.size * NUMBER.size]))


@contextmanager
def _reported(what: str, total: int, count: FileCount) -> Iterator[None]:
    """Writes a line every LOG_EVERY_S seconds, from a thread: this process waits for the others."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOG_EVERY_S):
            done = count.total()
            if 0 < done < total:
                _report(what, done, total)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _report(what: str, done: int, total: int) -> None:
    log.info("%s: %d of %d (%.0f %%)", what, done, total, 100 * done / total)


def _do_nothing(_rows: int) -> None:
    return

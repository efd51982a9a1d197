"""What dtrain says on the terminal: logging set up once, the rank prefix, and the rule of who may speak.

Rank 0 reports; every rank may warn. Code calls `log.info(...)` plainly and the filter decides.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("dtrain")


class RankFilter(logging.Filter):
    """Lets rank 0 through at every level, other ranks from WARNING on, and names the rank where there are several."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._rank = rank
        self._prefix = f"[rank {rank}] " if world_size > 1 and rank > 0 else ""

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._prefix
        return self._rank == 0 or record.levelno >= logging.WARNING


def set_up(*, rank: int, world_size: int) -> None:
    """Sends dtrain's log to standard output. Warnings and errors carry their level, plain reports do not."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter())
    handler.addFilter(RankFilter(rank, world_size))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


@contextmanager
def warnings_only() -> Iterator[None]:
    """Keeps reports to itself, for a command that is asked one thing and answers it."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{getattr(record, 'rank', '')}{level}{super().format(record)}"

"""Output on the terminal: logging setup, and a filter that adds the rank and decides which ranks log.

Rank 0 logs everything; other ranks log warnings and errors. Code calls `log.info(...)` on every rank.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("dtrain")


class RankFilter(logging.Filter):
    """Passes all records of rank 0 and those from WARNING up of other ranks, and adds the rank if there are several."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._rank = rank
        self._prefix = f"[rank {rank}] " if world_size > 1 and rank > 0 else ""

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._prefix
        return self._rank == 0 or record.levelno >= logging.WARNING


def configure_logging(*, rank: int, world_size: int) -> None:
    """Sends dtrain's log to standard output. Warnings and errors start with their level, other messages do not."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter())
    handler.addFilter(RankFilter(rank, world_size))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


@contextmanager
def warnings_only() -> Iterator[None]:
    """Hides messages below WARNING, for a command that prints a single answer."""
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

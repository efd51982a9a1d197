"""Output on the terminal: logging setup, and a filter that adds the rank and decides which ranks log.

Rank 0 logs everything; other ranks log warnings and errors. Code calls `log.info(...)` on every rank.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

log = logging.getLogger("dtrain")

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that change what a terminal shows or does, such as the escape character. Tabs and line breaks are not among them."""


def printable(text: str) -> str:
    r"""Returns a text with its control characters as `\x1b`: names and texts from files must not control the terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


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


CLOSED_ERRORS = (errno.EPIPE, errno.EIO)
"""What a write raises when the reader (`| head`) or the terminal is gone."""


def protect_streams() -> None:
    """Makes sure that output can be written until the process ends, also when nobody reads it.

    A stream that was closed before the start (`>&-`) is opened on /dev/null: otherwise the next file that is opened gets
    its number, and the output of libraries. When a reader is gone, further output is dropped without a traceback.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            _redirect_to_null(number, mode)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process ends
    sys.stdout = _protected(sys.stdout, "stdout")
    sys.stderr = _protected(sys.stderr, "stderr")


def flush_streams() -> None:
    """Flushes both streams; what a missing reader leaves is dropped."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # closed
            stream.flush()


class _ProtectedStream(io.TextIOWrapper):
    """A standard stream that goes to /dev/null once its reader is gone."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)
            with suppress(OSError):
                super().flush()  # empties the buffer

    def _drop(self, error: OSError) -> None:
        if error.errno not in CLOSED_ERRORS:
            raise error
        _redirect_to_null(self.fileno(), os.O_WRONLY)


def _protected(stream: TextIO | None, name: str) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - open until the process ends
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _ProtectedStream):
        return stream  # a notebook, or a test that captures output
    buffered, immediate = stream.line_buffering, stream.write_through
    # A terminal that cannot show a character must not end the run.
    encoding, errors = stream.encoding, stream.errors if stream.errors != "strict" else "backslashreplace"
    replacement = _ProtectedStream(
        stream.detach(), encoding=encoding, errors=errors, line_buffering=buffered, write_through=immediate
    )
    setattr(sys, f"__{name}__", replacement)  # the detached one would raise errors at exit
    return replacement


def _redirect_to_null(number: int, mode: int) -> None:
    null = os.open(os.devnull, mode)
    if null != number:
        os.dup2(null, number)
        os.close(null)


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
        return printable(f"{getattr(record, 'rank', '')}{level}{super().format(record)}")

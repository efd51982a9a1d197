"""metrics.jsonl and other JSON on disk: whole lines, numbers that are not finite as text, errors with their path."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.console import log
from dtrain.errors import DataError, DtrainError


class MetricsLog:
    """Appends to metrics.jsonl, a whole line at a time. A line that a kill cut short is removed when it is opened.

    A full disk is no reason to end a run: lines wait in memory until there is room.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        with worded(path):
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            whole = self._file.read().rfind(b"\n") + 1
            self._file.truncate(whole)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one event. Numbers that are not finite become "nan", "inf" or "-inf".

        Raises:
            DtrainError: the line cannot be written, and not for want of room.
        """
        self._waiting.append(line_of(record).encode("utf-8"))
        with worded(self._path):
            try:
                self._write_all()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if len(self._waiting) == 1:
                    log.warning("%s: %s. Its lines wait until there is room", self._path, error.strerror)

    def _write_all(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            begin = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError:
                self._file.truncate(begin)
                raise
            del self._waiting[0]

    def close(self) -> None:
        """Ends the writing."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events in order. A step that was taken again counts with its last value; a torn last line does not count.

    Raises:
        DataError: a line before the last is not JSON.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, event in enumerate(events(path)):
        kind = event.get("event")
        key = (kind, event.get("step"), event.get("split")) if kind in ("train", "eval", "gradients") else (number,)
        kept.pop(key, None)  # so that the later one also stands later
        kept[key] = event
    return list(kept.values())


def events(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines in order.

    Raises:
        DataError: a line before the last is not JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise DataError(f"{path}, line {number}: this is not JSON; the file is damaged") from None


@contextmanager
def worded(path: Path) -> Iterator[None]:
    """Around writing a file: what the system says becomes a message with the path.

    Raises:
        DtrainError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DtrainError(f"{path} cannot be written: {error.filename or path}: {error.strerror}") from error


def line_of(record: Mapping[str, Any]) -> str:
    """One JSON object as a line."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON has no nan and inf: they become text, so that no reader loses them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value

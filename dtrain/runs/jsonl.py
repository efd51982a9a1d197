"""metrics.jsonl and other JSON files: complete lines, non-finite numbers as text, errors with the file's path."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.config import bounded_json
from dtrain.console import log
from dtrain.errors import DataError, DtrainError


class MetricsLog:
    """Appends to metrics.jsonl, one complete line at a time. Opening removes an incomplete last line.

    A full disk does not end the run: lines are kept in memory until there is space.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        with report_write_errors(path):
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            complete = self._file.read().rfind(b"\n") + 1
            self._file.truncate(complete)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one event. Non-finite numbers become "nan", "inf" or "-inf".

        Raises:
            DtrainError: the line cannot be written for another reason than a full disk.
        """
        self._waiting.append(to_json_line(record).encode("utf-8"))
        with report_write_errors(self._path):
            try:
                self._write_all()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if len(self._waiting) == 1:
                    log.warning("%s: %s. Its lines are kept until there is space", self._path, error.strerror)

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
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns all events in order. A repeated step counts with its last values; an incomplete last line is ignored.

    Raises:
        DataError: a line before the last is not JSON.
    """
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, event in enumerate(read_events(path)):
        kind = event.get("event")
        key = (kind, event.get("step"), event.get("split")) if kind in ("train", "eval", "gradients") else (number,)
        latest.pop(key, None)  # so that the later event also moves to the later position
        latest[key] = event
    return list(latest.values())


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of all complete lines in order.

    Raises:
        DataError: a line before the last is not JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield bounded_json.loads(line)
            except ValueError:
                raise DataError(f"{path}, line {number}: not JSON; the file is damaged") from None


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Converts an OSError while writing a file into an error that names its path.

    Raises:
        DtrainError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DtrainError(f"{path} cannot be written: {error.filename or path}: {error.strerror}") from error


def to_json_line(record: Mapping[str, Any]) -> str:
    """Returns one JSON object as a line."""
    return json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False) + "\n"


def json_safe(value: Any) -> Any:
    """Replaces nan and inf, which JSON does not have, by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return value

"""metrics.jsonl and other JSON files: complete lines, non-finite numbers as text, errors with the file's path."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dtrain.config import bounded_json
from dtrain.console import log
from dtrain.errors import DataError, DtrainError

BLOCK = 2**16
"""Bytes that are read at once from the end of a file."""


class MetricsLog:
    """Appends to metrics.jsonl, one complete line at a time. Opening removes an incomplete last line.

    A full disk does not end the run: lines are kept in memory until there is space.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        with report_write_errors(path):
            self._file = path.open("ab+", buffering=0)
            self._file.truncate(_end_of_complete_lines(self._file))

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
                raise _damaged(path, number) from None


def read_events_backward(path: Path, kinds: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields the events of these kinds, the last one first; reads no more of the file than the caller asks for.

    Lines that cannot hold such an event are skipped unread. A damaged one among them does not stop a start; `goodput`, which
    reads all, names it.

    Args:
        kinds: values of `event`.

    Raises:
        DataError: a line with the name of such an event is not JSON.
    """
    names = [json.dumps(kind).encode() for kind in kinds]
    with path.open("rb") as file:
        for begin, line in _lines_backward(file):
            if not any(name in line for name in names):
                continue
            try:
                event = bounded_json.loads(line)
            except ValueError:
                raise _damaged(path, _line_number(file, begin)) from None
            if isinstance(event, dict) and event.get("event") in kinds:
                yield event


def _damaged(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}, line {number}: not JSON; the file is damaged. All other lines are of use without this one: "
        f"sed -i {number}d {shlex.quote(str(path))}"
    )


def _lines_backward(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields where each complete line begins, and the line, from the last to the first."""
    end = _end_of_complete_lines(file)
    rest = b""  # the lines from `end` on, whose first one begins before it
    while end > 0:
        begin = max(0, end - max(BLOCK, len(rest)))  # more for a long line, which would else be copied once per block
        file.seek(begin)
        first, *lines = [line + b"\n" for line in (file.read(end - begin) + rest)[:-1].split(b"\n")]
        place = begin + len(first) + sum(map(len, lines))
        for line in reversed(lines):
            place -= len(line)
            yield place, line
        rest, end = first, begin
    if rest:
        yield 0, rest


def _end_of_complete_lines(file: BinaryIO) -> int:
    """Returns the size of a file without an incomplete last line. Reads from the end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        last = file.read(end - begin).rfind(b"\n")
        if last >= 0:
            return begin + last + 1
        end = begin
    return 0


def _line_number(file: BinaryIO, place: int) -> int:
    file.seek(0)
    number = 1
    while place > 0 and (block := file.read(min(BLOCK, place))):
        number += block.count(b"\n")
        place -= len(block)
    return number


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

"""How a job ends that cannot say so itself: the words, exit.json, the stacks, and a line in metrics.jsonl."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dtrain.console import log
from dtrain.errors import DtrainError
from dtrain.job.watchdog.report import Evidence, place_of
from dtrain.job.watchdog.stacks import fatal_error_in, frames_of, written
from dtrain.runs.folder import write_exit, write_text_atomic

T = TypeVar("T")

STACKS = "hang-stacks.txt"

FILES_S = 3.0
"""How long the run folder may take. Its file system may be what the ranks hang in, and they are to be ended regardless."""

PRINT_S = 1.0
"""The same for standard output, which may be a file there."""

POLL_S = 0.01


def words_of_death(rank: int, pid: int, file: int | None, thread: int) -> str:
    """What is known of a rank that has died: the interpreter may have written why."""
    who = f"Rank {rank} (process {pid} on {socket.gethostname()})"
    text = written(file, 0) if file is not None else ""
    fatal = fatal_error_in(text)
    if fatal is None:
        return f"{who} died without a word: killed from outside, or for want of memory?"
    frames = frames_of(text[text.index("Fatal Python error") :], thread)
    return f"{who} died: {fatal} at {place_of(frames)}."


async def speak(end: dict[str, Any], ranks: Sequence[Evidence], run_dir: Path, *, of_all: bool = True) -> None:
    """Writes down how the job ends and prints it, in a few seconds at most, whatever a disk does.

    Without evidence it is a death, which another may have told already: then it is not told again.

    Args:
        of_all: whether all ranks are judged where this is called. Else another may live that writes the job's files.
    """
    message = end["message"]
    if end["owns_folder"]:
        found = await _within(FILES_S, partial(_write_down, end, ranks, run_dir, of_all=of_all))
        silence = f"{message}\n  {run_dir} did not answer for {FILES_S:g} s: nothing is written down there"
        message, is_news = found if found is not None else (silence, True)
        if not is_news:
            return
    await _within(PRINT_S, partial(log.error, "%s", message))


async def _within(limit_s: float, work: Callable[[], T]) -> T | None:
    """What `work` gives, from a thread that is left alone where it takes longer or fails: None then."""
    found: list[T] = []

    def do() -> None:
        with suppress(OSError, ValueError):
            found.append(work())

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s
    while thread.is_alive() and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    return found[0] if found else None


def _write_down(end: dict[str, Any], ranks: Sequence[Evidence], run_dir: Path, *, of_all: bool) -> tuple[str, bool]:
    """Gives what is to be said, and whether it has not been said already."""
    message, file = end["message"], run_dir / "exit.json"
    if not run_dir.is_dir():
        return message, True
    if ranks and of_all:
        try:
            write_text_atomic(run_dir / STACKS, "\n\n".join(_titled(each) for each in ranks))
            message += f"\n  the stacks of all ranks: {run_dir / STACKS}"
        except (DtrainError, OSError, ValueError) as error:
            message += f"\n  the stacks of all ranks are not written down: {error}"
        _note_fault(run_dir / "metrics.jsonl", end)
    what = {key: end[key] for key in ("code", "cause", "rank", "host")}
    is_first = write_exit(file, **what, message=message)
    # Where nobody could write it, on a full disk, nobody else may have said it.
    return message, bool(ranks) or is_first or not file.exists()


def _titled(each: Evidence) -> str:
    return f"{each.who}, state {each.state}\n{each.text or 'no stack could be had'}"


def _note_fault(metrics: Path, end: dict[str, Any]) -> None:
    """One whole line at the end of metrics.jsonl. Its writer, rank 0, writes nothing more."""
    line = {
        "event": "fault",
        "kind": "hang",
        "step": end["step"],
        "ranks": end["ranks"],
        "message": end["message"].splitlines()[0],
        "time_s": time.time(),
        "monotonic_s": time.monotonic(),
    }
    with suppress(OSError):
        handle = os.open(metrics, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(handle).st_size
            if size == 0 or os.pread(handle, 1, size - 1) == b"\n":  # else a line is half written
                os.write(handle, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        finally:
            os.close(handle)

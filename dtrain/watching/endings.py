"""How a job ends that cannot say so itself: the words, exit.json, the stacks, and a line in metrics.jsonl."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.console import log
from dtrain.run_folder import write_exit, write_text_atomic
from dtrain.watching.report import Evidence, place_of
from dtrain.watching.stacks import fatal_error_in, frames_of, written

STACKS = "hang-stacks.txt"


def words_of_death(rank: int, pid: int, file: int | None, thread: int) -> str:
    """What is known of a rank that has died: the interpreter may have written why."""
    who = f"Rank {rank} (process {pid} on {socket.gethostname()})"
    text = written(file, 0) if file is not None else ""
    fatal = fatal_error_in(text)
    if fatal is None:
        return f"{who} died without a word: killed from outside, or for want of memory?"
    frames = frames_of(text[text.index("Fatal Python error") :], thread)
    return f"{who} died: {fatal} at {place_of(frames)}."


def speak(end: dict[str, Any], ranks: Sequence[Evidence], run_dir: Path) -> None:
    """Prints how the job ends and writes it down. Without evidence it is a death, which another may have told already."""
    has_folder = end["owns_folder"] and run_dir.is_dir()
    if has_folder and ranks:
        with suppress(OSError, Exception):
            write_text_atomic(run_dir / STACKS, "\n\n".join(_titled(each) for each in ranks))
        end["message"] += f"\n  the stacks of all ranks: {run_dir / STACKS}"
        _note_fault(run_dir / "metrics.jsonl", end)
    is_first = has_folder and write_exit(
        run_dir / "exit.json",
        code=end["code"],
        cause=end["cause"],
        rank=end["rank"],
        host=end["host"],
        message=end["message"],
    )
    if ranks or is_first or not has_folder:
        log.error("%s", end["message"])


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

"""Reports the end of a job that cannot do so itself: message, exit.json, stacks, and a line in metrics.jsonl."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.console import log
from dtrain.distributed.bounded import await_with_timeout
from dtrain.errors import DtrainError
from dtrain.job.watchdog.report import RankEvidence, format_place
from dtrain.job.watchdog.stacks import find_fatal_error, parse_stack, read_from
from dtrain.runs.folder import write_exit, write_text_atomic

STACKS_FILE = "hang-stacks.txt"

RUN_DIR_S = 3.0
"""How long the run folder may take. The ranks may hang in its file system, and must be ended nevertheless."""

BUS_ERROR_CAUSE = (
    " A file that it had mapped into memory was cut short (the prepared data in data.cache_dir, or a model's weights), its "
    "disk failed, or /dev/shm is full."
)

ABORT_CAUSE = (
    " A library ended it. If the lines above name ProcessGroupNCCL, that was NCCL, after a collective that took too long or an "
    "error of CUDA on this rank: they say which."
)

PRINT_S = 1.0
"""The same limit for standard output, which may be a file there."""


def death_message(
    rank: int, pid: int, stacks: int | None, thread: int, *, oom_kills: tuple[int | None, int | None] = (None, None)
) -> str:
    """Returns what is known about a rank that has died. The interpreter may have written why.

    Args:
        stacks: file that faulthandler wrote to.
        thread: threading.get_ident() of its main thread.
        oom_kills: count_oom_kills() at the start and now.
    """
    name = f"Rank {rank} (process {pid} on {socket.gethostname()})"
    text = read_from(stacks, 0) if stacks is not None else ""
    error = find_fatal_error(text)
    before, now = oom_kills
    if error is None and before is not None and now is not None and now > before:
        return (
            f"{name} was killed by the kernel because the container's memory was full ({now - before} process(es) since the "
            "start). Give the job more memory, or use a smaller train.micro_batch_size "
            "(train.micro_batch_tokens), fewer ranks or fewer data.workers."
        )
    if error is None:
        return f"{name} exited without an error message: killed by a signal, or out of memory?"
    frames = parse_stack(text[text.index("Fatal Python error") :], thread)
    cause = {"Bus error": BUS_ERROR_CAUSE, "Aborted": ABORT_CAUSE}.get(error, "")
    return f"{name} died: {error} at {format_place(frames)}.{cause}"


async def report_end(
    end: dict[str, Any], ranks: Sequence[RankEvidence], run_dir: Path, *, covers_all_ranks: bool = True
) -> None:
    """Writes and prints how the job ends, in a few seconds at most, even if a disk blocks.

    Args:
        end: fields of exit.json, and whether the job `owns_run_dir`.
        ranks: evidence about a hang. Empty after a death, which is not reported again if another process has done so.
        covers_all_ranks: whether the caller watches all ranks. Else another process may still write the job's files.
    """
    message = end["message"]
    if end["owns_run_dir"]:
        blocked = f"{message}\n  {run_dir} did not respond for {RUN_DIR_S:g} s: nothing is written there"
        message, is_new = await await_with_timeout(
            partial(_write_files, end, ranks, run_dir, covers_all_ranks=covers_all_ranks),
            RUN_DIR_S,
            (blocked, True),
            ignore=(OSError, ValueError),
        )
        if not is_new:
            return
    await await_with_timeout(partial(log.error, "%s", message), PRINT_S, None, ignore=(OSError, ValueError))


def _write_files(
    end: dict[str, Any], ranks: Sequence[RankEvidence], run_dir: Path, *, covers_all_ranks: bool
) -> tuple[str, bool]:
    """Writes the files; returns the message to print, and whether no other process has printed it."""
    message, file = end["message"], run_dir / "exit.json"
    if not run_dir.is_dir():
        return message, True
    if ranks and covers_all_ranks:
        try:
            write_text_atomic(run_dir / STACKS_FILE, "\n\n".join(_titled_stack(each) for each in ranks))
            message += f"\n  the stacks of all ranks: {run_dir / STACKS_FILE}"
        except (DtrainError, OSError, ValueError) as error:
            message += f"\n  the stacks of all ranks could not be written: {error}"
        _append_fault(run_dir / "metrics.jsonl", end)
    fields = {key: end[key] for key in ("code", "cause", "rank", "host")}
    is_first = write_exit(file, **fields, message=message)
    # If no process could write the file, on a full disk, none may have printed the message either.
    return message, bool(ranks) or is_first or not file.exists()


def _titled_stack(each: RankEvidence) -> str:
    return f"{each.name}, state {each.process_state}\n{each.text or 'no stack available'}"


def _append_fault(metrics: Path, end: dict[str, Any]) -> None:
    """Appends one complete line to metrics.jsonl. Its writer, rank 0, writes nothing more."""
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
            if size == 0 or os.pread(handle, 1, size - 1) == b"\n":  # else the last line is incomplete
                os.write(handle, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        finally:
            os.close(handle)

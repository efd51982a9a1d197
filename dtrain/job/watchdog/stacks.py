"""Inspects a process from outside: its state, its children, and the stacks that faulthandler writes for it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dtrain.distributed.process_info import read_stat

STACK_SIGNAL = signal.SIGUSR2
"""Makes a thread of a rank write its stack, even while it holds the interpreter lock.

It writes only its own stack: walking the stacks of threads that are running can crash the process.
"""

STACK_TIMEOUT_S = 1.0
POLL_S = 0.02
MAX_WORKERS = 4
"""How many data workers are asked for their stacks."""

DEBUGGERS = {"pdb", "bdb", "debugpy", "pydevd", "pydevd_bundle"}
"""Modules and packages of debuggers."""

STATE_NAMES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or device",
    "T": "stopped",
    "t": "held by a debugger",
    "Z": "dead",
    "X": "dead",
}

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<function>.*)')
_THREAD = re.compile(r"(?:(?:Current thread|Thread) 0x(?P<ident>[0-9a-f]+)|Stack).* \(most recent call first\)")


class Frame(NamedTuple):
    """A line of a stack."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def parse_stack(text: str, thread: int, *, first: bool = False) -> list[Frame]:
    """Returns the stack of one thread, innermost first, from what faulthandler wrote; from the last of several dumps.

    A stack without the id of a thread counts as that thread's.

    Args:
        thread: threading.get_ident() in that process.
        first: use the first of several dumps instead.
    """
    frames: list[Frame] = []
    is_wanted = False
    for line in text.splitlines():
        if head := _THREAD.match(line):
            if first and frames:
                break
            is_wanted = head["ident"] is None or int(head["ident"], 16) == thread
            frames = [] if is_wanted else frames
        elif is_wanted and (frame := _FRAME.match(line)):
            frames.append(Frame(*frame.groups()))
    return frames


def find_fatal_error(text: str) -> str | None:
    """Returns the error that killed the interpreter, such as `Segmentation fault`, if it wrote one."""
    match = re.search(r"^Fatal Python error: (.+)$", text, re.MULTILINE)
    return match[1] if match else None


def is_debugged(frame: FrameType | None) -> bool:
    """Returns whether a debugger is among the callers of a frame, so that the process waits for a person."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0].lstrip("_") in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


def process_state(pid: int) -> str:
    """Returns the letter of the process's state, as ps shows it; Z if there is no such process."""
    stat = read_stat(pid)
    return stat[0] if stat is not None else "Z"


def read_from(file: int, start: int) -> str:
    """Returns what was written to a file after an offset, without moving its file position."""
    return os.pread(file, max(os.fstat(file).st_size - start, 0), start).decode(errors="replace")


async def request_stack(pid: int, thread: int, file: int, *, timeout_s: float = STACK_TIMEOUT_S) -> str:
    """Makes a thread of a process that has called faulthandler.register write its stack, and returns it.

    Args:
        thread: threading.get_native_id() in that process.
        timeout_s: seconds after which what has been written is returned; it may be nothing.
    """
    if not handles_stack_signal(pid):
        return ""
    start, last_size = os.fstat(file).st_size, -1
    was_stopped = process_state(pid) == "T"
    try:
        _signal_thread(pid, thread)
        if was_stopped:  # it writes once it continues
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    for _ in range(int(timeout_s / POLL_S)):
        await asyncio.sleep(POLL_S)
        size = os.fstat(file).st_size
        if size > start and size == last_size:
            break
        last_size = size
    return read_from(file, start)


async def request_worker_stacks(pid: int, file: int) -> list[str]:
    """Returns the stacks of a rank's data workers, which inherited its faulthandler, within a second.

    Asks one worker after the other, because they write to the same file.
    """
    workers = find_workers(pid)[:MAX_WORKERS]
    return [await request_stack(each, each, file, timeout_s=STACK_TIMEOUT_S / len(workers)) for each in workers]


def find_workers(pid: int) -> list[int]:
    """Returns its forked children, mostly data workers; neither programs that it has started, nor its monitor."""
    workers: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            workers += [child for child in map(int, listing.read_text().split()) if handles_stack_signal(child)]
        except OSError:  # the thread has just ended
            continue
    return workers


def _signal_thread(pid: int, thread: int) -> None:
    """Signals one thread: a signal to the process may reach any thread, and the one that gets it writes its stack."""
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None:
        os.kill(pid, STACK_SIGNAL)
    else:
        tgkill(pid, thread, int(STACK_SIGNAL))


def handles_stack_signal(pid: int) -> bool:
    """Returns whether it handles the signal, as a rank and its forks do. The signal would end any other process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (STACK_SIGNAL - 1) & 1)

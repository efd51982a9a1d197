"""What can be seen of a process from outside: its state, its children, and the stacks that faulthandler writes for it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
from pathlib import Path
from types import FrameType
from typing import NamedTuple

SIGNAL = signal.SIGUSR2
"""Makes a thread of a rank write its stack, also while it holds the interpreter lock.

Only its own: to walk through the stacks of threads that run meanwhile can crash the process.
"""

WITHIN_S = 1.0
POLL_S = 0.02
WORKERS = 4
"""How many data workers are asked for their stacks."""

DEBUGGERS = {"pdb", "bdb", "debugpy", "pydevd", "pydevd_bundle"}
"""Modules and packages."""

STATES = {
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


def frames_of(text: str, thread: int, *, first: bool = False) -> list[Frame]:
    """The stack of one thread, innermost first, from what faulthandler wrote; of several dumps the last.

    A stack without a thread's name counts as that thread's.

    Args:
        thread: threading.get_ident() there.
        first: of several dumps the first.
    """
    found: list[Frame] = []
    is_wanted = False
    for line in text.splitlines():
        if head := _THREAD.match(line):
            if first and found:
                break
            is_wanted = head["ident"] is None or int(head["ident"], 16) == thread
            found = [] if is_wanted else found
        elif is_wanted and (frame := _FRAME.match(line)):
            found.append(Frame(*frame.groups()))
    return found


def fatal_error_in(text: str) -> str | None:
    """`Segmentation fault`, where the interpreter wrote that it dies of it."""
    found = re.search(r"^Fatal Python error: (.+)$", text, re.MULTILINE)
    return found[1] if found else None


def is_debugged(frame: FrameType | None) -> bool:
    """Whether a debugger is among those that called, up from a frame: it waits for a person."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0].lstrip("_") in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


def state_of(pid: int) -> str:
    """The letter of its state, as ps shows it; Z where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def written(file: int, start: int) -> str:
    """What was written to a file from an offset on, without moving anybody's place in it."""
    return os.pread(file, max(os.fstat(file).st_size - start, 0), start).decode(errors="replace")


async def ask_for_stack(pid: int, thread: int, file: int, *, within_s: float = WITHIN_S) -> str:
    """Lets a thread of a process that has called faulthandler.register write its stack; nothing after that time.

    Args:
        thread: threading.get_native_id() there.
    """
    if not is_worker(pid):
        return ""
    start, last = os.fstat(file).st_size, -1
    was_stopped = state_of(pid) == "T"
    try:
        _signal_thread(pid, thread)
        if was_stopped:  # it writes when it goes on
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    for _ in range(int(within_s / POLL_S)):
        await asyncio.sleep(POLL_S)
        size = os.fstat(file).st_size
        if size > start and size == last:
            break
        last = size
    return written(file, start)


async def ask_workers(pid: int, file: int) -> list[str]:
    """The stacks of a rank's data workers, which inherited its faulthandler, within a second.

    One after the other: they write into the same file.
    """
    workers = workers_of(pid)[:WORKERS]
    return [await ask_for_stack(each, each, file, within_s=WITHIN_S / len(workers)) for each in workers]


def workers_of(pid: int) -> list[int]:
    """Its forked children, data workers mostly; not programs that it has started, and not its monitor."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [child for child in map(int, listing.read_text().split()) if is_worker(child)]
        except OSError:  # a thread that ended while we looked
            continue
    return found


def _signal_thread(pid: int, thread: int) -> None:
    """To that thread: what is sent to the process goes to any, and it is the one that hears it whose stack is written."""
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None:
        os.kill(pid, SIGNAL)
    else:
        tgkill(pid, thread, int(SIGNAL))


def is_worker(pid: int) -> bool:
    """Whether it handles the signal, as a fork of a rank does; others would be ended by it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (SIGNAL - 1) & 1)

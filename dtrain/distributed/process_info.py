"""Processes as one can tell them apart: this one, whether another still lives, and how long this one has run.

Reads /proc; where there is none (macOS), a process is known by its number alone.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process among all that ever were. JSON types, so that it can be written down.

    boot: tells machines of one host name apart, and a machine from itself before a restart; "" where there is no /proc.
    pid_namespace: processes can be looked up in the same one only; containers have their own. 0 without /proc.
    started: clock ticks from the machine's start to the process's; tells it from a later one with the same number.
    """

    host: str
    boot: str
    pid_namespace: int
    pid: int
    started: str


def this_process() -> Process:
    """The one that asks."""
    namespace = Path("/proc/self/ns/pid")
    fields = fields_of(os.getpid())
    return Process(
        host=socket.gethostname(),
        boot=boot(),
        pid_namespace=namespace.stat().st_ino if namespace.exists() else 0,
        pid=os.getpid(),
        started=fields[19] if fields is not None else "",
    )


def is_alive(process: Process) -> bool | None:
    """Whether it still runs; None where that cannot be seen from here.

    One that has ended and waits to be collected does not run; a stopped one does.
    """
    if process[:3] != this_process()[:3] or not process.boot:
        return None
    fields = fields_of(process.pid)
    if fields is not None:
        return fields[0] not in "ZX" and fields[19] == process.started
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, and /proc hides it
        return None
    return None  # it came up between the two looks


def began() -> float:
    """When this process began, as time.monotonic() counts; now, where there is no /proc."""
    return time.monotonic() - (age_s(os.getpid()) or 0.0)


def age_s(pid: int) -> float | None:
    """For how many seconds a process has been there; None where that cannot be seen."""
    fields = fields_of(pid)
    if fields is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"), 0.0)


def boot() -> str:
    """Tells machines of one host name apart, and a machine from itself before a restart; empty without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def fields_of(pid: int) -> list[str] | None:
    """/proc's of a process, from the state on (0 state, 1 parent, 19 start); None where it is gone.

    The name before them may hold anything.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None

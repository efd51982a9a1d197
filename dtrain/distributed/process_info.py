"""Identifies processes: this one, whether another is still alive, how long one has been running, its limit of open files.

Reads /proc. Without /proc (macOS), a process is known by its number alone.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class ProcessIdentity(NamedTuple):
    """Identifies one process among all that ever ran, on any host. Holds JSON types, so that it can be stored or sent.

    Attributes:
        host: host name.
        boot: differs between machines of one host name, and between two boots of one machine; "" without /proc.
        pid_namespace: a process can be looked up in its own namespace only; containers have one each. 0 without /proc.
        pid: process id.
        started: clock ticks from the boot to the start of the process; differs from a later process with the same id.
    """

    host: str
    boot: str
    pid_namespace: int
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> ProcessIdentity:
    """Returns the identity of the calling process."""
    return identify(os.getpid()) or _identity(os.getpid(), "")


def identify(pid: int) -> ProcessIdentity | None:
    """Returns the identity of a process that is visible here; None without one, or without /proc."""
    stat = read_stat(pid)
    return _identity(pid, stat[19]) if stat is not None else None


def _identity(pid: int, started: str) -> ProcessIdentity:
    namespace = Path("/proc/self/ns/pid")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    return ProcessIdentity(socket.gethostname(), boot_id(), inode, pid, started)


def is_alive(process: ProcessIdentity, *, observer: ProcessIdentity | None = None) -> bool | None:
    """Returns whether a process is still running; None if that cannot be seen from here.

    A zombie is not running; a stopped process is.

    Args:
        observer: this process, if the caller has its identity already.
    """
    if process[:3] != (observer or this_process())[:3] or not process.boot:
        return None
    stat = read_stat(process.pid)
    if stat is not None:
        return _shows_running(stat, process.started)
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user, and /proc hides it
        return None
    return None  # it started between the two looks


def is_running(pid: int, started: str) -> bool:
    """Returns whether the process with this id and start time, on this host, is running. A zombie is not.

    Args:
        started: as in ProcessIdentity.
    """
    stat = read_stat(pid)
    return stat is not None and _shows_running(stat, started)


def _shows_running(stat: list[str], started: str) -> bool:
    return stat[0] not in "ZX" and stat[19] == started


def process_start(pid: int | None = None) -> float:
    """Returns when a process started, as time.monotonic() counts; now, without /proc.

    Args:
        pid: its process id; None for this one.
    """
    return time.monotonic() - (age_s(os.getpid() if pid is None else pid) or 0.0)


def age_s(pid: int) -> float | None:
    """Returns for how many seconds a process has been running; None if that cannot be seen."""
    stat = read_stat(pid)
    if stat is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK"), 0.0)


def raise_open_files() -> int:
    """Raises this process's soft limit of open files to the hard limit: each rank needs a socket for every other one.

    Returns:
        The limit now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS refuses values above its own limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def count_open_files() -> int:
    """Returns how many files, pipes and sockets this process has open; 0 without /proc."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the entries are not files to open
    except OSError:
        return 0


def open_files_hint(limit: int) -> str:
    """Returns the limit of open files in words, and how to raise it."""
    return (
        f"the limit of open files is {limit} (dtrain has raised it to the hard limit). Raise that: ulimit -Hn 65536 as root, "
        "nofile in /etc/security/limits.conf, LimitNOFILE= of a service, or docker run --ulimit nofile=65536"
    )


def boot_id() -> str:
    """Returns the id of this boot, which differs between machines and between boots; empty without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat from the state on (0 state, 1 parent, 19 start); None if there is none.

    The process name before them is skipped, since it may contain spaces and parentheses.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None

"""Ends a rank when its launcher dies, so that no orphan continues to train, hold memory and write files.

A launcher that is killed signals nobody: torchrun starts each rank in its own session, and DeepSpeed's runner leaves
launch.py alive. So each rank watches its launcher itself.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dtrain.console import log
from dtrain.distributed.bounded import call_with_timeout
from dtrain.distributed.process_info import is_running, read_stat
from dtrain.distributed.topology import Topology

POLL_S = 0.5
REPORT_S = 3.0
"""How long the report may take. Together with the poll it is less than the promised 5 s."""

PR_SET_PDEATHSIG = 1

LAUNCHER_PATTERNS = {
    "torchrun": r"torchrun|torch\.distributed\.(run|launch)",
    # launch.py is the parent; the runner above it is what the user started, and its death leaves launch.py alive.
    "deepspeed": r"deepspeed|deepspeed\.launcher\.runner",
    "openmpi": r"mpirun|mpiexec|prterun|prted|orterun|orted",
    "mpich": r"mpirun|mpiexec(\.hydra)?|hydra_\w+|pmi_proxy",
    "intelmpi": r"mpirun|mpiexec(\.hydra)?|hydra_\w+|pmi_proxy",
    "slurm": r"slurmstepd.*",
}
"""By topology.launcher, a pattern for a word in the command line of its process. `none` and `env` have no launcher."""

MAX_WORDS = 6
"""How many words of a command line are matched: the interpreter and its options come before the name."""

MAX_GENERATIONS = 5
"""How many ancestors are searched: shells and wrappers may come between the launcher and this process."""


class Ancestor(NamedTuple):
    """A process between the launcher and this one, or the launcher.

    Attributes:
        pid: process id.
        started: start time, as in ProcessIdentity.
        command: command line, separated by NUL.
    """

    pid: int
    started: str
    command: str

    @property
    def is_running(self) -> bool:
        """Whether the process is still running."""
        return is_running(self.pid, self.started)


def exit_with_launcher(topology: Topology, on_death: Callable[[str], None]) -> Callable[[], bool]:
    """Starts a thread that ends this process, with code 1, within 5 s after its launcher's death.

    Watches the parent and every process between it and the launcher; the first that ends counts. Watches nothing for a
    single process, or if the rank's variables were set by hand.

    Args:
        on_death: called first with the cause, from that thread, for 3 s at most.

    Returns:
        A function that tells whether the launcher is alive.
    """
    pattern = LAUNCHER_PATTERNS.get(topology.launcher)
    if pattern is None or not Path("/proc/self/stat").exists():
        return lambda: True
    watched = find_ancestors(os.getpid(), pattern)
    # A stopped rank runs no thread. Its parent's death continues it, and then the thread sees that.
    _signal_on_parent_death(signal.SIGCONT)
    threading.Thread(target=_watch, args=(topology, watched, on_death), name="launcher-watch", daemon=True).start()
    return lambda: all(process.is_running for process in watched)


def find_ancestors(pid: int, launcher: str) -> list[Ancestor]:
    """Returns the processes from the parent of `pid` up to the launcher; the parent alone if there is no launcher.

    Args:
        launcher: regular expression that one word of the launcher's command line matches, without its folder.
    """
    chain: list[Ancestor] = []
    for _ in range(MAX_GENERATIONS):
        parent = _parent(pid)
        process = _read_ancestor(parent) if parent is not None else None
        if process is None:
            break
        chain.append(process)
        words = process.command.split("\0")[:MAX_WORDS]
        if any(re.fullmatch(launcher, word.rpartition("/")[2]) for word in words):
            return chain
        pid = process.pid
    return chain[:1]


def _watch(topology: Topology, watched: list[Ancestor], on_death: Callable[[str], None]) -> None:
    while all(process.is_running for process in watched):
        time.sleep(POLL_S)
    dead = next((process for process in watched if not process.is_running), watched[0])
    name = dead.command.split("\0")[0].rpartition("/")[2] or "unknown"
    cause = f"The launcher ({topology.launcher}) has died: process {dead.pid} ({name}) is gone."
    call_with_timeout(partial(_report, cause, on_death, topology), REPORT_S, None)
    os._exit(1)


def _report(cause: str, on_death: Callable[[str], None], topology: Topology) -> None:
    try:
        on_death(cause)
    finally:
        if topology.is_node_main:  # all ranks of a node have the same launcher
            log.error("%s Its ranks end as well.", cause)


def _parent(pid: int) -> int | None:
    stat = read_stat(pid)
    return int(stat[1]) if stat is not None and int(stat[1]) > 0 else None


def _read_ancestor(pid: int) -> Ancestor | None:
    stat = read_stat(pid)
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    return None if stat is None else Ancestor(pid, stat[19], command)


def _signal_on_parent_death(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)

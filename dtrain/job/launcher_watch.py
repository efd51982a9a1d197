"""A rank ends with its launcher: no orphan goes on training, holding memory and writing files.

Launchers that are killed tell nobody (torchrun gives each rank a session of its own; DeepSpeed's runner leaves
launch.py alive), so each rank looks for itself.
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
from pathlib import Path
from typing import NamedTuple

from dtrain.console import log
from dtrain.distributed.process_info import fields_of
from dtrain.distributed.topology import Topology

POLL_S = 0.5
REPORT_S = 3.0
"""How long the last words may take; with the poll it stays below the 5 s that are promised."""

PR_SET_PDEATHSIG = 1

LAUNCHERS = {
    "torchrun": r"torchrun|torch\.distributed\.(run|launch)",
    # launch.py is the parent; the runner above it is what the user started, and its death leaves launch.py alive.
    "deepspeed": r"deepspeed|deepspeed\.launcher\.runner",
    "openmpi": r"mpirun|mpiexec|prterun|prted|orterun|orted",
    "mpich": r"mpirun|mpiexec(\.hydra)?|hydra_\w+|pmi_proxy",
    "intelmpi": r"mpirun|mpiexec(\.hydra)?|hydra_\w+|pmi_proxy",
    "slurm": r"slurmstepd.*",
}
"""By topology.launcher: words of the command line of the process that must live. `none` and `env` have no launcher."""

WORDS = 6
"""How many words of a command line are looked at: the interpreter and its options come before the name."""

GENERATIONS = 5
"""How far up a launcher is looked for: shells and wrappers may stand between it and us."""


class Watched(NamedTuple):
    """A process, told from a later one with the same number by the time it started."""

    pid: int
    started: str
    command: str


def end_with_launcher(topology: Topology, on_death: Callable[[str], None]) -> Callable[[], bool]:
    """Starts a thread that ends this process within 5 s of its launcher's death, with code 1.

    Watches the parent and every process between it and the launcher; the first that goes counts. Nothing is watched
    for one process on its own, or when the rank's variables were set by hand.

    Args:
        on_death: is told the cause first, from that thread, and gets 3 s at most.

    Returns:
        Tells whether the launcher lives.
    """
    pattern = LAUNCHERS.get(topology.launcher)
    if pattern is None or not Path("/proc/self/stat").exists():
        return lambda: True
    watched = ancestors(os.getpid(), pattern)
    # A stopped rank runs no thread: its parent's death wakes it up, and then the thread sees to the rest.
    _on_parents_death(signal.SIGCONT)
    threading.Thread(target=_watch, args=(topology, watched, on_death), name="launcher-watch", daemon=True).start()
    return lambda: all(map(is_alive, watched))


def ancestors(pid: int, launcher: str) -> list[Watched]:
    """The processes from the parent of `pid` up to the launcher; the parent alone where no launcher is found.

    Args:
        launcher: regular expression that one word of the launcher's command line matches, without its folder.
    """
    chain: list[Watched] = []
    for _ in range(GENERATIONS):
        parent = _parent(pid)
        process = _look(parent) if parent is not None else None
        if process is None:
            break
        chain.append(process)
        words = process.command.split("\0")[:WORDS]
        if any(re.fullmatch(launcher, word.rpartition("/")[2]) for word in words):
            return chain
        pid = process.pid
    return chain[:1]


def is_alive(process: Watched) -> bool:
    """Whether the process still runs; one that has ended and waits to be collected does not."""
    fields = fields_of(process.pid)
    return fields is not None and fields[0] not in "ZX" and fields[19] == process.started


def _watch(topology: Topology, watched: list[Watched], on_death: Callable[[str], None]) -> None:
    while all(map(is_alive, watched)):
        time.sleep(POLL_S)
    gone = next((process for process in watched if not is_alive(process)), watched[0])
    name = gone.command.split("\0")[0].rpartition("/")[2] or "unknown"
    cause = f"The launcher ({topology.launcher}) has died: process {gone.pid} ({name}) is gone."
    report = threading.Thread(target=_last_words, args=(cause, on_death, topology), daemon=True)
    report.start()
    report.join(timeout=REPORT_S)
    os._exit(1)


def _last_words(cause: str, on_death: Callable[[str], None], topology: Topology) -> None:
    try:
        on_death(cause)
    finally:
        if topology.is_node_main:  # all ranks of a node find the same
            log.error("%s Its ranks end as well.", cause)


def _parent(pid: int) -> int | None:
    fields = fields_of(pid)
    return int(fields[1]) if fields is not None and int(fields[1]) > 0 else None


def _look(pid: int) -> Watched | None:
    fields = fields_of(pid)
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    return None if fields is None else Watched(pid, fields[19], command)


def _on_parents_death(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)

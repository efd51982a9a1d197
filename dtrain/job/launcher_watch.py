"""Ends a rank when its launcher dies, so that no orphan continues to train, hold memory and write files.

A launcher that is killed signals nobody: torchrun starts each rank in its own session, and DeepSpeed's runner leaves
launch.py alive, also at Ctrl-C. So each rank watches its launcher itself. A run that trains gets the chance to save.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dtrain.console import log
from dtrain.distributed import linux_process, signals
from dtrain.distributed.bounded import call_with_timeout
from dtrain.distributed.launcher_process import LAUNCHER_PATTERNS, Ancestor, find_ancestors, typed_command
from dtrain.distributed.topology import Topology
from dtrain.errors import TopologyError

POLL_S = 0.5
SAVE_S = 2.5
"""How long a run may take to save after its launcher's death."""

REPORT_S = 1.5
"""How long the report may take. Together with the poll and SAVE_S it is less than the promised 5 s."""

STOPPING_S = 60.0
"""How long a run may take to save if it was told to stop before its launcher died: Ctrl-C ends DeepSpeed's runner at once."""


def exit_with_launcher(topology: Topology, on_death: Callable[[BaseException], None]) -> Callable[[], bool]:
    """Starts a thread that ends this process, with code 4 or with 75 if a run is saved, within 5 s of its launcher's death.

    Watches the parent and every process between it and the launcher; the first that ends counts. Watches nothing for a
    single process, or if the rank's variables were set by hand.

    Args:
        on_death: called first with the cause, from that thread, for REPORT_S at most.

    Returns:
        A function that tells whether the launcher is alive.
    """
    pattern = LAUNCHER_PATTERNS.get(topology.launcher)
    if pattern is None or not Path("/proc/self/stat").exists():
        return lambda: True
    watched = find_ancestors(os.getpid(), pattern)
    typed_command(topology)  # while the launcher lives
    # A stopped rank runs no thread. Its parent's death continues it, and then the thread sees that.
    linux_process.send_on_parent_death(signal.SIGCONT)
    threading.Thread(target=_watch, args=(topology, watched, on_death), name="launcher-watch", daemon=True).start()
    return lambda: all(process.is_running for process in watched)


def _watch(topology: Topology, watched: list[Ancestor], on_death: Callable[[BaseException], None]) -> None:
    while all(process.is_running for process in watched):
        time.sleep(POLL_S)
    dead = next((process for process in watched if not process.is_running), watched[0])
    name = dead.command.split("\0")[0].rpartition("/")[2] or "unknown"
    where = f" on {socket.gethostname()}" if topology.num_nodes > 1 else ""
    cause = f"The launcher ({topology.launcher}){where} has died: process {dead.pid} ({name}) is gone."
    if signals.is_stopping():
        time.sleep(STOPPING_S)  # the main thread ends the process before
    elif signals.request_stop(cause.rstrip(".")):
        time.sleep(SAVE_S)
    error = signals.unsaved_ending(TopologyError(cause))
    call_with_timeout(partial(_report, error, on_death, topology), REPORT_S, None)
    os._exit(error.exit_code)


def _report(error: BaseException, on_death: Callable[[BaseException], None], topology: Topology) -> None:
    try:
        on_death(error)
    finally:
        if topology.is_node_main:  # all ranks of a node have the same launcher
            log.error("%s Its ranks end as well.", error)

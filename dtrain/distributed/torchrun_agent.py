"""Identifies the agent, of torchrun or dtrain: the process that starts this node's ranks, and starts them again.

An agent starts one job. So two starts with the same agent are starts of the same job, whatever any clock says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from dtrain.distributed.process_info import ProcessIdentity, identify, read_stat

VARIABLES = (b"TORCHELASTIC_RUN_ID=", b"TORCHELASTIC_RESTART_COUNT=", b"TORCHELASTIC_ERROR_FILE=")
"""The agent sets these for what it starts; it does not have them, or has those of a launcher around it."""

LAUNCHER_NAME = "dtrain-launcher"
"""The name that dtrain's own launcher gives itself. What it forks shows the launcher's environment, not its own."""

MAX_GENERATIONS = 16
"""How many ancestors are searched: shells and wrappers may come between the agent and this process."""


class AgentStart(NamedTuple):
    """What an agent has started.

    Attributes:
        agent: the agent.
        worker: the process that it started: this one, or a wrapper around it. The next restart has another.
    """

    agent: ProcessIdentity
    worker: ProcessIdentity


def find_agent() -> AgentStart | None:
    """Returns the agent above this process; None without one, or if /proc does not show it (a container of its own)."""
    own, pid = _variables("self"), os.getpid()
    for _ in range(MAX_GENERATIONS):
        stat = read_stat(pid)
        parent = int(stat[1]) if stat is not None else 0
        if parent == 0:  # it is in another pid namespace
            return None
        if (own and _variables(str(parent)) != own) or _name(parent) == LAUNCHER_NAME:
            agent, worker = identify(parent), identify(pid)
            return AgentStart(agent, worker) if agent is not None and worker is not None else None
        pid = parent
    return None


def _variables(pid: str) -> frozenset[bytes]:
    """Returns those of `VARIABLES` that a process was started with; none where they may not be read."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return frozenset()
    return frozenset(line for line in lines if line.startswith(VARIABLES))


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""

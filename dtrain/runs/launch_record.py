"""Recognizes a later start of the same job, which a launcher starts again by itself, by a record in the run folder.

Only counts and process ids are compared. Times of files come from the clock of a file server or of another host, and
clocks are set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.config import bounded_json
from dtrain.distributed.launcher_env import TORCHRUN
from dtrain.distributed.process_info import ProcessIdentity
from dtrain.distributed.torchrun_agent import AgentStart, find_agent

LAUNCHES = ".launches"
"""File in the run folder with the record of the start that claimed it."""

MAX_BYTES = 2**24
"""Size from which a file is no record."""


@dataclass(frozen=True)
class LaunchRecord:
    """What started this job, on all nodes.

    Attributes:
        agents: torchrun's agents, one per node. One of them is enough to recognize the job: after a failure rank 0 may be
            on another node.
        worker: what rank 0's agent started. Two commands in one script have one worker; a restart has another.
        counts: how often each launcher that names its jobs has restarted this one, by name. torchrun's is here only
            where no agent is visible; dtrain's counts for all nodes, also after none of the first ones is left.
    """

    agents: tuple[ProcessIdentity, ...] = ()
    worker: ProcessIdentity | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def restarts(self, earlier: LaunchRecord) -> bool:
        """Returns whether this start is a later one of the same job."""
        if not set(self.agents).isdisjoint(earlier.agents):
            return self.worker is None or self.worker != earlier.worker
        return any(count > earlier.counts.get(name, count) for name, count in self.counts.items())

    def to_json(self) -> str:
        """Returns the record as one line of JSON; empty if a later start cannot be recognized."""
        record = {"agents": self.agents, "worker": self.worker, "counts": dict(self.counts)}
        return json.dumps(record) + "\n" if self.agents or self.counts else ""

    @classmethod
    def from_json(cls, text: str) -> LaunchRecord:
        """Reads what `to_json` returned; an empty record if it is something else."""
        try:
            record = bounded_json.loads(text)
            agents = tuple(_process(fields) for fields in record["agents"])
            worker = _process(record["worker"]) if record["worker"] is not None else None
            counts = {str(name): int(count) for name, count in record["counts"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls()
        return cls(agents, worker, counts)


def gather_launch(starts: Sequence[Any], counts: Mapping[str, int]) -> LaunchRecord:
    """Returns the record of this start.

    Args:
        starts: find_agent() of each rank, in rank order, as it comes through JSON.
        counts: see launcher_env.count_launches.
    """
    found = [None if start is None else AgentStart(*map(_process, start)) for start in starts]
    agents = tuple(dict.fromkeys(start.agent for start in found if start is not None))
    named = {name: count for name, count in counts.items() if not agents or not name.startswith(f"{TORCHRUN} ")}
    return LaunchRecord(agents, found[0].worker if found[0] is not None else None, named)


def read_launch(folder: Path) -> LaunchRecord:
    """Returns the record of the start that claimed the folder; an empty one without a record."""
    try:
        with (folder / LAUNCHES).open(encoding="utf-8", errors="replace") as file:
            return LaunchRecord.from_json(file.read(MAX_BYTES))
    except OSError:
        return LaunchRecord()


def is_by_same_agents(exit_record: Mapping[str, Any], folder: Path) -> bool:
    """Returns whether torchrun's agent above this process, or one of the same job, started what wrote an exit.json.

    Args:
        exit_record: content of exit.json.
        folder: the run folder, whose record names the agents of all nodes.
    """
    start = find_agent()
    try:
        writer = _process(exit_record["launcher"])
    except (KeyError, ValueError, TypeError):
        return False
    return start is not None and (start.agent == writer or {start.agent, writer} <= set(read_launch(folder).agents))


def _process(fields: Sequence[Any]) -> ProcessIdentity:
    host, boot, namespace, pid, started = fields
    return ProcessIdentity(str(host), str(boot), int(namespace), int(pid), str(started))

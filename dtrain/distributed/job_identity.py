"""Describes which job a process belongs to, and compares the descriptions of two processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class JobIdentity:
    """What a process knows about the job that it belongs to.

    Attributes:
        job: the launcher's names for the job, by kind of name; empty if it has none.
        restart: how often the job was restarted. The first start is 0.
        is_restart_global: whether `restart` is the same on all nodes; each agent of torchrun counts for itself.
        run: which run the process works on; from the command line, so that a mistake there shows.
    """

    job: Mapping[str, str] = field(default_factory=dict)
    restart: int = 0
    is_restart_global: bool = True
    run: Mapping[str, str] = field(default_factory=dict)

    def is_same_start(self, other: JobIdentity) -> bool:
        """Returns whether both belong to the same start of the same job, by what the launcher has set."""
        return self.job == other.job and (not self._can_compare(other) or self.restart == other.restart)

    def is_older_start(self, other: JobIdentity) -> bool:
        """Returns whether `other` belongs to a later start of the same job."""
        return self.job == other.job and self._can_compare(other) and self.restart < other.restart

    def _can_compare(self, other: JobIdentity) -> bool:
        return self.is_restart_global and other.is_restart_global

    def table_rows(self) -> dict[str, str]:
        """Returns names and values for a table."""
        return {**self.job, **({"restart": str(self.restart)} if self.is_restart_global else {}), **self.run}


@dataclass(frozen=True)
class Arrival:
    """A process that arrived at the rendezvous, as it describes itself.

    Attributes:
        rank: its number among all processes.
        world_size: the number of processes that it expects.
        local_rank: its number among those of its node; None if its launcher does not set it.
        node: equal for all processes of one node.
        host: host name.
        pid: process id there.
        identity: the job that it belongs to.
    """

    rank: int
    world_size: int
    local_rank: int | None
    node: str
    host: str
    pid: int
    identity: JobIdentity

    @classmethod
    def from_json(cls, text: str | bytes) -> Arrival:
        """Reads what `to_json` returned."""
        record = json.loads(text)
        return cls(**{**record, "identity": JobIdentity(**record["identity"])})

    def to_json(self) -> str:
        """Returns the arrival as JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def capitalized(self) -> str:
        """Returns the description with a capital letter, for the start of a sentence."""
        return f"R{str(self)[1:]}"


def difference_table(one: Arrival, other: Arrival) -> str:
    """Returns a table of the differences between two processes; empty if there are none."""
    left, right = ({**arrival.identity.table_rows(), "world size": str(arrival.world_size)} for arrival in (one, other))
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    rows = [(name, left.get(name, "-"), right.get(name, "-")) for name in names]
    if not rows:
        return ""
    table = [("", str(one), str(other)), *rows]
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    return "\n".join(f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in table)

"""Which job a process belongs to, as it says itself; and a table of where two of them disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Identity:
    """What a process knows of the job that it belongs to.

    job: what the launcher calls it, by what that is called; empty where it has no name for it.
    restart: how often it was started again. The first start is 0.
    is_counted_alike: whether `restart` is the same on all nodes; each agent of torchrun counts for itself.
    run: which run it works on; by the command line, so that a mistake there shows.
    """

    job: Mapping[str, str] = field(default_factory=dict)
    restart: int = 0
    is_counted_alike: bool = True
    run: Mapping[str, str] = field(default_factory=dict)

    def is_of_start(self, other: Identity) -> bool:
        """Whether both belong to the same start of the same job, as far as the launcher tells."""
        is_alike = not (self.is_counted_alike and other.is_counted_alike) or self.restart == other.restart
        return self.job == other.job and is_alike

    def is_older_start(self, other: Identity) -> bool:
        """Whether `other` is of a later start of the same job."""
        are_comparable = self.is_counted_alike and other.is_counted_alike
        return self.job == other.job and are_comparable and self.restart < other.restart

    def rows(self) -> dict[str, str]:
        """For a table."""
        return {**self.job, **({"restart": str(self.restart)} if self.is_counted_alike else {}), **self.run}


@dataclass(frozen=True)
class Entry:
    """One process, as it names itself."""

    rank: int
    world_size: int
    local_rank: int | None
    node: str
    host: str
    pid: int
    identity: Identity

    @classmethod
    def from_text(cls, text: str | bytes) -> Entry:
        """What `as_text` gave."""
        record = json.loads(text)
        return cls(**{**record, "identity": Identity(**record["identity"])})

    def as_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def at_start(self) -> str:
        """The same at the start of a sentence."""
        return f"R{str(self)[1:]}"


def difference(one: Entry, other: Entry) -> str:
    """A table of what two processes say of their job, where they disagree; empty where they do not."""
    mine, its = ({**each.identity.rows(), "world size": str(each.world_size)} for each in (one, other))
    rows = [(key, mine.get(key, "-"), its.get(key, "-")) for key in {**mine, **its} if mine.get(key) != its.get(key)]
    if not rows:
        return ""
    table = [("", str(one), str(other)), *rows]
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    return "\n".join(f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in table)

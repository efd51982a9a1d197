"""The context of one rank: its place in the job, and the services that it uses."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtrain.distributed.heartbeat import Heartbeat
from dtrain.distributed.topology import SINGLE, Topology
from dtrain.distributed.traffic import Traffic


@dataclass(frozen=True)
class RankContext:
    """Passed to everything that communicates with other ranks or reports progress.

    Attributes:
        topology: this process's place among the ranks; comparable.
        heartbeat: where this process reports its progress; the watchdog reads it.
        traffic: counts what this process hands to its process group.
    """

    topology: Topology
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False, repr=False)
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """This process's number among all ranks, from 0."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.topology.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reports and writes."""
        return self.topology.is_main

    @property
    def is_node_main(self) -> bool:
        """Whether this is the one rank of its node that does work for the node."""
        return self.topology.is_node_main


ONE_PROCESS = RankContext(SINGLE)
"""One process without a launcher. Everything that uses this constant shares its services."""

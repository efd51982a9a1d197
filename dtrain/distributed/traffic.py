"""Counts what a rank hands to its process group, at the call of each collective.

Collectives that torch starts by itself are counted from knowledge of its code: PowerSGD's three, and DDP's one about
unused parameters. What DDP sends once, when it is built and when it rebuilds its buckets, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Counters of the data that this rank has sent since the process started.

    Attributes:
        collectives: number of collectives that sent something.
        payload_bytes: size of the tensors given to them. A ring sends each byte of an all-reduce 2(N-1)/N times over N
            ranks.
        is_complete: False if the engine uses collectives that are not counted here.
    """

    collectives: int = 0
    payload_bytes: int = 0
    is_complete: bool = True

    def add(self, num_bytes: int, *, collectives: int = 1) -> None:
        """Counts collectives whose tensors have `num_bytes` in total."""
        self.collectives += collectives
        self.payload_bytes += num_bytes

    def copy(self) -> Traffic:
        """Returns a snapshot of the counters."""
        return Traffic(self.collectives, self.payload_bytes, self.is_complete)

    def since(self, before: Traffic) -> Traffic:
        """Returns the traffic since the snapshot `before`."""
        sent = self.collectives - before.collectives, self.payload_bytes - before.payload_bytes
        return Traffic(*sent, self.is_complete)

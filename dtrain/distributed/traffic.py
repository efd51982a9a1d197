"""How much a rank has handed to its process group: counted where a collective is begun.

What torch begins by itself is counted by what its code does: PowerSGD's three collectives, and DDP's one about unused
parameters. Not counted is what DDP sends once, when it is built and when it orders its buckets anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Since this process began, on this rank.

    collectives: that sent something. payload_bytes: of the tensors given to them; a ring sends each byte of an all-reduce
    2(N-1)/N times over N ranks. is_whole: False where an engine sends what nobody counts here.
    """

    collectives: int = 0
    payload_bytes: int = 0
    is_whole: bool = True

    def add(self, num_bytes: int, *, collectives: int = 1) -> None:
        """Notes collectives down that have tensors of so many bytes together."""
        self.collectives += collectives
        self.payload_bytes += num_bytes

    def copy(self) -> Traffic:
        """As it is now."""
        return Traffic(self.collectives, self.payload_bytes, self.is_whole)

    def since(self, before: Traffic) -> Traffic:
        """What came after that copy was made."""
        sent = self.collectives - before.collectives, self.payload_bytes - before.payload_bytes
        return Traffic(*sent, self.is_whole)

"""Many ranks as threads of one process, with the collectives that dtrain's own are made of, and what each rank receives.

For counting what a collective costs in a large world: `run_thread_ranks(function, 256)`. It has no wires and no engine; what
crosses real ones is tested with multirank.run_ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import ReduceOp  # type: ignore[attr-defined]

from dtrain.distributed import collectives
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import Topology

LIMIT_S = 120.0


class ThreadGroup:
    """Stands in for torch.distributed. One collective at a time; every rank is a thread.

    Attributes:
        received: bytes that each rank has got from others.
    """

    ReduceOp = ReduceOp

    def __init__(self, world_size: int) -> None:
        self.received = [0] * world_size
        self.local = threading.local()
        self._size = world_size
        self._meeting = threading.Barrier(world_size, timeout=LIMIT_S)
        self._sent: list[Any] = [None] * world_size
        self._total = torch.empty(0)

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self._size

    def get_backend_config(self) -> str:
        return "cpu:gloo"

    def all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        self._exchange(own, lambda sent: [part.copy_(other) for part, other in zip(parts, sent, strict=True)])
        self._count((self._size - 1) * own.nbytes)

    def gather(self, own: Tensor, parts: list[Tensor] | None, dst: int) -> None:
        self._exchange(own, lambda sent: [part.copy_(other) for part, other in zip(parts or (), sent, strict=False)])
        self._count((self._size - 1) * own.nbytes if parts is not None else 0)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self._exchange(tensor, lambda sent: tensor.copy_(sent[src]))
        self._count(tensor.nbytes if self.local.rank != src else 0)

    def scatter(self, own: Tensor, parts: list[Tensor] | None, src: int) -> None:
        self._exchange(parts, lambda sent: own.copy_(sent[src][self.local.rank]))
        self._count(own.nbytes if self.local.rank != src else 0)

    def all_reduce(self, tensor: Tensor, op: Any = ReduceOp.SUM) -> None:
        self._sent[self.local.rank] = tensor.clone()
        if self._meeting.wait() == 0:
            stacked = torch.stack(self._sent)
            self._total = stacked.amax(0) if op == ReduceOp.MAX else stacked.sum(0)
        self._meeting.wait()
        tensor.copy_(self._total)
        self._meeting.wait()
        self._count(tensor.nbytes)

    def _exchange(self, own: Any, take: Callable[[list[Any]], Any]) -> None:
        self._sent[self.local.rank] = own
        self._meeting.wait()
        take(list(self._sent))
        self._meeting.wait()

    def _count(self, size: int) -> None:
        self.received[self.local.rank] += size


def run_thread_ranks(function: Callable[[RankContext], Any], world_size: int) -> tuple[list[Any], list[int]]:
    """Runs `function` on `world_size` threads; returns its results and the bytes that each rank has received.

    Eight ranks are on each node.
    """
    group = ThreadGroup(world_size)

    def run(rank: int) -> Any:
        group.local.rank = rank
        topology = Topology(rank, world_size, rank % 8, 8, rank // 8, -(-world_size // 8), "env", None, None)
        return function(RankContext(topology))

    before = threading.stack_size(512 * 1024)
    try:
        with patch.object(collectives, "dist", group), ThreadPoolExecutor(world_size) as pool:
            running = [pool.submit(run, rank) for rank in range(world_size)]
            return [each.result(timeout=LIMIT_S) for each in running], group.received
    finally:
        threading.stack_size(before)

"""How gradients cross ranks under DDP: whole, in bf16, or as low-rank factors. Their collectives are counted.

A hook takes one bucket of gradients that sum up to (sum of losses) x world_size / (summed weight), and gives their average.
All ranks get the same bits: they add the same parts in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext

Bucket = Any
"""DDP's: torch.distributed.GradBucket, which torch's stubs do not know."""


class Exchange:
    """Gradients as they are: DDP's own average, counted."""

    bucket_mb: float | None
    """Of DDP's buckets; None: its own choice."""
    warms_up = False
    """Whether a backward pass has to come before the first step, for it decides which gradients share a bucket."""

    def __init__(self, config: Config, context: RankContext) -> None:
        self.bucket_mb = config.engine.bucket_mb
        self._world_size, self._traffic = context.world_size, context.traffic

    def average(self, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
        """Collective. Begins to average a bucket; DDP waits for the result."""
        return self._summed(bucket.buffer().div_(self._world_size))

    def _summed(self, tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        self._traffic.add(tensor.nbytes)
        work: Any = dist.all_reduce(tensor, async_op=True)
        summed: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0])
        return summed

    def forget(self) -> None:
        """The last step was left out: nothing of it may come back in a later one."""

    def begin(self, step: int) -> None:
        """DDP has its buckets: the next step is the first that counts, and has this place in the data."""

    def memory(self) -> dict[str, dict[str, torch.Tensor]]:
        """Collective. What later steps depend on, by parameter, and alike on every rank: beside the optimizer's slots."""
        return {}

    def load_memory(self, name: str, slots: Mapping[str, torch.Tensor]) -> None:
        """Takes what `memory` gave for a parameter, or nothing."""


class Bf16Exchange(Exchange):
    """Half the bytes. Each rank's part is divided in full precision and rounded once, then added up in bf16.

    Torch's bf16_compress_hook rounds before it divides, and so once more where the ranks are no power of two.
    """

    def average(self, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
        whole = bucket.buffer()
        summed = self._summed(whole.div_(self._world_size).to(torch.bfloat16))
        averaged: torch.futures.Future[torch.Tensor] = summed.then(lambda done: whole.copy_(done.value()))
        return averaged

"""DDP communication hooks: send gradients between ranks uncompressed, in bf16, or as low-rank factors (powersgd.py).

A hook takes one bucket of gradients that sum up to (sum of losses) x world_size / (summed weight), and returns their
average. All ranks get the same bits: they add the same parts in the same order. Hooks count their collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dtrain.config.schema import Config
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext

Bucket = Any
"""torch.distributed.GradBucket, which torch's stubs do not know."""


class CommHook:
    """Averages gradients as they are, as DDP does by itself."""

    bucket_mb: float | None
    """Size of DDP's buckets; None for torch's default."""
    needs_warm_up = False
    """Whether a backward pass must come before the first step, because it decides which gradients share a bucket."""
    extra_slots = 0
    """Numbers of error-feedback state per trainable value."""

    def __init__(self, config: Config, context: RankContext) -> None:
        self.bucket_mb = config.engine.bucket_mb
        self.has_sent_all = False
        self._world_size, self._traffic, self._heartbeat = context.world_size, context.traffic, context.heartbeat

    def send(self, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
        """Collective. Starts to average a bucket, and records whether it is the step's last one: DDP sends them in order."""
        self.has_sent_all = bool(bucket.is_last())
        if self.has_sent_all:
            # Every gradient is known: what is left of this backward pass is the wait for the other ranks.
            self._heartbeat.at(Phase.EXCHANGE)
        return self.average(bucket)

    def average(self, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
        """Collective. Starts to average a bucket. DDP waits for the result."""
        return self._all_reduce(bucket.buffer().div_(self._world_size))

    def _all_reduce(self, tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        self._traffic.add(tensor.nbytes)
        work: Any = dist.all_reduce(tensor, async_op=True)

        def summed(done: torch.futures.Future[Any]) -> torch.Tensor:
            done.value()  # raises the error of a collective that failed
            return tensor

        result: torch.futures.Future[torch.Tensor] = work.get_future().then(summed)
        return result

    def reset(self) -> None:
        """Drops the error-feedback state, after a step that was skipped."""

    def begin(self, step: int) -> None:
        """Records that DDP has its final buckets, and the next step of the data (0-based)."""

    def error_feedback(self) -> dict[str, dict[str, torch.Tensor]]:
        """Collective. Returns state for later steps by parameter, equal on every rank, as further optimizer slots."""
        return {}

    def load_error_feedback(self, name: str, slots: Mapping[str, torch.Tensor]) -> None:
        """Restores what `error_feedback` returned for a parameter, if it is among `slots`."""


class Bf16CommHook(CommHook):
    """Sends half the bytes. Each rank's part is divided in full precision and rounded once, then added up in bf16.

    Torch's bf16_compress_hook rounds before it divides, which rounds twice if the number of ranks is no power of two.
    """

    def average(self, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
        gradients = bucket.buffer()
        summed = self._all_reduce(gradients.div_(self._world_size).to(torch.bfloat16))
        averaged: torch.futures.Future[torch.Tensor] = summed.then(lambda done: gradients.copy_(done.value()))
        return averaged

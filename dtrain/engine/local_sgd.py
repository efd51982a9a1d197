"""Steps on each rank's own share of the examples, and weights averaged every so often: train.local_steps.

Local SGD (Stich 2019, arXiv:1805.09767), with moments averaged beside the weights, as local Adam needs in order to
converge (Chen et al. 2020, "Toward communication efficient adaptive gradient method"). So after each average all ranks
hold one and the same state, from which a run can go on anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.protocol import Apart
from dtrain.engine.single import SingleEngine
from dtrain.engine.state import STEP

BUCKET_BYTES = 32 * 2**20
"""Of tensors that are averaged in one collective."""


class LocalEngine(SingleEngine):
    """The single engine on every rank, until the ranks average."""

    name = "ddp"
    local: Apart | None

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        super().__init__(module, optimizer, config, context)
        self.local = _LocalSteps(optimizer, config.train.local_steps, context)
        # All ranks begin with the weights of rank 0, as under DDP.
        weighted_mean([p.data for p in module.parameters()], float(context.is_main), context)


class _LocalSteps:
    def __init__(self, optimizer: torch.optim.Optimizer, every: int, context: RankContext) -> None:
        self.every = every
        self._optimizer, self._context = optimizer, context
        self._own = self._all = 0.0

    def own_norm(self) -> float:
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def took(self, own_weight: float, weight: float) -> None:
        self._own += own_weight
        self._all += weight

    def average(self) -> None:
        share = self._own / self._all if self._all else None
        self._own = self._all = 0.0
        if share is None:
            return  # no rank has moved
        _make_missing_slots(self._optimizer)
        weights: list[torch.Tensor] = []
        counts: list[torch.Tensor] = []
        for parameter in self._parameters():
            weights.append(parameter.data)
            for name, slot in sorted(self._optimizer.state[parameter].items()):
                if torch.is_tensor(slot):
                    (counts if name == STEP else weights).append(slot)
        mean = torch.stack(counts).to(weights[0]) if counts else weights[0].new_empty(0)
        weighted_mean([*weights, mean], share, self._context)
        for count, value in zip(counts, mean.round().unbind(), strict=True):
            count.copy_(value)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def weighted_mean(tensors: list[torch.Tensor], share: float, context: RankContext) -> None:
    """Collective. Replaces each tensor by its mean over ranks, in place; all ranks get the same bits.

    Args:
        share: this rank's; those of all ranks add up to 1. A rank with 0 changes nothing, whatever it holds.
    """
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        if share != 1:  # else as they are, for frozen parameters may be whole numbers
            flat = flat * share if share else torch.zeros_like(flat)
        parts = torch.split(all_reduce_sum(flat, context), [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of tensors of one type, each of at most BUCKET_BYTES, unless one alone is larger."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        fits = size + tensor.nbytes <= BUCKET_BYTES and bucket and bucket[0].dtype == tensor.dtype
        if bucket and not fits:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _make_missing_slots(optimizer: torch.optim.Optimizer) -> None:
    """Slots of zeros for parameters that have none yet, where others may: all ranks must average the same list.

    A rank that had nothing to do so far has none. The optimizer makes them in a step of size 0 on a gradient of 0.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    has_none = all(group.get("momentum") == 0 for group in optimizer.param_groups)  # plain SGD
    if not missing or has_none:
        return
    gradients = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for parameter in missing:
        for slot in optimizer.state[parameter].values():
            if torch.is_tensor(slot):
                slot.zero_()

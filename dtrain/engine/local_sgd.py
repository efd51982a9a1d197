"""Local SGD: each rank steps on its local share of the examples, and the ranks average weights every `train.local_steps` steps.

See Stich 2019, arXiv:1805.09767. Moments are averaged together with the weights, which local Adam needs to
converge (Chen et al. 2020, "Toward communication efficient adaptive gradient method"). After each average all ranks
hold the same state, so a run can resume on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.clipping import total_norm
from dtrain.engine.protocol import EngineTraits, StepResult, StepWeight
from dtrain.engine.single import SingleEngine, replicated_memory
from dtrain.engine.state import STEP

BUCKET_BYTES = 32 * 2**20
"""Size of the tensors that are averaged in one collective."""


class LocalSgdEngine(SingleEngine):
    """The single engine on every rank, until the ranks average."""

    name = "ddp"

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        super().__init__(module, optimizer, config, context)
        self.decides_on_device = False  # each rank has a gradient and a norm of its own
        self.local_sgd = LocalSgd(optimizer, config.train.local_steps, context)
        # All ranks begin with the weights of rank 0, as under DDP.
        weighted_mean([p.data for p in module.parameters()], float(context.is_main), context)

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        every = config.train.local_steps
        return EngineTraits(
            memory=replicated_memory(config),
            other_algorithm=f"weights averaged every {every} steps (train.local_steps)",
            notes=(
                "note: a request to stop (a signal, train.max_minutes) waits for the next average of the weights, up to "
                f"{every} steps",
            ),
        )

    def loss_scale(self, weight: StepWeight) -> float:
        return 1.0 / weight.local if weight.local else 0.0

    def weighted_sq_norm(self, weight: StepWeight) -> float | None:
        if not weight.local:
            return 0.0
        norm = self.local_sgd.local_norm()
        return weight.local * (norm * norm)  # `**` would raise an error where this is infinite, on one rank only

    def step(self, weight: StepWeight, *, weighted_sq_norm: float = 0.0, discard: bool = False) -> StepResult:
        norm = math.sqrt(weighted_sq_norm / weight.total) if weight.total else 0.0
        applied = not discard and math.isfinite(norm)
        super().step(weight, discard=not applied or weight.local == 0)
        if applied:
            self.local_sgd.count(weight)
        return StepResult(norm, applied)

    def synchronize(self, step: int, *, force: bool) -> bool:
        if force or step % self.local_sgd.every == 0:
            with self.context.heartbeat.within(Phase.EXCHANGE):
                self.local_sgd.average()
            return True
        return False


class LocalSgd:
    """Averages weights and moments over the ranks, weighted by the steps since the last average.

    Attributes:
        every: steps between two averages.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, every: int, context: RankContext) -> None:
        self.every = every
        self._optimizer, self._context = optimizer, context
        self._local_weight = self._total_weight = 0.0

    def local_norm(self) -> float:
        """Returns the L2 norm of this rank's gradient, before clipping. Call it between the last backward and the step."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        return float(total_norm(gradients))

    def count(self, weight: StepWeight) -> None:
        """Counts a step that was applied."""
        self._local_weight += weight.local
        self._total_weight += weight.total

    def average(self) -> None:
        """Collective. Replaces weights and moments by their mean over ranks."""
        share = self._local_weight / self._total_weight if self._total_weight else None
        self._local_weight = self._total_weight = 0.0
        if share is None:
            return  # no rank has taken a step
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
        share: this rank's weight in the mean; all ranks' add up to 1. The values of a rank with 0 do not count, even
            if they are not finite.
    """
    for bucket in buckets_of(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        if share != 1:  # frozen parameters may be integers, which must not become floats
            flat = flat * share if share else torch.zeros_like(flat)
        parts = torch.split(all_reduce_sum(flat, context), [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def buckets_of(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yields runs of tensors of one type, each of at most BUCKET_BYTES unless a single tensor is larger."""
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
    """Makes zero slots for parameters that have none yet, because all ranks must average the same list.

    A rank without examples so far has no slots. The optimizer makes them in a step of size 0 on a gradient of 0.
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

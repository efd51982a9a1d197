"""Reads one step ahead, and makes the one small all-reduce of a step.

A step's summed weight over all ranks must be known before its first backward pass (law 4). So each step's all-reduce
carries its own losses and the weight of the step after it, and no step needs a second one.

Where shares are contiguous it carries them for each micro-batch, so that the sums do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from dtrain.data.batches import MicroBatch, StepBatches
from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.protocol import StepWeight
from dtrain.tasks.protocol import Task
from dtrain.training.monitors.protocol import Decision


@dataclass(frozen=True)
class Step:
    """A step that is about to be taken.

    Attributes:
        batches: this rank's micro-batches.
        weight: the summed weight of the step's targets.
        targets: the number of targets on all ranks.
    """

    batches: StepBatches
    weight: StepWeight
    targets: int


@dataclass(frozen=True)
class StepTotals:
    """Totals of the step that was just taken, over all micro-batches and ranks.

    Attributes:
        loss: summed loss in nats; nan where a loss was not finite.
        faults: number of micro-batches whose loss was not finite.
        weighted_sq_norm: sum over ranks of (local weight x squared norm of the local gradient); 0.0 where the engine
            averages gradients in every step.
        lacking: number of ranks that lack some gradient.
    """

    loss: float
    faults: int
    weighted_sq_norm: float
    lacking: int


class LookAhead:
    """Holds the next step, and carries the monitors' requests between ranks.

    Attributes:
        next_step: None at the end of the run.
        wants_stop: returns whether this rank wants the run to stop; the step's own all-reduce carries it.
        requested: request of this rank's monitors; the next all-reduce carries it.
        decision: combined requests of all ranks, as of the last all-reduce.
    """

    def __init__(
        self,
        steps: Generator[StepBatches, None, None],
        task: Task,
        context: RankContext,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            steps: this rank's batches of every remaining step.
            wants_stop: returns whether this rank wants the run to stop with a checkpoint.
        """
        self._steps, self._task, self._context = steps, task, context
        self.wants_stop = wants_stop
        self.next_step: Step | None = None
        self.requested = self.decision = Decision.CONTINUE

    def start(self) -> None:
        """Collective. Reads the first step."""
        self.advance([], weighted_sq_norm=None)

    def close(self) -> None:
        """Ends the data workers, which would otherwise live as long as the run."""
        self._steps.close()
        self.next_step = None

    def advance(
        self, losses: Sequence[float], *, weighted_sq_norm: float | None, lacks_gradients: bool = False
    ) -> StepTotals:
        """Collective. Reads the next step, and adds up the one that was just taken.

        Args:
            losses: loss sums of this rank's counted micro-batches, in nats.
            weighted_sq_norm: as `Engine.weighted_sq_norm` returned it.
            lacks_gradients: as in `Engine`.
        """
        heartbeat = self._context.heartbeat
        heartbeat.at(Phase.DATA)
        taken = self.next_step.batches if self.next_step is not None else None
        batches = next(self._steps, None)
        heartbeat.at(Phase.SUMMING)
        targets = [self._task.targets(batch.tensors) for batch in counted(batches)]
        weights = [target.weight for target in targets]
        local_weight = math.fsum(weights)
        local: list[float] = [
            math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan,
            sum(not math.isfinite(loss) for loss in losses),
            int(self.requested == Decision.STOP),
            int(self.requested == Decision.PREEMPT or self.wants_stop()),
            local_weight,
            sum(target.count for target in targets),
            weighted_sq_norm or 0.0,
            int(lacks_gradients),
        ]
        parts = [by_micro_batch(taken, losses), by_micro_batch(batches, weights)]
        if self._context.world_size > 1:
            # float64 holds the counts exactly. So it does each part: all ranks but one add 0 to it.
            vector = torch.tensor([*local, *parts[0], *parts[1]], dtype=torch.float64)
            summed = all_reduce_sum(vector, self._context).tolist()
            middle, end = len(local), len(local) + len(parts[0])
            local, parts = summed[:middle], [summed[middle:end], summed[end:]]
        loss, faults, stops, preempts, weight, count, sq_norm, lacking = local
        if parts[0] and math.isfinite(loss):
            loss = math.fsum(parts[0])
        if parts[1]:
            weight = math.fsum(parts[1])
        self.next_step = None if batches is None else Step(batches, StepWeight(weight, local_weight), int(count))
        self.decision = resolve_decision(stops=int(stops), preempts=int(preempts))
        return StepTotals(loss, int(faults), sq_norm, int(lacking))


def resolve_decision(*, stops: int, preempts: int) -> Decision:
    """Combines the ranks' requests into one decision.

    Args:
        stops: number of ranks that request a stop.
        preempts: number of ranks that request a stop with a checkpoint.
    """
    if preempts:
        return Decision.PREEMPT
    return Decision.STOP if stops else Decision.CONTINUE


def by_micro_batch(batches: StepBatches | None, values: Sequence[float]) -> list[float]:
    """Returns values of this rank's counted micro-batches at their indices, 0 elsewhere; empty if shares are not contiguous."""
    if batches is None or not batches.shares:
        return []
    value_of = dict(zip((batch.index for batch in counted(batches)), values, strict=True))
    return [value_of.get(index, 0.0) for index in range(len(batches.shares))]


def counted(batches: StepBatches | None) -> list[MicroBatch]:
    """Returns the micro-batches that count; the dummies that lock step adds do not."""
    return [batch for batch in batches.micro_batches if batch.counted] if batches is not None else []

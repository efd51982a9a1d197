"""What a monitor sees of a step, and what it may answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from dtrain.distributed.traffic import Traffic


class Decision(IntEnum):
    """The largest answer of all monitors on all ranks holds."""

    CONTINUE = 0
    STOP = 1
    """End the run in good order: evaluate, export, summary. After this step if it was evaluated, else after the next."""
    ROLLBACK = 2
    """Take weights, moments, loss scale and the number of updates from the newest checkpoint, before the next step.

    The data goes on behind this step, so that what spoiled the weights is not met again. Every rank answers so at the
    same step, since it answers by the record alone.
    """
    PREEMPT = 3
    """Stop where the run stands, with a checkpoint to go on from; after the next step."""


@dataclass
class RunState:
    """What a run is, beside its weights and moments; JSON throughout.

    step: optimizer steps taken, the data position; always advances. updates: those that changed weights, the
    schedule's argument. examples, targets: seen so far. best: the best value of evaluation.best, None before the first.
    best_step: where that was. patience: evaluations since then. thawed: parameter names per thaw so far.
    recent_losses: of the last steps, per target, oldest first, where train.spike needs them.
    """

    step: int = 0
    updates: int = 0
    examples: int = 0
    targets: int = 0
    best: float | None = None
    best_step: int | None = None
    patience: int = 0
    thawed: list[list[str]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """A micro-batch whose loss is not finite. loss: "nan", "inf" or "-inf". examples: indices in the training split."""

    rank: int
    micro_batch: int
    loss: str
    examples: Sequence[int]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fault:
        return cls(**value)


@dataclass
class StepRecord:
    """One step, equal on every rank.

    step: counts from 1. epoch: passes over the data so far. loss: per target, in nats, before the update.
    grad_norm: before clipping. learning_rate: what the step used. examples, targets: of this step, all ranks.
    applied: whether the weights moved. finite: whether loss and gradient were; an fp16 overflow, which the loss scale
    answers, is finite here. faults: where the loss was not. ends_epoch, is_last: of the epoch, of the run.
    metrics: of an evaluation after this step; filled in by the evaluation monitor, read by the monitors below it.
    gradient_norms: of each parameter, before clipping, at the steps that train.log_gradients names.
    averaged: whether all ranks hold the same weights after it; false between two averages of train.local_steps.
    traffic: what this rank sent in it, evaluation and checkpoints apart; None where the engine does not tell. Alike on
    every rank.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    examples: int
    targets: int
    applied: bool
    finite: bool
    faults: Sequence[Fault]
    ends_epoch: bool
    is_last: bool
    metrics: Mapping[str, float] | None = None
    gradient_norms: Mapping[str, float] | None = None
    averaged: bool = True
    traffic: Traffic | None = None


class Log(Protocol):
    """Where monitors write; tracking.Tracker is one."""

    def train(self, **values: Any) -> None:
        """A train line."""
        ...

    def event(self, event: str, **values: Any) -> None:
        """Any other line."""
        ...

    def step(self, examples: int) -> None:
        """A step was taken, whether it gets a line or not."""
        ...


class Monitor(Protocol):
    """Called on every rank after every step, in the order of the list. May be a collective if it always is one."""

    def after_step(self, record: StepRecord) -> Decision:
        """What this monitor wants, seen from this rank; the ranks agree afterwards."""
        ...

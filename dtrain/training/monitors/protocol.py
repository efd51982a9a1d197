"""The interface between the loop and its monitors: the record of a step, and the requests that a monitor may make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dtrain.distributed.traffic import Traffic


class Decision(IntEnum):
    """A request of a monitor. The largest request of all monitors on all ranks takes effect."""

    CONTINUE = 0
    STOP = 1
    """End the run normally: evaluate, export, write the summary. After this step if it was evaluated, else after the next."""
    ROLLBACK = 2
    """Restore weights, moments, loss scale and the number of updates from the newest checkpoint, before the next step.

    Data continues after this step, so the bad batch is not replayed. Every rank requests it at the same step, since it
    must follow from the record alone.
    """
    PREEMPT = 3
    """Stop with a checkpoint to resume from, after the next step."""


@dataclass
class RunState:
    """The state of a run besides its weights and moments. JSON throughout.

    Attributes:
        step: optimizer steps taken, which is the position in the data. It always advances.
        updates: the steps that changed weights; the argument of the schedule.
        examples: number of examples so far.
        targets: number of targets so far.
        best: the best value of evaluation.best; None before the first.
        best_step: the step of `best`.
        patience: evaluations since `best_step`.
        thawed: parameter names of each thaw so far.
        recent_losses: loss per target of the last steps, oldest first; empty unless train.spike is set.
        pending: the record of the last step, if its evaluation has not ended: a later start repeats it.
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
    pending: dict[str, Any] | None = None


@dataclass(frozen=True)
class Fault:
    """A micro-batch whose loss is not finite.

    Attributes:
        rank: the rank that computed it.
        micro_batch: its index in the step.
        loss: "nan", "inf" or "-inf".
        examples: indices in the training split.
    """

    rank: int
    micro_batch: int
    loss: str
    examples: Sequence[int]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fault:
        return cls(**value)


class StepEnd(NamedTuple):
    """What is known of a step before it is taken. The attributes are those of StepRecord."""

    step: int
    epoch: float
    ends_epoch: bool
    is_last: bool


@dataclass
class StepRecord:
    """One step, equal on every rank.

    Attributes:
        step: counts from 1.
        epoch: passes over the data so far.
        loss: per target, in nats, before the update.
        grad_norm: L2 norm of the gradient before clipping.
        learning_rate: the one that the step used.
        examples: number of examples in this step, on all ranks.
        targets: number of targets in this step, on all ranks.
        applied: whether the weights changed.
        finite: whether loss and gradient were finite. An fp16 overflow, which lowers the loss scale, counts as finite.
        faults: the micro-batches whose loss was not finite.
        ends_epoch: whether it is the last step of its epoch.
        is_last: whether it is the last step of the run.
        metrics: results of an evaluation after this step; set by the evaluation monitor, read by the monitors after it.
        gradient_norms: norm of each parameter's gradient before clipping, at the steps of train.log_gradients.
        averaged: whether all ranks hold the same weights after it; False between two averages of train.local_steps.
        traffic: data that a rank sent in this step, without evaluation and checkpoints; None if not counted.
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

    def to_json(self) -> dict[str, Any]:
        """Returns what the monitors from the evaluation on may read."""
        left_out = {"metrics", "gradient_norms", "traffic"}
        return {name: value for name, value in asdict(replace(self, traffic=None)).items() if name not in left_out}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, is_last: bool) -> StepRecord:
        """Builds the record that `to_json` returned.

        Args:
            is_last: whether the run ends with it, which may have changed.
        """
        faults = [Fault.from_json(fault) for fault in value["faults"]]
        return cls(**{**value, "faults": faults, "is_last": is_last})


class Log(Protocol):
    """The log that monitors write to. `Tracker` in runs/tracking.py implements it."""

    def train(self, **values: Any) -> None:
        """Writes a train line."""
        ...

    def event(self, event: str, **values: Any) -> None:
        """Writes a line of another event."""
        ...

    def step(self, examples: int) -> None:
        """Counts a step, also if it gets no line."""
        ...


class Monitor(Protocol):
    """Called on every rank after every step, in the order of the list.

    It may call collectives if it does so at the same steps on every rank.
    """

    def after_step(self, record: StepRecord) -> Decision | None:
        """Returns what this monitor requests on this rank; the ranks agree afterwards. None continues."""
        ...


@runtime_checkable
class LateMonitor(Monitor, Protocol):
    """A monitor that can take a record late: on CUDA, after the next step's micro-batches have run.

    The weights are still those after its own step then. A run with a monitor that is not of this kind reads every step's
    values at once, which costs time on CUDA.
    """

    def needs_at_once(self, end: StepEnd) -> bool:
        """Returns whether this monitor must see the step before the next one begins. Equal on every rank.

        It must where the monitor reads or replaces more than the record, and where it may request a rollback.
        """
        ...

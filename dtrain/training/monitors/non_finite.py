"""Reports a loss or gradient that is not finite. Every rank dropped the step; train.non_finite says whether to stop."""

from __future__ import annotations

from typing import Literal

from dtrain.console import log
from dtrain.errors import NonFiniteError
from dtrain.training.monitors.protocol import Decision, Log, StepEnd, StepRecord


class NonFinite:
    """Writes a `fault` line for each such step, then raises on every rank (stop), or logs a warning (skip)."""

    def __init__(self, policy: Literal["stop", "skip"], tracker: Log) -> None:
        self._policy = policy
        self._tracker = tracker

    def needs_at_once(self, end: StepEnd) -> bool:
        return False

    def after_step(self, record: StepRecord) -> Decision:
        if record.finite:
            return Decision.CONTINUE
        description = describe(record)
        self._tracker.event(
            "fault",
            kind="non_finite",
            step=record.step,
            loss=record.loss,
            grad_norm=record.grad_norm,
            ranks=[fault.rank for fault in record.faults],
            micro_batches=[fault.micro_batch for fault in record.faults],
            example_index=[index for fault in record.faults for index in fault.examples],
        )
        if self._policy == "stop":
            raise NonFiniteError(
                f"{description} The weights are those before this step. Check these examples, lower optim.learning_rate, "
                "or set train.non_finite=skip to drop such steps."
            )
        log.info("warning: %s The step was dropped (train.non_finite=skip).", description)
        return Decision.CONTINUE


def describe(record: StepRecord) -> str:
    """Returns one sentence: step, value, ranks and examples."""
    if not record.faults:
        return f"Step {record.step}: the loss is {record.loss:.4g}, but the gradient norm is {record.grad_norm}."
    places = "; ".join(
        f"rank {fault.rank}, micro-batch {fault.micro_batch}, examples {_some(list(fault.examples))}"
        for fault in record.faults[:4]
    )
    more = f" and {len(record.faults) - 4} more micro-batches" if len(record.faults) > 4 else ""
    return f"Step {record.step}: the loss is {record.faults[0].loss} ({places}{more})."


def _some(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:16]))
    return f"{shown}, ..." if len(indices) > 16 else shown

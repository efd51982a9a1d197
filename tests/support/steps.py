"""Steps of a run that a test makes up, as monitors see them."""

from __future__ import annotations

from typing import Any

from dtrain.training.monitors.protocol import StepRecord

STEPS_PER_EPOCH, TOTAL = 4, 14


def record(step: int, **changes: Any) -> StepRecord:
    """A step of a run of 14 with 4 in an epoch, so that the last epoch is cut short."""
    values: dict[str, Any] = {
        "step": step,
        "epoch": step / STEPS_PER_EPOCH,
        "loss": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "examples": 8,
        "targets": 20,
        "applied": True,
        "finite": True,
        "faults": (),
        "ends_epoch": step % STEPS_PER_EPOCH == 0,
        "is_last": step == TOTAL,
    }
    return StepRecord(**{**values, **changes})

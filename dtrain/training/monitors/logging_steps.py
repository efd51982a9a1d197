"""Writes a train line every k steps, and adds up what the steps sent between ranks."""

from __future__ import annotations

from dtrain.distributed.traffic import Traffic
from dtrain.training.monitors.protocol import Decision, Log, StepEnd, StepRecord


class LogSteps:
    """Logs every `train.log_every` steps, the first and the last one, and every step that was not finite."""

    def __init__(self, every: int, tracker: Log) -> None:
        self._every = every
        self._tracker = tracker
        self._sent, self._steps = Traffic(), 0

    def needs_at_once(self, end: StepEnd) -> bool:
        return end.step % self._every == 0 or end.step == 1 or end.is_last

    def after_step(self, record: StepRecord) -> Decision:
        due = record.step % self._every == 0 or record.step == 1 or record.is_last or not record.finite
        self._tracker.step(record.examples)
        if record.traffic is not None:
            self._sent.add(record.traffic.payload_bytes, collectives=record.traffic.collectives)
            self._steps += 1
        if due:
            self._tracker.train(
                step=record.step,
                epoch=record.epoch,
                loss=record.loss,
                grad_norm=record.grad_norm,
                learning_rate=record.learning_rate,
                examples=record.examples,
                targets=record.targets,
                applied=record.applied,
                **sent(record),
            )
        return Decision.CONTINUE

    def per_step(self) -> dict[str, float]:
        """Returns the average traffic of a step in this start; empty if that is not known."""
        if not self._steps:
            return {}
        return {
            "collectives_per_step": self._sent.collectives / self._steps,
            "payload_bytes_per_step": self._sent.payload_bytes / self._steps,
        }


def sent(record: StepRecord) -> dict[str, int]:
    """Returns the step's collectives, and the bytes that one rank gave to them; empty if that is not known."""
    traffic = record.traffic
    if traffic is None:
        return {}
    return {"collectives": traffic.collectives, "payload_bytes": traffic.payload_bytes}

"""A train line every k steps."""

from __future__ import annotations

from dtrain.monitors.protocol import Decision, Log, StepRecord


class LogSteps:
    """Logs every `train.log_every` steps, the first and the last one, and every step that was not finite."""

    def __init__(self, every: int, tracker: Log) -> None:
        self._every = every
        self._tracker = tracker

    def after_step(self, record: StepRecord) -> Decision:
        due = record.step % self._every == 0 or record.step == 1 or record.is_last or not record.finite
        self._tracker.step(record.examples)
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
            )
        return Decision.CONTINUE

"""Detects a loss far above the ones before it: warns, drops the update, or requests a rollback."""

from __future__ import annotations

import math
from statistics import median

from dtrain.config.schema import Spike
from dtrain.console import log
from dtrain.training.monitors.protocol import Decision, Log, RunState, StepEnd, StepRecord

MIN_LOSSES = 10
"""Minimum number of losses for a median."""


class Spikes:
    """Compares each step's loss with the median of the recent ones, which are part of the run's state.

    A spike counts as a recent loss as well: a loss that stays high becomes the median after half a window.
    """

    def __init__(self, settings: Spike, state: RunState, tracker: Log) -> None:
        self._settings = settings
        self._state = state
        self._tracker = tracker

    @property
    def drops_updates(self) -> bool:
        """Whether `drops` may return true."""
        return self._settings.action == "skip"

    def drops(self, loss: float) -> bool:
        """Returns whether to skip the update of a step. Equal on every rank.

        Args:
            loss: loss of the step per target, in nats.
        """
        return self._settings.action == "skip" and self._is_spike(loss)

    def needs_at_once(self, end: StepEnd) -> bool:
        return self._settings.action != "warn"

    def after_step(self, record: StepRecord) -> Decision:
        if not (record.targets and math.isfinite(record.loss)):
            return Decision.CONTINUE
        is_spike = self._is_spike(record.loss)
        if is_spike:
            self._report(record)
        self._state.recent_losses = [*self._state.recent_losses, record.loss][-self._settings.window :]
        return Decision.ROLLBACK if is_spike and self._settings.action == "rollback" else Decision.CONTINUE

    def _is_spike(self, loss: float) -> bool:
        last = self._state.recent_losses[-self._settings.window :]
        usual = median(last) if len(last) >= MIN_LOSSES else 0.0
        return loss > self._settings.factor * usual > 0

    def _report(self, record: StepRecord) -> None:
        settings, usual = self._settings, median(self._state.recent_losses[-self._settings.window :])
        self._tracker.event(
            "fault",
            kind="spike",
            step=record.step,
            loss=record.loss,
            median=usual,
            factor=settings.factor,
            action=settings.action,
        )
        what = {
            "warn": "Training continues.",
            "skip": "Its update was left out.",
            "rollback": "The run restores its newest checkpoint and continues with the data after this step.",
        }
        log.info(
            "warning: step %d: the loss of %.4g is a spike, more than train.spike.factor=%g times %.4g, the median of the "
            "%d before it. %s",
            record.step,
            record.loss,
            settings.factor,
            usual,
            min(len(self._state.recent_losses), settings.window),
            what[settings.action],
        )

"""Evaluates every k steps or epochs, keeps the best step's model, and stops early."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dtrain.config.schema import Best
from dtrain.console import log
from dtrain.training.monitors.protocol import Decision, RunState, StepEnd, StepRecord


class Evaluate:
    """Evaluates when `train.eval_every` is due, and at the last step. All ranks get the same result."""

    def __init__(
        self,
        every: int | str,
        run: Callable[[int], Mapping[str, float]],
        *,
        save: Callable[[StepRecord], None] = lambda _record: None,
    ) -> None:
        """
        Args:
            every: steps, "epoch", "N epochs" or "never".
            run: collective function that evaluates and logs at a step.
            save: collective function that saves the step first, if that is due.
        """
        self._every = every
        self._run = run
        self._save = save

    def needs_at_once(self, end: StepEnd) -> bool:
        return is_due(self._every, end)

    def after_step(self, record: StepRecord) -> Decision:
        if is_due(self._every, record):
            self._save(record)
            record.metrics = self._run(record.step)
        return Decision.CONTINUE


def is_due(every: int | str, record: StepRecord | StepEnd) -> bool:
    """Returns whether an evaluation, or a checkpoint, is due after this step."""
    if every == "never":
        return False
    if record.is_last:
        return True
    if isinstance(every, int):
        return record.step % every == 0
    epochs = 1 if every == "epoch" else int(every.split()[0])
    return record.ends_epoch and round(record.epoch) % epochs == 0


class KeepBest:
    """Exports the model whenever `evaluation.best` improves, and counts the evaluations since then."""

    def __init__(self, best: Best, state: RunState, export: Callable[[], None]) -> None:
        self._best = best
        self._state = state
        self._export = export

    def needs_at_once(self, end: StepEnd) -> bool:
        return False  # only evaluations count

    def after_step(self, record: StepRecord) -> Decision:
        if record.metrics is not None:
            self.compare(record.step, record.metrics)
        return Decision.CONTINUE

    def compare(self, step: int, metrics: Mapping[str, float]) -> None:
        """Collective. Keeps the model of this step if its evaluation is the best so far."""
        value = metrics[self._best.metric]
        if is_better(value, self._state.best, self._best.mode):
            log.info("best so far: %s %.6g at step %d", self._best.metric, value, step)
            self._export()  # first: a signal may break it off, and then this evaluation has not happened yet
            self._state.best, self._state.best_step, self._state.patience = value, step, 0
        else:
            self._state.patience += 1


def is_better(value: float, best: float | None, mode: str) -> bool:
    """Returns whether a value is strictly better. A value that is not finite never is; the first finite one always is."""
    if not math.isfinite(value):
        return False
    return best is None or (value > best if mode == "max" else value < best)


class EarlyStopping:
    """Stops after `patience` evaluations in a row without an improvement. Comes after KeepBest in the list."""

    def __init__(self, patience: int, state: RunState) -> None:
        self._patience = patience
        self._state = state

    def needs_at_once(self, end: StepEnd) -> bool:
        return False  # only evaluations count

    def after_step(self, record: StepRecord) -> Decision:
        if record.metrics is None or self._state.patience < self._patience:
            return Decision.CONTINUE
        log.info("early stop at step %d: no better result in %d evaluations", record.step, self._patience)
        return Decision.STOP

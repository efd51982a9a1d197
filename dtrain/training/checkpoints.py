"""Saves and reports checkpoints during a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import nn

from dtrain.checkpoint.format import folder_name
from dtrain.checkpoint.saver import Saver, SaveResult, SaverSettings
from dtrain.config.load import to_yaml
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import all_gather_object, on_main
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.optim import slots_per_value
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError
from dtrain.runs.folder import RunFolder, read_run_id
from dtrain.tasks.protocol import Task
from dtrain.training import data_guard
from dtrain.training.export import save_without_weights
from dtrain.training.monitors.evaluations import is_due
from dtrain.training.monitors.protocol import Decision, Log, RunState, StepEnd, StepRecord
from dtrain.training.summary import versions


class CheckpointMonitor:
    """Saves the run when `checkpoint.every` is due, at each new best step, and at its end. Last in the list of monitors.

    A step that is also evaluated is saved before (`save_before_evaluation`), so that nothing is lost in the evaluation.
    Without `checkpoint.every` it saves only when a run is pre-empted, and starts the writer process only then.
    """

    def __init__(
        self,
        config: Config,
        context: RankContext,
        task: Task,
        *,
        state: RunState,
        tracker: Log,
        engine: Callable[[], Engine],
    ) -> None:
        """Collective.

        Args:
            state: state of the run, complete once the monitors before this one have seen a step.
            engine: returns the current engine.
        """
        self._config, self._context = config, context
        self._every = config.checkpoint.every
        self._state, self._tracker, self._engine, self._task = state, tracker, engine, task
        self._saved: int | None = state.step or None
        self._saved_pending = state.pending is not None
        self._failed: str | None = None
        self._saver: Saver | None = None
        if self._every is not None:
            self._saver = self._make(engine().module)
            slots = max(slots_per_value(config.optim), 1) + engine().extra_slots  # at most
            self._saver.prepare(engine(), slots=slots)

    def _make(self, module: nn.Module) -> Saver:
        """Collective."""
        settings = self._config.checkpoint
        run_id: str = on_main(lambda: read_run_id(self._config.run_dir), self._context)

        def static() -> Mapping[str, bytes]:
            with tempfile.TemporaryDirectory(prefix="dtrain-") as place:
                save_without_weights(module, self._task, Path(place))
                return {file.name: file.read_bytes() for file in Path(place).iterdir() if file.is_file()}

        return Saver(
            RunFolder(self._config.run_dir).checkpoints,
            self._context,
            SaverSettings(
                sharded=settings.format == "sharded",
                keep=settings.keep,
                keeps_best=self._config.evaluation.best is not None,
                replicas=settings.replicas,
                max_file_bytes=int(settings.max_file_gb * 1e9),
                asynchronous=settings.asynchronous,
            ),
            static=static,
            config_text=to_yaml(self._config),
            manifest_fields={"versions": versions(), "run": run_id},
            resumed_step=self._saved,
        )

    def needs_at_once(self, end: StepEnd) -> bool:
        return self._every is not None and is_due(self._every, end)

    def after_step(self, record: StepRecord) -> Decision:
        """Collective where a checkpoint is due, which is at the same steps on every rank."""
        self._state.pending = None
        if self._saver is not None and self._every is not None:
            self._report(self._saver.poll())
            is_best = record.metrics is not None and self._state.best_step == record.step
            if is_due(self._every, record) or is_best:
                self.save()
        return Decision.CONTINUE

    def save_before_evaluation(self, record: StepRecord) -> None:
        """Collective. Saves a step, if that is due, with the note that its evaluation is still to come."""
        self._state.pending = record.to_json()
        if self._every is not None and is_due(self._every, record):
            self.save()

    def save_to_stop(self) -> None:
        """Collective. Saves this step, also if it was saved before its evaluation, which has ended since."""
        if self._saved_pending and self._state.pending is None:
            self._saved = None
        self.save()

    @property
    def path(self) -> Path | None:
        """Where the checkpoint of the current step is once it is complete; None if it was not saved."""
        if self._saved != self._state.step:
            return None
        return RunFolder(self._config.run_dir).checkpoints / folder_name(self._saved)

    def save(self) -> None:
        """Collective. Saves this step, unless it is saved already."""
        if self._saved == self._state.step:
            return
        engine, best = self._engine(), self._state.best_step
        state = {
            "run": asdict(self._state),
            "task": self._task.name,
            "rows": {split: len(rows) for split, rows in self._task.splits.items()},
            "data": dict(data_guard.fingerprints(self._task)),
        }
        protected = [best] if best is not None else []
        with self._context.heartbeat.within(Phase.CHECKPOINT):
            if self._saver is None:
                self._saver = self._make(engine.module)
            self._report(self._saver.save(engine, self._state.step, state, protected=protected))
            if not self._config.checkpoint.asynchronous:
                self._report(self._saver.wait())
        self._saved, self._saved_pending = self._state.step, self._state.pending is not None

    def finish(self) -> None:
        """Collective. Waits until the last checkpoint is on every disk; a rank that left earlier would end the others.

        Raises:
            CheckpointError: on every rank; it could not be written.
        """
        failed = self.settle()
        if failed is not None:
            error = CheckpointError(
                f"{failed}. It was the last one of this start: the run will resume from the one before."
            )
            error.is_reported_elsewhere = not self._context.is_main
            raise error

    def settle(self) -> str | None:
        """Collective. Waits until all checkpoints are written; returns why the last one failed, None if it did not."""
        with self._context.heartbeat.within(Phase.CHECKPOINT):
            if self._saver is not None:
                self._report(self._saver.wait())
            failed: str | None = all_gather_object(self._failed, self._context)[0]
        return failed

    def close(self) -> None:
        """Abandons a checkpoint that is not written yet."""
        if self._saver is not None:
            self._saver.close()

    def _report(self, outcome: SaveResult | None) -> None:
        """Logs an outcome. A failed write is a fault but no reason to stop: the checkpoint before it is unchanged."""
        if outcome is None:
            return
        self._failed = outcome.error
        if not self._context.is_main:
            return
        stall = {"stall_began_s": outcome.stall_began_s, "stall_s": outcome.stall_s}
        if outcome.error is None:
            values = {**stall, "seconds": outcome.seconds, "bytes": outcome.bytes}
            self._tracker.event("checkpoint", step=outcome.step, **values)
        if outcome.error is not None:
            log.warning("%s. Training continues; earlier checkpoints are unchanged", outcome.error)
            self._tracker.event("fault", kind="checkpoint", step=outcome.step, message=outcome.error, **stall)
        elif outcome.missing_copy is not None:
            log.warning("%s. A copy of that checkpoint is missing", outcome.missing_copy)
            self._tracker.event("fault", kind="checkpoint", step=outcome.step, message=outcome.missing_copy)

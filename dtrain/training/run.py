"""One training run: builds the model and engine, trains, evaluates, and writes the results, in this order.

The run is the only owner of the engine. The loop (loop.py) reads the engine from the run. A thaw or a rollback replaces it here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dtrain.checkpoint import select
from dtrain.checkpoint.restore import restore_slots, restore_weights
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.order import StepPlan
from dtrain.distributed.collectives import all_gather_object, on_main
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.launcher_process import how_to_go_on
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import StopRequest, deferred, ignore_further
from dtrain.engine import schedules
from dtrain.engine.build import build_engine, engine_name, engine_traits
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError, ConfigError, Preempted
from dtrain.models import freezing
from dtrain.runs.folder import RunFolder
from dtrain.runs.tracking import Tracker
from dtrain.tasks.protocol import Task
from dtrain.training import build, plan, rollback, summary
from dtrain.training.checkpoints import CheckpointMonitor
from dtrain.training.evaluation import EvaluationResult, evaluate
from dtrain.training.export import export_model, processor_or_tokenizer
from dtrain.training.look_ahead import LookAhead
from dtrain.training.loop import LoopSettings, batches_ahead, settle, train
from dtrain.training.metric_selection import Reported, check_best
from dtrain.training.model_card import write_card
from dtrain.training.monitors.evaluations import EarlyStopping, Evaluate, KeepBest
from dtrain.training.monitors.gradients import LogGradients
from dtrain.training.monitors.logging_steps import LogSteps
from dtrain.training.monitors.non_finite import NonFinite
from dtrain.training.monitors.protocol import Decision, Monitor, RunState, StepRecord
from dtrain.training.monitors.replicas import Replicas
from dtrain.training.monitors.spikes import Spikes
from dtrain.training.step_account import StepAccount
from dtrain.training.stopping import RunStopped, StopCondition
from dtrain.training.summary import Result
from dtrain.training.thaw import thaw


@dataclass
class TrainingRun:
    """A run, from its engine to its summary.

    Attributes:
        config: the resolved config.
        context: place and services of this rank.
        task: the task.
        prepared: the model before it is wrapped.
        steps: which examples each step takes.
        reported: which metrics an evaluation reports.
        checkpoint: checkpoint that the run resumes from, if any.
        state: state that a checkpoint saves besides weights and moments.
        began: time.monotonic() at this start's beginning.
        engine: the current engine.
        settings: values that the loop needs and does not change.
        look_ahead: the next step.
        tracker: writes metrics.jsonl.
        checkpoints: saves checkpoints.
        stop: whether the run is to stop before its end.
        last: results of the latest evaluation.
        last_step: step of the latest evaluation; -1 before the first.
        best: the evaluation of the exported best step; None until one was exported in this start.
    """

    config: Config
    context: RankContext
    task: Task
    prepared: build.PreparedModel
    steps: StepPlan
    reported: Reported
    checkpoint: SelectedCheckpoint | None
    state: RunState
    began: float = field(default_factory=time.monotonic)
    engine: Engine = field(init=False)
    settings: LoopSettings = field(init=False)
    look_ahead: LookAhead = field(init=False)
    tracker: Tracker = field(init=False)
    checkpoints: CheckpointMonitor = field(init=False)
    stop: StopCondition = field(init=False)
    last: EvaluationResult | None = None
    last_step: int = -1
    best: EvaluationResult | None = None
    _rollback: rollback.Rollback = field(init=False)
    _keep_best: KeepBest | None = None
    _log_steps: LogSteps | None = None
    _spikes: Spikes | None = None
    _request: StopRequest = field(init=False)

    def describe(self, *, in_full: bool) -> str:
        """Returns the plan of this run as text."""
        return plan.describe(self.config, self.context, self.task, self.prepared, self.steps, in_full=in_full)

    def run(self, extra_monitors: Sequence[Monitor]) -> Result:
        """Collective. Trains to the end and writes everything.

        Raises:
            Preempted: on every rank; the run stopped on request, with a checkpoint.
        """
        config, total = self.config, self._total_steps()
        self._rollback = rollback.Rollback(config, self.context)
        self.tracker = Tracker(
            config.run_dir,
            is_main=self.context.is_main,
            total_steps=total,
            first_step=self.state.step,
            tensorboard=config.tracking.tensorboard,
        )
        with self.tracker:
            self.tracker.event(
                "start",
                command="train",
                world_size=self.context.world_size,
                total_steps=total,
                startup_s=time.monotonic() - self.began,
            )
            self.context.heartbeat.at(Phase.BUILDING)
            self._start_engine()
            if config.train.spike is not None:
                self._spikes = Spikes(config.train.spike, self.state, self.tracker)
            try:
                return self._train(total, extra_monitors)
            finally:
                self.prepared.frozen_cache.close()
                self.checkpoints.close()
                self.tracker.event("end", step=self.state.step, **self._traffic_per_step())

    def begin_epoch(self, epoch: int) -> None:
        """Collective. Unfreezes the parameters that are due, which replaces the engine."""
        thaws = len(self.state.thawed)
        self.context.heartbeat.at(Phase.BUILDING)
        self.engine = thaw(self.engine, epoch, self.config, self.prepared, self.state)
        for names in self.state.thawed[thaws:]:
            log.info("epoch %d: thawed %s", epoch, freezing.summary(names))
            self.tracker.event("thaw", step=self.state.step, epoch=epoch, parameters=names)

    def roll_back(self) -> None:
        """Collective. Restores the newest checkpoint, which replaces the engine; the data position stays."""
        begin = time.monotonic()
        self.checkpoints.settle()
        chosen = self._rollback.choose(self.state.step)
        if chosen is None:
            return
        if self.checkpoints.path is not None:  # saved before the monitor that rolls back
            select.rename_newer(RunFolder(self.config.run_dir).checkpoints, chosen.step, self.context)
        self._load(chosen)
        self.state.updates = int(chosen.state["run"]["updates"])
        seconds = time.monotonic() - begin
        self.tracker.event("rollback", step=self.state.step, to_step=chosen.step, seconds=seconds)
        log.info("step %d: restored weights and moments of step %d", self.state.step, chosen.step)

    def _total_steps(self) -> int:
        """Returns the step at which this run ends; the current one if it stopped early before.

        Raises:
            ConfigError: the run is beyond its end already.
        """
        patience, step = self.config.train.early_stopping, self.state.step
        total = build.total_steps(self.config, self.steps)
        if patience is not None and self.state.patience >= patience:
            log.info("already stopped early at step %d: no better result in %d evaluations", step, self.state.patience)
            return step
        if step > total:
            raise ConfigError(
                f"The run is already at step {step}, but ends at step {total} (train.max_steps, train.epochs). Raise that, "
                "go back to an earlier checkpoint by checkpoint.resume=PATH, or choose another run.name."
            )
        return total

    def _start_engine(self) -> None:
        """Collective. Builds the engine in the state of the checkpoint, and the saver of the next checkpoints."""
        self.engine = build_engine(self.prepared.module, self.config, self.context, thawed=self.state.thawed)
        if self.checkpoint is not None:
            restore_slots(self.engine, self.checkpoint, self.context)
            self.tracker.event("resume", step=self.state.step, world_size=self.context.world_size)
        self.prepared.frozen_cache.open(self.engine)
        self.checkpoints = CheckpointMonitor(
            self.config,
            self.context,
            self.task,
            state=self.state,
            tracker=self.tracker,
            engine=lambda: self.engine,
        )

    def _train(self, total: int, extra_monitors: Sequence[Monitor]) -> Result:
        """Collective. Runs the loop, then finishes the run. A signal ends it at the next point where nothing is lost."""
        with deferred() as self._request:
            self.stop = StopCondition(self._request, self.config.train.max_minutes, began=self.began)
            try:
                decision = self._take_steps(total, extra_monitors)
                if decision == Decision.PREEMPT and self.state.step < total:
                    raise RunStopped
                return self._finish()
            except RunStopped:
                self._stop()

    def _take_steps(self, total: int, extra_monitors: Sequence[Monitor]) -> Decision:
        """Collective. Runs the loop, after the evaluation that an earlier start owes; returns why it ended."""
        before, after = self._monitors(extra_monitors)
        self.settings = self._loop_settings(total)
        if self.state.pending is not None:
            record = StepRecord.from_json(self.state.pending, is_last=self.state.step == total)
            decision = settle(self, record, after)
            if decision != Decision.CONTINUE:
                return decision
        account = StepAccount(self.config, self.context, self.task, self.prepared, self.tracker, lambda: self.engine)
        steps = account.watch(batches_ahead(self.settings, self.task, self.engine, start=self.state.step))
        self.look_ahead = LookAhead(steps, self.task, self.context, self.stop.is_wanted)
        try:
            with account.measured():
                return train(self, [*before, *account.monitors, *after])
        finally:
            self.look_ahead.close()

    def _loop_settings(self, total: int) -> LoopSettings:
        config = self.config
        return LoopSettings(
            plan=self.steps,
            total_steps=total,
            seed=config.run.seed,
            workers=config.data.workers,
            loss_is_scaled=config.engine.precision == "fp16",
            learning_rate=schedules.learning_rate(config.optim, config.schedule, total_steps=total),
            train_mode=self.prepared.train_mode,
            log_gradients=config.train.log_gradients,
            drops=self._spikes.drops if self._spikes is not None and self._spikes.drops_updates else None,
        )

    def _monitors(self, extra: Sequence[Monitor]) -> tuple[list[Monitor], list[Monitor]]:
        """Returns the monitors, in the order in which they are called: those before the evaluation, and from it on."""
        train, best = self.config.train, self.config.evaluation.best
        self._log_steps = LogSteps(train.log_every, self.tracker)
        before: list[Monitor] = [
            self._log_steps,
            LogGradients(self.tracker.gradients),
            NonFinite(train.non_finite, self.tracker),
        ]
        if self._spikes is not None:
            before.append(self._spikes)
        if train.check_replicas is not None:
            before.append(Replicas(train.check_replicas, lambda: self.engine.module, self.context, self.tracker))
        after: list[Monitor] = [
            Evaluate(train.eval_every, self._evaluate, save=self.checkpoints.save_before_evaluation)
        ]
        if best is not None:
            self._keep_best = KeepBest(best, self.state, self._export_best)
            after.append(self._keep_best)
        if train.early_stopping is not None:
            after.append(EarlyStopping(train.early_stopping, self.state))
        return before, [*after, *extra, self.checkpoints]

    def _stop(self) -> NoReturn:
        """Collective. Saves a checkpoint, from which a later start continues the run."""
        reasons = all_gather_object(self.stop.why, self.context)
        cause = next((reason for reason in reasons if reason is not None), "stop requested by a monitor")
        self.checkpoints.save_to_stop()
        self.checkpoints.finish()
        self.tracker.event("preempt", step=self.state.step, cause=cause)
        raise Preempted(self._stop_message(cause))

    def _stop_message(self, cause: str) -> str:
        differs = self.config.run.overwrite or self.config.checkpoint.resume != "auto"
        changes = ["run.overwrite=false", "checkpoint.resume=auto"] if differs else []
        how = how_to_go_on(self.context.topology, changes)
        return f"Stopped after step {self.state.step}: {cause}. The checkpoint is saved. {how}"

    @contextmanager
    def _may_be_broken_off(self) -> Iterator[None]:
        """Lets a signal end this process inside the block, once the step's checkpoint is on disk, if it does not react."""

        def reason() -> str | None:
            path = self.checkpoints.path
            return self._stop_message(str(self.stop.why)) if path is not None and path.is_dir() else None

        self._request.saved = reason
        try:
            yield
        finally:
            self._request.saved = lambda: None

    def _traffic_per_step(self) -> dict[str, float]:
        """Returns the traffic of a step between ranks."""
        return self._log_steps.per_step() if self._log_steps is not None else {}

    def _evaluate(self, step: int) -> dict[str, float]:
        """Collective. Evaluates every split but train, and logs the result."""
        begin = time.monotonic()
        with self._may_be_broken_off():
            self.last = evaluate(
                self.engine,
                self.task,
                micro_batch_size=self.config.evaluation.micro_batch_size,
                micro_batch_tokens=self.config.evaluation.micro_batch_tokens,
                workers=self.config.data.workers,
                reported=self.reported,
                stop=self.stop,
            )
        check_best(self.config, list(self.last.metrics))
        self.last_step = step
        if self.last.metrics:
            self.tracker.evaluation(step, self.last.metrics, time.monotonic() - begin)
        return self.last.metrics

    def _export(self) -> None:
        """Collective. Writes the current model as the run's model."""
        with self._may_be_broken_off():
            export_model(self.engine, processor_or_tokenizer(self.task), self.config.run_dir / "model", self.stop)

    def _export_best(self) -> None:
        """Collective. Writes the model of this step as the run's model, and keeps its evaluation as `best`."""
        self.best, begin = self.last, time.monotonic()
        with self.context.heartbeat.within(Phase.EXPORT):
            self._export()
        self.tracker.event("export", step=self.last_step, seconds=time.monotonic() - begin)

    def _load(self, chosen: SelectedCheckpoint) -> None:
        """Collective. Loads a checkpoint into a running engine, by rebuilding the engine around its module."""
        with self.context.heartbeat.within(Phase.LOADING):
            module = self.engine.release()
            restore_weights(module, chosen, self.context)
            self.engine = build_engine(module, self.config, self.context, thawed=self.state.thawed)
            restore_slots(self.engine, chosen, self.context)

    def _finish(self) -> Result:
        """Collective. Writes the model, its predictions and the summary; uses the best step if there is one."""
        config = self.config
        self.context.heartbeat.at(Phase.EXPORT)
        if config.checkpoint.every is not None:
            self.checkpoints.save()  # the run may have stopped early, between two checkpoints
        if self.last_step != self.state.step and config.train.eval_every != "never":
            metrics = self._evaluate(self.state.step)
            if self._keep_best is not None and self.state.best_step != self.state.step:
                # The run stopped between two evaluations, and this may be the best step.
                self._keep_best.compare(self.state.step, metrics)
        if config.evaluation.best is not None and self.best is None and self.state.best_step is not None:
            self._restore_best(self.state.best_step)
        has_best = config.evaluation.best is not None and self.best is not None
        final = self.best if has_best else self.last
        if not has_best:
            try:
                self._export()
            except CheckpointError:
                self.checkpoints.finish()  # the next start exports from it
                raise
        content = self._summary(final)
        self.checkpoints.finish()

        def write() -> None:
            write_card(config.run_dir / "model", config, content, task=self.task.name)
            summary.write(config.run_dir, content, final)

        on_main(write, self.context)
        ignore_further()  # nothing is left to stop
        log.info("done: %s", json.dumps(content["eval"]) if content["eval"] else f"{self.state.step} steps")
        log.info("model and summary: %s", config.run_dir)
        warning = plan.warn_without_update(config, step=self.state.step, updates=self.state.updates)
        if warning is not None and self.context.is_main:
            log.warning("%s", warning)
        return Result(dict(content["eval"]), config.run_dir)

    def _summary(self, final: EvaluationResult | None) -> dict[str, Any]:
        config, context = self.config, self.context
        name, _ = engine_name(config, context)
        return {
            **summary.summary("train", final, context, engine=name, seconds=self.tracker.seconds),
            "step": self.state.step,
            "updates": self.state.updates,
            "examples": self.state.examples,
            "best_step": self.state.best_step,
            **self._traffic_per_step(),
            "exactness": plan.exactness(config, engine_traits(config, context)),
            "task": self.task.name,
            "rows": {split: len(rows) for split, rows in self.task.splits.items()},
        }

    def _restore_best(self, step: int) -> None:
        """Collective. Restores the best step's model and results from its checkpoint, which an earlier start wrote."""
        chosen = rollback.find_best(step, self.config, self.context)
        if chosen is None:
            self.state.best_step = self.last_step
        else:
            self.checkpoints.save_to_stop()  # from here on the engine holds another step, which must not be saved as this one
            self._load(chosen)
            self._evaluate(step)
        self._export_best()

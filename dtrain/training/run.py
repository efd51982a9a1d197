"""One training run: builds the model and engine, trains, evaluates, and writes the results, in this order.

The run is the only owner of the engine. The loop (loop.py) reads the engine from the run. A thaw or a rollback replaces it here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from dtrain.checkpoint.restore import restore_slots, restore_weights
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.order import StepPlan
from dtrain.distributed.collectives import all_gather_object, on_main
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.engine import optim
from dtrain.engine.build import build_engine, engine_name, engine_traits
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError, ConfigError, Preempted
from dtrain.models import freezing
from dtrain.runs.tracking import Tracker
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Task
from dtrain.tasks.router_loss import with_router_loss
from dtrain.training import build, data_guard, plan, rollback, summary
from dtrain.training.checkpoints import CheckpointMonitor, StopOnRequest, deferring
from dtrain.training.evaluation import EvaluationResult, evaluate, metric_names
from dtrain.training.export import check_reload, export_model, processor_or_tokenizer
from dtrain.training.look_ahead import LookAhead
from dtrain.training.loop import LoopSettings, batches_ahead, train
from dtrain.training.metric_selection import Reported, reported
from dtrain.training.model_card import write_card
from dtrain.training.monitors.evaluations import EarlyStopping, Evaluate, KeepBest
from dtrain.training.monitors.gradients import LogGradients
from dtrain.training.monitors.logging_steps import LogSteps
from dtrain.training.monitors.non_finite import NonFinite
from dtrain.training.monitors.protocol import Decision, Monitor, RunState
from dtrain.training.monitors.replicas import Replicas
from dtrain.training.monitors.spikes import Spikes
from dtrain.training.summary import Result
from dtrain.training.thaw import thaw


def prepare_run(
    config: Config,
    context: RankContext,
    model: nn.Module | None,
    task: Task | None,
    checkpoint: SelectedCheckpoint | None,
) -> TrainingRun:
    """Collective. Prepares the data, loads and freezes the model, and restores its weights; builds no engine yet.

    Args:
        model: model to train instead of the one that the config's model section names.
        task: task to use instead of the one that the task and data sections name.
        checkpoint: checkpoint to resume from; None starts from the beginning.
    """
    context.heartbeat.at(Phase.PREPARING)
    task = task or build_task(config, context)
    metrics = reported(config.evaluation, task, folder=config.folder)
    names = metric_names(task, metrics)
    # The names of the user's own metrics are not known before the first evaluation.
    if metrics.user is None or not names:
        _check_best(config, names)
    steps = build.step_plan(config, task)
    context.heartbeat.at(Phase.LOADING)
    module = build.load(config, task, context) if model is None else build.place_and_try(model, config, task, context)
    task = with_router_loss(task, module)
    on_main(lambda: check_reload(module, task, config), context)
    state = RunState()
    if checkpoint is not None:
        state = RunState(**checkpoint.state["run"])
        data_guard.check(task, checkpoint, config)
        rollback.forget_lost_best(state, checkpoint, config, context)
        restore_weights(module, checkpoint, context)
    # A thaw that is due exactly at the step of the checkpoint has not happened yet.
    epoch = steps.epoch_of(max(state.step - 1, 0))
    prepared = build.prepare_training(module, config, task, steps, epoch=epoch)
    return TrainingRun(config, context, task, prepared, steps, metrics, checkpoint, state)


def _check_best(config: Config, names: Sequence[str]) -> None:
    """Refuses an `evaluation.best.metric` that no evaluation of this run will have."""
    best = config.evaluation.best
    if best is not None and best.metric not in names:
        known = (
            f"This task has {', '.join(names)}"
            if names
            else "There is nothing to evaluate: set data.validation_fraction or data.splits"
        )
        raise ConfigError(f"evaluation.best.metric={best.metric} is not a metric of this run. {known}.")


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
    last: EvaluationResult | None = None
    last_step: int = -1
    best: EvaluationResult | None = None
    _rollback: rollback.Rollback = field(init=False)
    _keep_best: KeepBest | None = None
    _log_steps: LogSteps | None = None
    _spikes: Spikes | None = None

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
        self.checkpoints = CheckpointMonitor(
            self.config,
            self.context,
            self.task,
            state=self.state,
            tracker=self.tracker,
            engine=lambda: self.engine,
        )

    def _train(self, total: int, extra_monitors: Sequence[Monitor]) -> Result:
        """Collective. Runs the loop, then finishes the run."""
        with deferring(self.config) as stop_request:
            request = StopOnRequest(stop_request, self.config.train.max_minutes, began=self.began)
            monitors = [*self._monitors(extra_monitors), request, self.checkpoints]
            self.settings = self._loop_settings(total)
            steps = batches_ahead(self.settings, self.task, self.engine, start=self.state.step)
            self.look_ahead = LookAhead(steps, self.task, self.context)
            try:
                decision = train(self, monitors)
            finally:
                self.look_ahead.close()
            if decision == Decision.PREEMPT and self.state.step < total:
                self._stop(request.why)
        return self._finish()

    def _loop_settings(self, total: int) -> LoopSettings:
        config = self.config
        return LoopSettings(
            plan=self.steps,
            total_steps=total,
            seed=config.run.seed,
            workers=config.data.workers,
            loss_is_scaled=config.engine.precision == "fp16",
            learning_rate=optim.learning_rate(config.optim, config.schedule, total_steps=total),
            train_mode=self.prepared.train_mode,
            log_gradients=config.train.log_gradients,
            drops=self._spikes.drops if self._spikes is not None else None,
        )

    def _monitors(self, extra: Sequence[Monitor]) -> list[Monitor]:
        """Returns the monitors, in the order in which they are called."""
        train, best = self.config.train, self.config.evaluation.best
        self._log_steps = LogSteps(train.log_every, self.tracker)
        monitors: list[Monitor] = [
            self._log_steps,
            LogGradients(self.tracker.gradients),
            NonFinite(train.non_finite, self.tracker),
        ]
        if self._spikes is not None:
            monitors.append(self._spikes)
        if train.check_replicas is not None:
            monitors.append(Replicas(train.check_replicas, lambda: self.engine.module, self.context, self.tracker))
        monitors.append(Evaluate(train.eval_every, self._evaluate))
        if best is not None:
            self._keep_best = KeepBest(best, self.state, self._export_best)
            monitors.append(self._keep_best)
        if train.early_stopping is not None:
            monitors.append(EarlyStopping(train.early_stopping, self.state))
        return [*monitors, *extra]

    def _stop(self, why: str | None) -> NoReturn:
        """Collective. Saves a checkpoint, from which a later start continues the run."""
        reasons = all_gather_object(why, self.context)
        cause = next((reason for reason in reasons if reason is not None), "stop requested by a monitor")
        self.checkpoints.save()
        self.checkpoints.finish()
        self.tracker.event("preempt", step=self.state.step, cause=cause)
        how = "the same command resumes from it"
        if self.config.run.overwrite or self.config.checkpoint.resume != "auto":
            how = "the same command with run.overwrite=false checkpoint.resume=auto resumes from it"
        raise Preempted(f"Stopped after step {self.state.step}: {cause}. The checkpoint is saved; {how}.")

    def _traffic_per_step(self) -> dict[str, float]:
        """Returns the traffic of a step between ranks."""
        return self._log_steps.per_step() if self._log_steps is not None else {}

    def _evaluate(self, step: int) -> dict[str, float]:
        """Collective. Evaluates every split but train, and logs the result."""
        begin = time.monotonic()
        self.last = evaluate(
            self.engine,
            self.task,
            micro_batch_size=self.config.evaluation.micro_batch_size,
            workers=self.config.data.workers,
            reported=self.reported,
        )
        _check_best(self.config, list(self.last.metrics))
        self.last_step = step
        if self.last.metrics:
            self.tracker.evaluation(step, self.last.metrics, time.monotonic() - begin)
        return self.last.metrics

    def _export(self) -> None:
        """Collective. Writes the current model as the run's model."""
        export_model(self.engine, processor_or_tokenizer(self.task), self.config.run_dir / "model")

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
        if self.last_step != self.state.step and config.train.eval_every != "never":
            metrics = self._evaluate(self.state.step)
            if self._keep_best is not None and self.state.best_step != self.state.step:
                self._keep_best.compare(self.state.step, metrics)  # it stopped between two evaluations
        if config.checkpoint.every is not None:  # the run may have stopped early, between two checkpoints
            self.checkpoints.save()
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
            self._load(chosen)
            self._evaluate(step)
        self._export_best()

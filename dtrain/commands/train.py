"""The train command: everything in the order in which it is built, run and written down."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

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
from dtrain.engine.build import build_engine, engine_name
from dtrain.engine.protocol import Engine
from dtrain.errors import ConfigError, Preempted
from dtrain.models import freezing
from dtrain.runs.tracking import Tracker
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Task
from dtrain.training import build, data_guard, plan, run_claim
from dtrain.training import rollback as going_back
from dtrain.training import summary as results
from dtrain.training.checkpoints import Checkpoints, StopOnRequest, deferring
from dtrain.training.evaluation import EvaluationResult, evaluate, metric_names
from dtrain.training.export import beside, export_model
from dtrain.training.loop import Loop, train
from dtrain.training.metric_selection import Reported, reported
from dtrain.training.model_card import write_card
from dtrain.training.monitors.evaluations import EarlyStopping, Evaluate, KeepBest
from dtrain.training.monitors.gradients import LogGradients
from dtrain.training.monitors.logging_steps import LogSteps
from dtrain.training.monitors.non_finite import NonFinite
from dtrain.training.monitors.protocol import Decision, Monitor, RunState
from dtrain.training.monitors.replicas import Replicas
from dtrain.training.monitors.spikes import Spikes
from dtrain.training.rollback import Rollback
from dtrain.training.summary import Result
from dtrain.training.thaw import thaw


def run_train(
    config: Config,
    context: RankContext,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    monitors: Sequence[Monitor] = (),
    began: float | None = None,
) -> Result:
    """Collective. Trains, evaluates, exports; gives the old result where the run was finished already.

    Args:
        model: to train instead of what the config's model section says.
        task: instead of what the task and data sections say.
        monitors: further ones, below dtrain's own.
        began: time.monotonic() at this start's beginning, imports included; default: now.
    """
    began = time.monotonic() if began is None else began
    engine_name(config, context)  # refuses a wrong combination before any work
    with run_claim.taken(config, context, command="train") as taken:
        if taken.action == "already_finished":
            return _old_result(config, context)
        run = _prepare(config, context, model, task, taken.checkpoint)
        run.began = began
        log.info("%s", plan.describe(config, context, run.task, run.prepared, run.steps, in_full=False))
        return run.go(monitors)


def run_dry(config: Config, context: RankContext) -> None:
    """Collective. Says what `run_train` would do; makes no folder and takes no step."""
    engine_name(config, context)
    run = _prepare(config, context, None, None, None)
    log.info("%s", plan.describe(config, context, run.task, run.prepared, run.steps, in_full=True))


def _check_best(config: Config, names: Sequence[str]) -> None:
    """Refuses to wait for a metric that will not come."""
    best = config.evaluation.best
    if best is not None and best.metric not in names:
        known = (
            f"This task has {', '.join(names)}"
            if names
            else "There is nothing to evaluate: set data.validation_fraction or data.splits"
        )
        raise ConfigError(f"evaluation.best.metric={best.metric} is not a metric of this run. {known}.")


def _old_result(config: Config, context: RankContext) -> Result:
    """Collective. What the finished run in the folder ended with."""
    metrics = on_main(lambda: results.read(config.run_dir)["eval"], context)
    return Result(dict(metrics), config.run_dir)


def _prepare(
    config: Config,
    context: RankContext,
    model: nn.Module | None,
    task: Task | None,
    checkpoint: SelectedCheckpoint | None,
) -> TrainingRun:
    context.heartbeat.at(Phase.PREPARING)
    task = task or build_task(config, context)
    metrics = reported(config.evaluation, task, folder=config.folder)
    names = metric_names(task, metrics)
    if metrics.own is None or not names:  # the names of the user's own are known after the first evaluation only
        _check_best(config, names)
    steps = build.step_plan(config, task)
    context.heartbeat.at(Phase.LOADING)
    module = build.place(model, config, context) if model is not None else build.load(config, task, context)
    state = RunState()
    if checkpoint is not None:
        state = RunState(**checkpoint.state["run"])
        data_guard.check(task, checkpoint, config)
        going_back.forget_lost_best(state, checkpoint, config, context)
        restore_weights(module, checkpoint, context)
    # A thaw that is due at this very step is yet to come, as it was then.
    epoch = steps.epoch_of(max(state.step - 1, 0))
    prepared = build.prepare_training(module, config, task, steps, epoch=epoch)
    return TrainingRun(config, context, task, prepared, steps, metrics, checkpoint, state)


@dataclass
class TrainingRun:
    """One run from engine to summary. checkpoint: what it goes on from. The fields below that change as it goes."""

    config: Config
    context: RankContext
    task: Task
    prepared: build.Construction
    steps: StepPlan
    reported: Reported
    checkpoint: SelectedCheckpoint | None
    state: RunState
    last: EvaluationResult | None = None
    last_step: int = -1
    best: EvaluationResult | None = None
    keeper: KeepBest | None = None
    steps_log: LogSteps | None = None
    spikes: Spikes | None = None
    rollback: Rollback = field(init=False)
    began: float = field(default_factory=time.monotonic)
    engine: Engine = field(init=False)
    tracker: Tracker = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def go(self, own_monitors: Sequence[Monitor]) -> Result:
        """Collective. Trains to the end and writes everything down.

        Raises:
            Preempted: on every rank; asked to stop, and stopped with a checkpoint.
        """
        config, total = self.config, self._total_steps()
        self.rollback = Rollback(config, self.context)
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
                self.spikes = Spikes(config.train.spike, self.state, self.tracker)
            try:
                return self._train(total, own_monitors)
            finally:
                self.checkpoints.close()
                self.tracker.event("end", step=self.state.step, **self._per_step())

    def _start_engine(self) -> None:
        """Collective. The engine, where a checkpoint left it; and what saves the next ones."""
        self.engine = build_engine(self.prepared.module, self.config, self.context, thawed=self.state.thawed)
        if self.checkpoint is not None:
            restore_slots(self.engine, self.checkpoint, self.context)
            self.tracker.event("resume", step=self.state.step, world_size=self.context.world_size)
        self.checkpoints = Checkpoints(
            self.config,
            self.context,
            self.engine.module,
            self.task,
            state=self.state,
            tracker=self.tracker,
            engine=lambda: self.engine,
        )

    def _train(self, total: int, own_monitors: Sequence[Monitor]) -> Result:
        with deferring(self.config) as asked:
            request = StopOnRequest(asked, self.config.train.max_minutes, began=self.began)
            monitors = [*self._monitors(own_monitors), request, self.checkpoints]
            self.engine, decision = train(self._loop(total), self.engine, self.task, monitors, self.state)
            if decision == Decision.PREEMPT and self.state.step < total:
                self._stop(request.why)
        return self._finish()

    def _stop(self, why: str | None) -> NoReturn:
        """Collective. Saves, and leaves the rest to another start."""
        told = next((word for word in all_gather_object(why, self.context) if word is not None), "a monitor asked to")
        self.checkpoints.save()
        self.checkpoints.finish()
        self.tracker.event("preempt", step=self.state.step, cause=told)
        how = "the same command goes on from it"
        if self.config.run.overwrite or self.config.checkpoint.resume != "auto":
            how = "the same command with run.overwrite=false checkpoint.resume=auto goes on from it"
        raise Preempted(f"Stopped after step {self.state.step}: {told}. The checkpoint is saved; {how}.")

    def _per_step(self) -> dict[str, float]:
        """What a step sent between ranks."""
        return self.steps_log.per_step() if self.steps_log is not None else {}

    def _total_steps(self) -> int:
        """Where this run ends; where it is, if it had stopped early before.

        Raises:
            ConfigError: it is further than it should go.
        """
        patience, at, total = (
            self.config.train.early_stopping,
            self.state.step,
            build.total_steps(self.config, self.steps),
        )
        if patience is not None and self.state.patience >= patience:
            log.info("stopped early already, at step %d: no better result in %d evaluations", at, self.state.patience)
            return at
        if at > total:
            raise ConfigError(
                f"The run is at step {at} already, and is to end at step {total} (train.max_steps, train.epochs). Raise that, "
                "go back to an earlier checkpoint by checkpoint.resume=PATH, or choose another run.name."
            )
        return total

    def _loop(self, total: int) -> Loop:
        config = self.config
        return Loop(
            plan=self.steps,
            total_steps=total,
            seed=config.run.seed,
            workers=config.data.workers,
            loss_is_scaled=config.engine.precision == "fp16",
            learning_rate=optim.learning_rate(config.optim, config.schedule, total_steps=total),
            train_mode=self.prepared.train_mode,
            before_epoch=self._before_epoch,
            log_gradients=config.train.log_gradients,
            roll_back=self._roll_back,
            drops=self.spikes.drops if self.spikes is not None else None,
        )

    def _monitors(self, own: Sequence[Monitor]) -> list[Monitor]:
        """What looks at every step, in this order."""
        train, best = self.config.train, self.config.evaluation.best
        self.steps_log = LogSteps(train.log_every, self.tracker)
        found: list[Monitor] = [
            self.steps_log,
            LogGradients(self.tracker.gradients),
            NonFinite(train.non_finite, self.tracker),
        ]
        if self.spikes is not None:
            found.append(self.spikes)
        if train.check_replicas is not None:
            found.append(Replicas(train.check_replicas, lambda: self.engine.module, self.context, self.tracker))
        found.append(Evaluate(train.eval_every, self._evaluate))
        if best is not None:
            self.keeper = KeepBest(best, self.state, self._keep_best)
            found.append(self.keeper)
        if train.early_stopping is not None:
            found.append(EarlyStopping(train.early_stopping, self.state))
        return [*found, *own]

    def _evaluate(self, step: int) -> dict[str, float]:
        """Collective. Evaluates every split but train and logs it."""
        begin = time.monotonic()
        evaluation = self.config.evaluation
        self.last = evaluate(
            self.engine,
            self.task,
            micro_batch_size=evaluation.micro_batch_size,
            workers=self.config.data.workers,
            reported=self.reported,
        )
        _check_best(self.config, list(self.last.metrics))
        self.last_step = step
        if self.last.metrics:
            self.tracker.evaluation(step, self.last.metrics, time.monotonic() - begin)
        return self.last.metrics

    def _keep_best(self) -> None:
        """Collective. The model of this step becomes the run's."""
        self.best, begin = self.last, time.monotonic()
        with self.context.heartbeat.within(Phase.EXPORT):
            export_model(self.engine, beside(self.task), self.config.run_dir / "model")
        self.tracker.event("export", step=self.last_step, seconds=time.monotonic() - begin)

    def _before_epoch(self, engine: Engine, epoch: int) -> Engine:
        """Collective. Thaws what is due."""
        thaws = len(self.state.thawed)
        self.context.heartbeat.at(Phase.BUILDING)
        self.engine = thaw(engine, epoch, self.config, self.prepared, self.state)
        for names in self.state.thawed[thaws:]:
            log.info("epoch %d: thawed %s", epoch, freezing.summary(names))
            self.tracker.event("thaw", step=self.state.step, epoch=epoch, parameters=names)
        return self.engine

    def _roll_back(self, engine: Engine) -> Engine:
        """Collective. The engine as the newest checkpoint has it; the data goes on where it is."""
        begin = time.monotonic()
        self.checkpoints.settle()
        chosen = self.rollback.choose(self.state.step)
        if chosen is None:
            return engine
        self._load(engine, chosen)
        self.state.updates = int(chosen.state["run"]["updates"])
        seconds = time.monotonic() - begin
        self.tracker.event("rollback", step=self.state.step, to_step=chosen.step, seconds=seconds)
        log.info("step %d: weights and moments are those of step %d again", self.state.step, chosen.step)
        return self.engine

    def _load(self, engine: Engine, chosen: SelectedCheckpoint) -> None:
        """Collective. A checkpoint into an engine that runs already: it is built anew around the module."""
        with self.context.heartbeat.within(Phase.LOADING):
            module = engine.release()
            restore_weights(module, chosen, self.context)
            self.engine = build_engine(module, self.config, self.context, thawed=self.state.thawed)
            restore_slots(self.engine, chosen, self.context)

    def _finish(self) -> Result:
        """Collective. The model, its predictions and the summary; `best` where one was asked for."""
        config = self.config
        self.context.heartbeat.at(Phase.EXPORT)
        if self.last_step != self.state.step and config.train.eval_every != "never":
            metrics = self._evaluate(self.state.step)
            if self.keeper is not None and self.state.best_step != self.state.step:
                self.keeper.judge(
                    self.state.step, metrics
                )  # stopped between two evaluations, at what may be the best step
        if config.checkpoint.every is not None:
            self.checkpoints.save()  # stopped early, between two of them
        if config.evaluation.best is not None and self.best is None and self.state.best_step is not None:
            self._bring_back_best(self.state.best_step)
        final = self.best if config.evaluation.best is not None and self.best is not None else self.last
        if config.evaluation.best is None or self.best is None:
            export_model(self.engine, beside(self.task), config.run_dir / "model")
        name, _ = engine_name(config, self.context)
        summary = {
            **results.summary("train", final, self.context, engine=name, seconds=self.tracker.seconds),
            "step": self.state.step,
            "updates": self.state.updates,
            "examples": self.state.examples,
            "best_step": self.state.best_step,
            **self._per_step(),
            "exactness": plan.exactness(config, name, self.context.world_size),
            "task": self.task.name,
            "rows": {split: len(rows) for split, rows in self.task.splits.items()},
        }
        self.checkpoints.finish()

        def write() -> None:
            write_card(config.run_dir / "model", config, summary, task=self.task.name)
            results.write(config.run_dir, summary, final)

        on_main(write, self.context)
        log.info("done: %s", json.dumps(summary["eval"]) if summary["eval"] else f"{self.state.step} steps")
        log.info("model and summary: %s", config.run_dir)
        return Result(dict(summary["eval"]), config.run_dir)

    def _bring_back_best(self, step: int) -> None:
        """Collective. The best step was in an earlier start: its checkpoint gives the model and its results again."""
        chosen = going_back.best_of_an_earlier_start(step, self.config, self.context)
        if chosen is None:
            self.state.best_step = self.last_step
        else:
            self._load(self.engine, chosen)
            self._evaluate(step)
        self._keep_best()

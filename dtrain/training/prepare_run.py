"""Prepares a training run up to its engine: the data, the model, and the state of the checkpoint that it resumes from."""

from __future__ import annotations

from torch import nn

from dtrain.checkpoint.restore import restore_weights
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.schema import Config
from dtrain.distributed.collectives import on_main
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Task
from dtrain.tasks.router_loss import with_router_loss
from dtrain.training import build, data_guard, rollback
from dtrain.training.evaluation import metric_names
from dtrain.training.export import check_reload
from dtrain.training.metric_selection import check_best, reported
from dtrain.training.monitors.protocol import RunState
from dtrain.training.run import TrainingRun


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
        check_best(config, names)
    context.heartbeat.at(Phase.LOADING)
    module = build.load(config, task, context) if model is None else build.place_and_try(model, config, task, context)
    steps = build.step_plan(config, task)
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

"""The train command: trains, evaluates and exports; or, with --dry-run, prints what it would do."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import nn

from dtrain.config.load import to_yaml
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.build import engine_name, engine_traits
from dtrain.runs.folder import RunFolder, record_config
from dtrain.tasks.protocol import Task
from dtrain.training import run_claim, summary
from dtrain.training.build import restore_layers
from dtrain.training.monitors.protocol import Monitor
from dtrain.training.precision_advice import describe_precision
from dtrain.training.prepare_run import prepare_run
from dtrain.training.summary import Result


def run_train(
    config: Config,
    context: RankContext,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    monitors: Sequence[Monitor] = (),
    began: float | None = None,
) -> Result:
    """Collective. Trains, evaluates and exports; returns the old result if the run was finished already.

    Args:
        model: model to train instead of the one that the config's model section names.
        task: task to use instead of the one that the task and data sections name.
        monitors: further monitors, called after dtrain's own.
        began: time.monotonic() at this start's beginning, imports included; default: now.
    """
    began = time.monotonic() if began is None else began
    engine_name(config, context)  # refuses a wrong combination before any work
    with run_claim.claimed(config, context, command="train") as claim:
        if claim.action == "already_finished":
            metrics = on_main(lambda: summary.read(config.run_dir)["eval"], context)
            return Result(dict(metrics), config.run_dir)
        try:
            run = prepare_run(claim.config, context, model, task, claim.checkpoint)
            on_main(lambda: record_config(RunFolder(config.run_dir), to_yaml(run.config)), context)
            run.began = began
            log.info("%s", run.describe(in_full=False))
            result = run.run(monitors)
            if model is not None and engine_traits(claim.config, context).is_sharded:
                whole = config.run_dir / "model"
                log.info(
                    "The model of dtrain.fit(model=...) holds only this rank's part. The whole model is in %s", whole
                )
            return result
        finally:
            if model is not None:
                restore_layers(model)


def run_dry(config: Config, context: RankContext) -> None:
    """Collective. Prints what `run_train` would do; creates no folder and takes no step."""
    engine_name(config, context)
    run = prepare_run(config, context, None, None, None)
    log.info("%s", run.describe(in_full=True))
    precision = describe_precision(config, run.task, run.prepared, run.steps)
    if precision is not None:
        log.info("%s", precision)

"""The evaluate command: evaluates a model on every split but train, each example exactly once."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.build import build_engine, engine_name, engine_traits
from dtrain.engine.forward_only import Forward, ForwardOnly
from dtrain.errors import ConfigError
from dtrain.models.unpadding import prepare_unpadding
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Task
from dtrain.tasks.trial import reads_padding
from dtrain.training import build, run_claim
from dtrain.training import summary as results
from dtrain.training.evaluation import EvaluationResult, evaluate
from dtrain.training.metric_selection import reported
from dtrain.training.summary import Result


def run_evaluate(config: Config, context: RankContext) -> Result:
    """Collective. Evaluates the model, and writes summary.json and predictions/ into a new run folder."""
    begin = time.monotonic()
    name, why = engine_name(config, context)
    with run_claim.claimed(config, context, command="evaluate"):
        task = build_task(config, context)
        if set(task.splits) <= {"train"}:
            raise ConfigError(
                "There is nothing to evaluate: the data has only a train split. Set data.splits or data.validation_fraction."
            )
        metrics = reported(config.evaluation, task, folder=config.folder)
        log.info("evaluate %s on %s, engine %s (%s)", config.model.name_or_path, context.topology.describe(), name, why)
        forward = wrap(build.load(config, task, context, is_trained=True), config, task, context)
        result = evaluate(
            forward,
            task,
            micro_batch_size=config.evaluation.micro_batch_size,
            micro_batch_tokens=config.evaluation.micro_batch_tokens,
            workers=config.data.workers,
            reported=metrics,
        )
        write_results("evaluate", result, config.run_dir, context, engine=name, seconds=time.monotonic() - begin)
        return Result(dict(result.metrics), config.run_dir)


def wrap(module: nn.Module, config: Config, task: Task, context: RankContext) -> Forward:
    """Wraps the model for forward passes: in its engine if the model is sharded, else without one. Settles model.unpad."""
    prepare_unpadding(module, config.model, reads_padding=reads_padding(task))
    if engine_traits(config, context).is_sharded:
        return build_engine(module, config, context)
    return ForwardOnly(module, config, context)


def write_results(
    command: str, result: EvaluationResult, run_dir: Path, context: RankContext, *, engine: str, seconds: float
) -> None:
    """Collective. Writes summary.json and predictions/, and logs the metrics."""
    summary = {
        **results.summary(command, result, context, engine=engine, seconds=seconds),
        "step": 0,
        "examples": sum(len(split.records) for split in result.splits.values()),
    }
    on_main(lambda: results.write(run_dir, summary, result), context)
    for metric, value in result.metrics.items():
        log.info("%-24s %.10g", metric, value)
    log.info("summary and predictions: %s", run_dir)

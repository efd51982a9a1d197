"""Exact evaluation: every example once, the same digits at every world size (law 6).

The split's micro-batches are a fixed list, of rows of like length. Each result carries its example's index, sums do not
depend on the order, and metrics are computed once on the gathered data in data order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.data.batches import MicroBatch, evaluation_batches
from dtrain.distributed.evaluation_exchange import StopWanted, gather_for_metrics, share_from_main
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.forward_only import Forward
from dtrain.errors import ConfigError, DataError
from dtrain.models.host_copy import to_device
from dtrain.models.placement import compute_device
from dtrain.tasks.progress import progress
from dtrain.tasks.protocol import ScoredBatch, Task
from dtrain.tasks.row_lengths import row_lengths, unknown_lengths
from dtrain.training.metric_selection import Reported
from dtrain.training.out_of_memory import explain_in_evaluation
from dtrain.training.stopping import NO_STOP, RunStopped, StopCondition

MAIN_SPLIT = "validation"

ALL = Reported()


@dataclass(frozen=True)
class SplitResult:
    """The results of one split, in data order.

    Attributes:
        metrics: `loss` per target in nats, and the task's own; empty if the split has no targets.
        records: one mapping per example, for predictions/<split>.jsonl; its `loss` is summed over the example's targets.
    """

    metrics: Mapping[str, float]
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EvaluationResult:
    """The results of all splits.

    Attributes:
        metrics: the main split's by name; a further split's name is prefixed.
        splits: results by split.
    """

    metrics: dict[str, float]
    splits: Mapping[str, SplitResult]


def metric_names(task: Task, reported: Reported = ALL) -> list[str]:
    """Returns the metrics that an evaluation will have, except those that the user's own function adds."""
    splits = [split for split in task.splits if not split.startswith(("train", "test"))]  # a test split may lack labels
    return [prefix_of(split) + name for split in splits for name in reported.of_task(task)]


def evaluate(
    forward: Forward,
    task: Task,
    *,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    workers: int = 0,
    reported: Reported = ALL,
    stop: StopCondition = NO_STOP,
) -> EvaluationResult:
    """Collective. Evaluates every split but `train`. Leaves the model in eval mode.

    Args:
        micro_batch_tokens: largest number of tokens of a micro-batch, instead of micro_batch_size.
        stop: a signal breaks the evaluation off.

    Raises:
        ConfigError: micro_batch_tokens cannot be kept; the user's metric function fails, or two metrics have the same name.
        RunStopped: on every rank, after a signal.
    """
    with forward.context.heartbeat.within(Phase.EVALUATION):
        results = {
            split: evaluate_split(
                forward,
                task,
                split,
                micro_batch_size=micro_batch_size,
                micro_batch_tokens=micro_batch_tokens,
                workers=workers,
                reported=reported,
                stop=stop,
            )
            for split in task.splits
            if split != "train"
        }
    metrics: dict[str, float] = {}
    for split, result in results.items():
        for name, value in result.metrics.items():
            full_name = prefix_of(split) + name
            if full_name in metrics:
                raise ConfigError(f"Two metrics are called {full_name}, one of them of the split {split}. Rename one.")
            metrics[full_name] = value
    return EvaluationResult(metrics, results)


def prefix_of(split: str) -> str:
    """Returns the prefix of a split's metrics: empty for the main split, `mismatched_` for validation_mismatched."""
    return "" if split == MAIN_SPLIT else split.removeprefix(f"{MAIN_SPLIT}_") + "_"


def evaluate_split(
    forward: Forward,
    task: Task,
    split: str,
    *,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    workers: int = 0,
    reported: Reported = ALL,
    stop: StopCondition = NO_STOP,
) -> SplitResult:
    """Collective. Evaluates one split; each example counts exactly once.

    Three collectives: two gather the results, one shares the metrics of rank 0. Each rank breaks its own part off at a
    signal, wherever it is, and the next of these collectives tells the others. Only an engine in lock step, whose
    forward pass is a collective, agrees before each micro-batch.

    Raises:
        DataError: the split has no rows.
        RunStopped: on every rank, after a signal.
    """
    heartbeat = forward.context.heartbeat
    heartbeat.at(Phase.EVALUATION)
    if not len(task.splits[split]):
        raise DataError(
            f"The split {split} has no rows to evaluate: give it some, or remove it from the task's splits."
        )
    lengths = row_lengths(task, split)
    if micro_batch_tokens is not None and lengths is None:
        raise unknown_lengths(micro_batch_tokens, "evaluation")
    size_setting = "micro_batch_size" if micro_batch_tokens is None else "micro_batch_tokens"
    device = compute_device(forward.module)
    batches = evaluation_batches(
        task.splits[split],
        task.collate,
        forward.context.topology,
        micro_batch_size=micro_batch_size,
        lock_step=forward.lock_step,
        workers=workers,
        lengths=lengths,
        micro_batch_tokens=micro_batch_tokens,
    )

    def score(batch: MicroBatch) -> ScoredBatch:
        with torch.no_grad(), forward.autocast(), explain_in_evaluation(batch.tensors, size_setting=size_setting):
            return task.score(forward.module, to_device(batch.tensors, device), lock_step=forward.lock_step)

    with _progress(forward.context, split, len(task.splits[split])) as advance:
        done = _score(forward, batches, score, stop=stop, advance=advance)
    with leaving_together():
        gathered = gather_for_metrics(
            *_values(done), forward.context, num_examples=len(task.splits[split]), wants_stop=stop.is_signaled()
        )
    heartbeat.at(Phase.METRICS)  # A phase without a time limit.
    return _result(forward.context, task, split, gathered, reported=reported, stop=stop)


def _result(
    context: RankContext,
    task: Task,
    split: str,
    gathered: Mapping[str, torch.Tensor],
    *,
    reported: Reported,
    stop: StopCondition,
) -> SplitResult:
    """Collective. Returns the records and metrics of the values that all ranks gathered."""
    losses, targets = gathered["loss"].tolist(), gathered["targets"].tolist()
    predictions = gathered["prediction"].tolist() if "prediction" in gathered else []
    records: list[Mapping[str, Any]] = []
    metrics: dict[str, float] = {}

    def make_records() -> None:
        records.extend(
            {"example_index": index, **record, "loss": losses[index], "targets": targets[index]}
            for index, record in enumerate(task.records(split, predictions))
        )

    def compute_metrics() -> None:
        """Runs on rank 0 only, so that all ranks decide by the same number."""
        if sum(targets) == 0:  # A test split without labels has predictions, but no metrics.
            return
        loss = math.fsum(losses) / sum(targets)
        of_task = {"loss": loss, **task.metrics(split, loss=loss, predictions=predictions)}
        user = reported.user(records, task_names=task.metric_names) if reported.user is not None else {}
        metrics.update({name: of_task[name] for name in of_task if name in reported.of_task(task)})
        metrics.update(user)

    def metrics_of_rank_0() -> dict[str, float]:
        stop.attempt(compute_metrics)
        return metrics

    stop.attempt(make_records)
    with leaving_together():
        shared = share_from_main(metrics_of_rank_0, context, wants_stop=stop.is_signaled)
    return SplitResult(shared, records)


def _score(
    forward: Forward,
    batches: Iterable[MicroBatch],
    score: Callable[[MicroBatch], ScoredBatch],
    *,
    stop: StopCondition,
    advance: Callable[[int], None],
) -> list[tuple[MicroBatch, ScoredBatch]]:
    """Scores this rank's micro-batches; returns those that count, and after a signal only some of them.

    Collective if the engine is in lock step.

    Raises:
        RunStopped: on every rank of an engine in lock step, after a signal.
    """
    forward.module.eval()
    done: list[tuple[MicroBatch, ScoredBatch]] = []

    def score_all() -> None:
        for batch in batches:
            if forward.lock_step:
                stop.leave_together(forward.context)
            scored = score(batch)
            forward.context.heartbeat.tick()
            advance(len(batch.example_index))
            if batch.counted:
                done.append((batch, scored))

    if forward.lock_step:
        score_all()
    else:
        stop.attempt(score_all)
    return done


def _progress(context: RankContext, split: str, rows: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows on rank 0 how far a long evaluation is, of the rows that this rank computes."""
    return progress(f"{split}: rows", -(-rows // context.world_size), of="evaluation", is_shown=context.is_main)


@contextmanager
def leaving_together() -> Iterator[None]:
    """Raises RunStopped, on every rank, where a collective says that a rank has got a signal."""
    try:
        yield
    except StopWanted:
        raise RunStopped from None


def _values(done: Sequence[tuple[MicroBatch, ScoredBatch]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns this rank's results, one row per example, and the examples' indices. A rank may have none."""
    index = torch.tensor([i for batch, _ in done for i in batch.example_index], dtype=torch.int64)
    if not done:
        return {}, index
    values = {
        "loss": torch.cat([scored.loss for _, scored in done]).cpu(),
        "targets": torch.cat([scored.targets for _, scored in done]).cpu(),
    }
    predictions = [scored.prediction for _, scored in done if scored.prediction is not None]
    return ({**values, "prediction": torch.cat(predictions).cpu()} if predictions else values), index

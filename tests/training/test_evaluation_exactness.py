"""Law 6: evaluation counts every example once and gives the same digits at every world size, sharded or not.

23 rows (which 2, 3 and 5 do not divide) in micro-batches of 4, and 3 rows in one, so that all ranks but one have none.
What is on trial is a parameter: the evaluations that trainers usually have (padding to even shards, dropping the rest,
a mean over ranks) go through the same check and must be rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score, recall_score

import dtrain.training.evaluation
from dtrain.config.task import Classification
from dtrain.data.batches import MicroBatch, evaluation_batches
from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine.build import build_engine
from dtrain.engine.forward_only import Forward, ForwardOnly
from dtrain.models.unpadding import prepare_unpadding
from dtrain.tasks.classification import ClassificationTask
from dtrain.training.evaluation import evaluate_split
from dtrain.training.monitors.evaluations import Evaluate
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import tiny, training
from tests.support.multirank import RanksFailed, run_ranks
from tests.support.training import Setting

pytestmark = pytest.mark.ranks

SIZES = (23, 3)
SETTING = Setting(dropout=0.1)
PREDICTED = ("prediction", "reference", "example_index", "loss", "targets")


def model(*, double: bool = False) -> Any:
    """The tiny BERT with a louder head, set so that both labels are predicted."""
    module = tiny.bert(layers=2).eval()
    module.classifier.weight.data.mul_(30.0)
    rows = tiny.sentences(23, seed=5)
    with torch.no_grad():
        logits = torch.cat([module(input_ids=torch.tensor(rows[[i]]["input_ids"])).logits for i in range(23)])
        module.classifier.bias.copy_(-logits.median(dim=0).values)
    return module.double() if double else module


def task(rows: int, split: Any = None) -> ClassificationTask:
    splits = {"train": tiny.sentences(4), "validation": split or tiny.sentences(rows, seed=5)}
    return ClassificationTask(
        splits, tiny.tokenizer(), ["no", "yes"], Classification(name="classification"), max_length=32
    )


def result_of(forward: Forward, rows: int, *, micro_batch_size: int = 4, workers: int = 0) -> dict[str, Any]:
    found = evaluate_split(forward, task(rows), "validation", micro_batch_size=micro_batch_size, workers=workers)
    return {"metrics": dict(found.metrics), "records": [dict(record) for record in found.records]}


# The usual evaluations, none of which is exact


def naive(forward: Forward, rows: int, *, kind: str) -> dict[str, Any]:
    """Each rank takes every W-th example; then means are averaged.

    kind: repeated (short ranks start over, as torch's DistributedSampler does), dropped (the rest is left out),
    mean_of_means (all is counted once, but averaged per rank and then over ranks).
    """
    context, judged = forward.context, task(rows)
    size, rank = context.world_size, context.rank
    own = list(range(rank, rows, size))
    if kind == "repeated":
        own = [index % rows for index in range(rank, -(-rows // size) * size, size)]
    if kind == "dropped":
        own = own[: rows // size]
    losses, right = [], []
    forward.module.eval()
    for start in range(0, rows, 4):  # each example in the micro-batch that it has in the exact evaluation
        batch = judged.collate(judged.splits["validation"][[*range(start, min(start + 4, rows))]], tiny.HERE)
        with torch.no_grad():
            scored = judged.score(forward.module, batch, lock_step=False)
        assert scored.prediction is not None
        losses += scored.loss.tolist()
        right += (scored.prediction == batch["labels"]).tolist()
    mine = [math.fsum(losses[index] for index in own), float(sum(right[index] for index in own)), float(len(own))]
    if kind == "mean_of_means":
        mine = [value / max(len(own), 1) for value in mine]
    loss, hits, weight = all_reduce_sum(torch.tensor(mine, dtype=torch.float64), context).tolist()
    return {"metrics": {"loss": loss / max(weight, 1), "accuracy": hits / max(weight, 1)}, "records": []}


def evaluated(context: RankContext) -> dict[str, Any]:
    """Exact and naive evaluations of both sizes, on every rank."""
    forward = ForwardOnly(model(), SETTING.config(), context)
    return {
        str(rows): {
            "exact": result_of(forward, rows),
            "again": result_of(forward, rows),
            **{kind: naive(forward, rows, kind=kind) for kind in ("repeated", "dropped", "mean_of_means")},
        }
        for rows in SIZES
    }


@cache
def on_ranks(world_size: int) -> list[Any]:
    return run_ranks(evaluated, world_size)


@cache
def truth() -> dict[str, Any]:
    return evaluated(ONE_PROCESS)


def assert_exact(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Digit for digit: a float that went through JSON is the same float."""
    assert found["metrics"] == {name: expected["metrics"][name] for name in found["metrics"]}
    assert all(record == other for record, other in zip(found["records"], expected["records"], strict=False))


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_rank_gets_the_digits_of_one_process(world_size: int, rows: int) -> None:
    expected = truth()[str(rows)]["exact"]

    for found in on_ranks(world_size):
        assert found[str(rows)]["exact"] == expected
        assert_exact(expected, found[str(rows)]["exact"])
        assert found[str(rows)]["again"] == found[str(rows)]["exact"]
    assert len(expected["records"]) == rows


@pytest.mark.parametrize("kind", ["repeated", "dropped", "mean_of_means"])
def test_the_usual_evaluations_are_rejected(kind: str) -> None:
    expected = truth()["23"]["exact"]

    for world_size in (2, 3, 5):
        with pytest.raises(AssertionError):
            assert_exact(expected, on_ranks(world_size)[0]["23"][kind])


def test_on_one_process_the_usual_evaluations_are_right_or_they_would_prove_nothing() -> None:
    for kind in ("repeated", "dropped", "mean_of_means"):
        assert_exact(truth()["23"]["exact"], truth()["23"][kind])


def test_predictions_stand_in_data_order_with_their_references() -> None:
    rows = tiny.sentences(23, seed=5)
    alone = model().eval()
    with torch.no_grad():
        expected = [
            ["no", "yes"][int(alone(input_ids=torch.tensor([rows[[i]]["input_ids"][0]])).logits.argmax())]
            for i in range(23)
        ]

    records = on_ranks(3)[2]["23"]["exact"]["records"]

    assert [record["prediction"] for record in records] == expected
    assert len(set(expected)) == 2  # or the order could not be seen
    assert [record["reference"] for record in records] == [
        ["no", "yes"][label] for label in rows[[*range(23)]]["label"]
    ]
    assert [record["example_index"] for record in records] == list(range(23))
    assert all(set(record) == set(PREDICTED) for record in records)


@pytest.mark.parametrize("rows", SIZES)
def test_metrics_are_those_of_scikit_learn_and_the_loss_that_of_float64(rows: int) -> None:
    table, judge = tiny.sentences(rows, seed=5), model(double=True).eval()
    labels = table[[*range(rows)]]["label"]
    losses, predicted = [], []
    for index in range(rows):  # one at a time: no padding
        with torch.no_grad():
            logits = judge(input_ids=torch.tensor(table[[index]]["input_ids"])).logits[0]
        losses.append(float(-logits.log_softmax(dim=0)[labels[index]]))
        predicted.append(int(logits.argmax()))

    found = result_of(ForwardOnly(model(double=True), SETTING.config(), ONE_PROCESS), rows)["metrics"]
    single_precision = truth()[str(rows)]["exact"]["metrics"]

    assert found["loss"] == pytest.approx(math.fsum(losses) / rows, rel=1e-12)
    assert single_precision["loss"] == pytest.approx(found["loss"], rel=1e-5)
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, zero_division=0),
        "precision": precision_score(labels, predicted, zero_division=0),
        "recall": recall_score(labels, predicted, zero_division=0),
        "matthews_correlation": matthews_corrcoef(labels, predicted),
    }
    assert found == pytest.approx({**expected, "loss": found["loss"]}, abs=1e-12)
    assert {**single_precision, "loss": 0} == pytest.approx({**expected, "loss": 0}, abs=1e-12)


def test_workers_that_prepare_batches_change_no_digit() -> None:
    forward = ForwardOnly(model(), SETTING.config(), ONE_PROCESS)

    assert result_of(forward, 23, workers=1) == truth()["23"]["exact"]


# Broken from within: the check on indices sees it, on every rank


def broken_inside(context: RankContext, breaks: str) -> Any:
    """Rank 1's list of batches is wrong; a value of that example, but not its index, in `values`."""
    if breaks == "values":
        split: Any = training.Repeats(tiny.sentences(23, seed=5), context.rank)
        forward = ForwardOnly(model(), SETTING.config(), context)
        found = evaluate_split(forward, task(23, split), "validation", micro_batch_size=4)
        return {"metrics": dict(found.metrics), "records": list(found.records)}

    def wrong(*args: Any, **kwargs: Any) -> Iterator[MicroBatch]:
        for batch in evaluation_batches(*args, **kwargs):
            if context.rank == 1 and batch.index == 1:
                if breaks == "dropped":
                    continue
                yield batch
            yield batch

    dtrain.training.evaluation.evaluation_batches = wrong  # this process ends with the test
    return result_of(ForwardOnly(model(), SETTING.config(), context), 23)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [("repeated", "4 counted more than once (4, 5, 6, 7)"), ("dropped", "4 missing (4, 5, 6, 7)")],
)
def test_an_example_that_is_counted_twice_or_never_ends_the_evaluation(breaks: str, says: str) -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(broken_inside, 2, breaks)

    assert "DtrainError" in str(failure.value)
    assert says in str(failure.value)


def test_an_example_read_for_another_is_rejected() -> None:
    found = run_ranks(broken_inside, 2, "values")[0]

    with pytest.raises(AssertionError):
        assert_exact(truth()["23"]["exact"], found)


# Through engines


def sharded(context: RankContext, stage: int) -> dict[str, Any]:
    """Through DeepSpeed, every parameter in shards at stage 3. Micro-batches of 8: three, so that rank 1 has one less."""
    setting = replace(SETTING, engine="deepspeed", zero_stage=stage)
    module = model()
    engine = build_engine(module, setting.config(), context)
    assert engine.lock_step == (stage >= 2)
    shards = [p.ds_tensor.numel() < p.ds_numel for p in module.parameters()] if stage == 3 else [True]
    found = {f"{rows}/{size}": result_of(engine, rows, micro_batch_size=size) for rows in SIZES for size in (4, 8, 32)}
    return {"found": found, "shards": all(shards)}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sharded_model_measures_the_same_also_where_a_rank_has_no_micro_batch(stage: int) -> None:
    whole = ForwardOnly(model(), SETTING.config(), ONE_PROCESS)

    for rank in run_ranks(sharded, 2, stage, timeout_s=120):
        assert rank["shards"]
        for name, found in rank["found"].items():
            rows, size = map(int, name.split("/"))
            expected = result_of(whole, rows, micro_batch_size=size)
            assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
            assert [r["prediction"] for r in found["records"]] == [r["prediction"] for r in expected["records"]]
            assert [r["loss"] for r in found["records"]] == pytest.approx(
                [r["loss"] for r in expected["records"]], rel=1e-5
            )


class Halfway:
    """Evaluates after every second step, as the train command's monitor does."""

    def __init__(self, forward: Callable[[], Forward]) -> None:
        self.results: list[Any] = []
        self.modes: list[bool] = []
        self._forward = forward
        self._monitor = Evaluate(2, self._run)

    def _run(self, step: int) -> dict[str, float]:
        self.modes.append(self._forward().module.training)
        self.results.append(result_of(self._forward(), 23))
        return dict(self.results[-1]["metrics"])

    def after_step(self, record: StepRecord) -> Decision:
        return self._monitor.after_step(record)


def trained(context: RankContext, setting: Setting, *, with_evaluation: bool) -> dict[str, Any]:
    """Five steps, with or without evaluations on the way; then the weights and an evaluation through the engine."""
    run = training.build(context, setting, model())
    watch = Halfway(lambda: run.engine)
    run.go(*([watch] if with_evaluation else []))
    final = result_of(run.engine, 23)
    return {"weights": training.weights_of(run.engine), "final": final, "way": watch.results, "modes": watch.modes}


def trained_both_ways(context: RankContext, setting: Setting) -> list[dict[str, Any]]:
    return [trained(context, setting, with_evaluation=True), trained(context, setting, with_evaluation=False)]


def digits_of(weights: dict[str, Any]) -> dict[str, Any]:
    """One process's evaluation of a bare model with those weights."""
    module = model()
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    prepare_unpadding(module, SETTING.config().model)  # as in the run
    return result_of(ForwardOnly(module, SETTING.config(), ONE_PROCESS), 23)


@pytest.mark.parametrize(("stage", "world_size"), [(None, 1), (None, 3), (1, 2), (3, 2), ("fsdp", 2)])
def test_evaluation_through_an_engine_measures_its_weights_and_leaves_the_training_alone(
    stage: int | str | None, world_size: int
) -> None:
    if isinstance(stage, int):
        setting = replace(SETTING, steps=5, learning_rate=0.05, engine="deepspeed", zero_stage=stage)
    else:
        setting = replace(SETTING, steps=5, learning_rate=0.05, engine=stage or "auto")

    ranks = run_ranks(trained_both_ways, world_size, setting, timeout_s=120)
    measured, left_alone = ranks[0]

    assert measured["weights"] == left_alone["weights"]  # dropout is on again after an evaluation, with the same draws
    assert measured["modes"] == [True, True, True]  # the run was learning when it was measured
    assert measured["way"][2] == measured["final"]  # after the last step, then once more
    assert measured["way"][0] != measured["way"][1]
    assert all(rank[0]["way"] == measured["way"] for rank in ranks)
    expected = digits_of(measured["weights"])
    if stage in (3, "fsdp"):
        assert measured["final"]["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    else:
        assert measured["final"] == expected

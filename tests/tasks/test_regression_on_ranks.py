"""Regression gives the same answer on any number of ranks, and its model is one of plain transformers.

21 rows in steps of 8 and micro-batches of 3: ranks get unequal shares, one an empty one, and the last batch of an
evaluation holds one row.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.tasks.regression import RegressionTask
from dtrain.training.evaluation import evaluate_split
from dtrain.training.export import export_model
from tests.support import tiny, training
from tests.support.evaluated import records_of
from tests.support.multirank import run_ranks
from tests.support.tiny import Table
from tests.support.training import Recorder, Setting

pytestmark = pytest.mark.ranks

SETTING = Setting(steps=6, learning_rate=0.01, dropout=0.1)


def scored(rows: int, seed: int) -> Table:
    """Made-up sentences with a score of 0 to 5 that their first word and length decide; every seventh lacks it."""
    ids = tiny.sentences(rows, seed=seed)[[*range(rows)]]["input_ids"]
    labels = [None if row % 7 == 6 else one[1] % 5 + len(one) / 21 for row, one in enumerate(ids)]
    return Table({"input_ids": ids, "label": labels})


def task() -> RegressionTask:
    splits = {"train": scored(21, 0), "validation": scored(13, 1)}
    return RegressionTask(splits, tiny.tokenizer(), max_length=32)


def model() -> Any:
    """One output, and weights so large that texts get values far apart: rounding cannot move a correlation."""
    module = tiny.bert(dropout=0.1)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data.mul_(10.0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module.classifier = torch.nn.Linear(32, 1)
        module.classifier.weight.data.mul_(3.0)
    module.num_labels = module.config.num_labels = 1
    module.config.problem_type = "regression"
    return module


def trained(context: RankContext, setting: Setting, folder: str | None = None) -> dict[str, Any]:
    """Collective. Trains and evaluates; the model goes to the folder."""
    run, recorder = training.build(context, setting, model(), task()), Recorder()
    engine = run.go(recorder)
    found = evaluate_split(engine, run.task, "validation", micro_batch_size=4)
    if folder is not None:
        export_model(engine, run.task.tokenizer, Path(folder) / "model")
    engine.release()
    return {
        "steps": recorder.steps,
        "metrics": dict(found.metrics),
        "records": records_of(found, context),
    }


def evaluated(context: RankContext) -> dict[str, Any]:
    """Collective. Without training, so that every digit is one process's."""
    run = training.build(context, SETTING, model(), task())
    found = evaluate_split(run.engine, run.task, "validation", micro_batch_size=4)
    return {"metrics": dict(found.metrics), "records": records_of(found, context)}


@cache
def truth() -> dict[str, Any]:
    return trained(ONE_PROCESS, SETTING)


def assert_same_steps(ranks: list[Any]) -> None:
    for found in ranks:
        for step, expected in zip(found["steps"], truth()["steps"], strict=True):
            assert step["targets"] == expected["targets"]
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_the_steps_of_one_process(world_size: int) -> None:
    ranks = run_ranks(trained, world_size, SETTING)

    assert_same_steps(ranks)
    assert ranks[0]["metrics"] == pytest.approx(truth()["metrics"], rel=1e-6, abs=1e-6)
    assert {step["targets"] for step in truth()["steps"]} != {8}  # rows without a label are in no sum


def test_a_gradient_that_is_off_by_a_ten_thousandth_is_rejected() -> None:
    broken = Setting(**{**SETTING.__dict__, "broken": "scaled_gradient"})

    with pytest.raises(AssertionError):
        assert_same_steps(run_ranks(trained, 2, broken))


@pytest.mark.parametrize("world_size", [2, 5])
def test_correlations_and_predictions_are_the_digits_of_one_process(world_size: int) -> None:
    expected = evaluated(ONE_PROCESS)

    assert run_ranks(evaluated, world_size) == [expected] * world_size
    assert len({record["prediction"] for record in expected["records"]}) == 13
    assert 0 < abs(expected["metrics"]["pearson"]) < 1


def test_the_written_model_gives_the_same_numbers_in_plain_transformers(tmp_path: Path) -> None:
    written = trained(ONE_PROCESS, SETTING, str(tmp_path))["records"]

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = scored(13, 1)[[*range(13)]]
    batch = tokenizer.pad({"input_ids": rows["input_ids"]}, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    first = model(**{key: value[:1] for key, value in batch.items()}, labels=torch.tensor([rows["label"][0]]))

    assert logits.shape == (13, 1)
    assert logits[:, 0].tolist() == pytest.approx([record["prediction"] for record in written], rel=1e-6, abs=1e-6)
    assert float(first.loss.detach()) == pytest.approx(written[0]["loss"], rel=1e-5)  # its own loss is the mean square

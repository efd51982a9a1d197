"""Which metrics an evaluation reports: some of the task's, and those of a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from dtrain.config.schema import Config, Evaluation
from dtrain.config.task import Classification
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import ConfigError
from dtrain.tasks.classification import ClassificationTask
from dtrain.training.evaluation import EvaluationResult, evaluate, metric_names
from dtrain.training.metric_selection import Reported, UserMetrics, reported
from tests.support import tiny
from tests.support.tiny import Table

TAKEN = ("accuracy", "f1")
RECORDS = [
    {"prediction": "yes", "reference": "no"},
    {"prediction": "no", "reference": None},
    {"prediction": "yes", "reference": "yes"},
]


def task(**more: Sequence[int | None]) -> ClassificationTask:
    def rows(labels: Sequence[int | None]) -> Table:
        return Table({"input_ids": [[2, 5 + number, 3] for number in range(len(labels))], "label": list(labels)})

    splits = {"train": rows([0, 1]), "validation": rows([0, 1, 1]), **{name: rows(more[name]) for name in more}}
    options = Classification(name="classification")
    return ClassificationTask(splits, tiny.tokenizer(), ["no", "yes"], options, max_length=8)


def evaluated(judged: ClassificationTask, what: Reported) -> EvaluationResult:
    settings = Config.model_validate({"task": {"name": "classification"}})
    with torch.random.fork_rng():
        forward = ForwardOnly(tiny.bert(layers=1), settings, ONE_PROCESS)
    return evaluate(forward, judged, micro_batch_size=2, reported=what)


def own(function: Callable[..., Any]) -> UserMetrics:
    return UserMetrics("mine:score", function)


# The task's own


def test_only_the_chosen_metrics_are_reported_and_loss_always() -> None:
    judged = task(validation_mismatched=[1])

    some = reported(Evaluation(metrics=("f1",)), judged, folder=Path())
    result = evaluated(judged, some)

    assert list(result.metrics) == ["loss", "f1", "mismatched_loss", "mismatched_f1"]
    assert metric_names(judged, some) == list(result.metrics)
    whole = evaluated(judged, Reported()).metrics
    assert {name: whole[name] for name in result.metrics} == result.metrics
    assert len(whole) == 12


def test_no_metric_beside_loss_is_a_choice_too() -> None:
    judged = task()

    assert list(evaluated(judged, reported(Evaluation(metrics=()), judged, folder=Path())).metrics) == ["loss"]


@pytest.mark.parametrize("name", ["acuracy", "mismatched_accuracy"])
def test_a_metric_that_the_task_lacks_is_refused_with_those_it_has(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation.metrics: {name} is not a metric of task.name=classification. "):
        reported(Evaluation(metrics=("loss", name)), task(), folder=Path())
    with pytest.raises(ConfigError, match="It has loss, accuracy, f1, precision, recall, matthews_correlation"):
        reported(Evaluation(metrics=(name,)), task(), folder=Path())


# The user's own


def test_a_function_gets_what_has_a_reference_in_data_order() -> None:
    seen = []

    def score(predictions: list[Any], references: list[Any]) -> Mapping[str, Any]:
        seen.append((predictions, references))
        return {"half": 0.5, "count": 2, "single": numpy.float32(0.25), "none": float("nan")}

    found = own(score)(RECORDS, task_names=TAKEN)

    assert seen == [(["yes", "yes"], ["no", "yes"])]
    assert (found["half"], found["count"], found["single"], str(found["none"])) == (0.5, 2.0, 0.25, "nan")
    assert {type(value) for value in found.values()} == {float}


def test_each_split_with_references_is_judged_once_and_its_names_get_the_splits_prefix() -> None:
    seen = []

    def score(predictions: list[Any], references: list[Any]) -> dict[str, float]:
        seen.append(references)
        return {"rows": float(len(references))}

    judged = task(validation_mismatched=[1, None], test=[None, None])
    result = evaluated(judged, Reported((), own(score)))

    assert seen == [["no", "yes", "yes"], ["yes"]]
    assert result.splits["test"].metrics == {}
    assert (result.metrics["rows"], result.metrics["mismatched_rows"]) == (3.0, 1.0)
    assert list(result.metrics) == ["loss", "rows", "mismatched_loss", "mismatched_rows"]


def raises(predictions: list[Any], references: list[Any]) -> dict[str, float]:
    raise ZeroDivisionError("no rows")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raises, "failed: ZeroDivisionError: no rows. It gets two lists, in data order"),
        (lambda _predictions: {}, r"failed: TypeError: .*takes 1 positional argument but 2 were given"),
        (lambda _p, _r: 0.5, "returned 0.5: it must return a dict"),
        (lambda _p, _r: None, "returned None: it must return a dict"),
        (lambda _p, _r: {"x": "good"}, "returned x='good': a metric must be a number"),
        (lambda _p, _r: {"x": None}, "returned x=None: a metric must be a number"),
        (lambda _p, _r: {"x": True}, "returned x=True: a metric must be a number"),
        (lambda _p, _r: {"x": torch.tensor(1.0)}, r"returned x=tensor\(1.\): a metric must be a number"),
        (lambda _p, _r: {1: 0.5}, "returned a metric called 1: a name must be text"),
        (lambda _p, _r: {"": 0.5}, "returned a metric called '': a name must be text"),
        (lambda _p, _r: {"f1": 0.5}, "returned a metric called f1, but another metric has that name"),
        (lambda _p, _r: {"loss": 0.5}, "returned a metric called loss, but another metric has that name"),
        (lambda _p, _r: {"seconds": 0.5}, "returned a metric called seconds, but another metric has that name"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.factory=mine:score {said}"):
        own(function)(RECORDS, task_names=TAKEN)


def test_a_task_without_references_cannot_use_a_function() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.factory=mine:score cannot be used"):
        own(lambda _p, _r: {"x": 1.0})([{"prediction": None, "reference": None}], task_names=())


def test_a_name_that_is_another_splits_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="Two metrics are called mismatched_accuracy, one of them of the split"):
        evaluated(task(validation_mismatched=[1]), Reported(None, own(lambda _p, _r: {"mismatched_accuracy": 1.0})))


def test_a_function_that_is_not_there_is_refused_before_any_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.factory=nowhere:score cannot be imported"):
        reported(Evaluation(factory="nowhere:score"), task(), folder=tmp_path)

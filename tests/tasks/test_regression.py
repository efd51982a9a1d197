"""Regression: squared errors against a hand's arithmetic, correlations against formulas, data from files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from scipy.stats import rankdata
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.protocol import Targets
from dtrain.tasks.regression import RegressionTask, correlations, prepare_regression
from tests.support import tiny
from tests.support.tiny import Table


class Says(nn.Module):
    """A model that answers with these values, one a row, whatever it is given."""

    def __init__(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=dtype)[:, None])

    def forward(self, **_inputs: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.values)


def task(labels: Sequence[float | None] = (1.0, 2.5, 0.0)) -> RegressionTask:
    rows = Table({"input_ids": [[2, 5, 3]] * len(labels), "label": list(labels)})
    return RegressionTask({"train": rows, "validation": rows}, tiny.tokenizer(), max_length=8)


def batch(labels: Sequence[float | None]) -> dict[str, torch.Tensor]:
    return task().collate({"input_ids": [[2, 5, 3]] * len(labels), "label": list(labels)}, tiny.HERE)


# Sums


def test_the_loss_is_the_sum_of_squares_and_the_weight_the_number_of_values() -> None:
    labels = [1.0, 2.5, -1.0]

    loss = task().loss(Says([2.0, 2.0, 1.0]), batch(labels))

    assert loss.item() == 1.0 + 0.25 + 4.0
    assert task().targets(batch(labels)) == Targets(3.0, 3)


def test_a_row_without_a_label_has_no_loss_no_gradient_and_no_weight() -> None:
    model = Says([2.0, 7.0])

    loss = task().loss(model, batch([1.0, None]))
    loss.backward()

    assert loss.item() == 1.0
    assert model.values.grad is not None
    assert model.values.grad.flatten().tolist() == [2.0, 0.0]
    assert task().targets(batch([1.0, None])) == Targets(1.0, 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_score_is_per_example_also_for_a_last_batch_of_one(rows: int) -> None:
    scored = task().score(Says([2.0, 2.0, 1.0][:rows]), batch([1.0, 2.5, None][:rows]), lock_step=False)

    assert scored.prediction is not None
    assert scored.prediction.dtype == scored.loss.dtype == torch.float64
    assert scored.prediction.tolist() == [2.0, 2.0, 1.0][:rows]
    assert scored.loss.tolist() == [1.0, 0.25, 0.0][:rows]
    assert scored.targets.tolist() == [1, 1, 0][:rows]


def test_half_precision_is_summed_in_float32_and_float64_stays_exact() -> None:
    assert task().loss(Says([2.0], torch.bfloat16), batch([1.0])).dtype == torch.float32
    exact = task().loss(Says([0.1], torch.float64), batch([0.3]))
    assert exact.dtype == torch.float64
    assert float(exact.detach()) == pytest.approx(0.04, rel=1e-15)


# Correlations


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """By its definition, in sums that lose nothing."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))


def test_correlations_are_those_of_their_definitions_with_ties_at_their_mean_rank() -> None:
    truth, found = [0.0, 1.5, 1.5, 3.0, 5.0, 4.8], [0.3, 1.0, 2.0, 2.0, 9.5, 2.0]

    metrics = task(truth).metrics("validation", loss=0.0, predictions=found)

    assert metrics["pearson"] == pytest.approx(pearson(truth, found), abs=1e-12)
    assert metrics["spearman"] == pytest.approx(pearson(rankdata(truth), rankdata(found)), abs=1e-12)
    assert set(metrics) == set(task().metric_names)


@pytest.mark.parametrize(
    ("truth", "found"),
    [
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),
        ([1.0, 1.0, 1.0], [2.0, 1.0, 3.0]),
        ([1.0], [1.0]),
        ([1.0, 2.0, 3.0], [2.0, math.inf, 2.0]),
        ([1.0, 2.0, 3.0], [2.0, math.nan, 2.0]),
    ],
)
def test_an_undefined_correlation_is_nan_without_a_warning(truth: list[float], found: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = correlations(truth, found)

    assert all(math.isnan(value) for value in metrics.values())


def test_nearly_constant_predictions_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correlations([1.0, 2.0, 3.0], [1.0, 1.0 + 1e-15, 1.0])


def test_rows_without_a_label_are_predicted_but_not_in_the_metrics() -> None:
    mixed = task([1.0, None, 2.0, 4.0])

    assert mixed.metrics("validation", loss=0.0, predictions=[1.0, 9.0, 2.0, 4.0])["pearson"] == pytest.approx(1.0)
    assert task([None, None]).metrics("validation", loss=0.0, predictions=[1.0, 2.0]) == {}
    assert mixed.records("validation", [0.5, 9.0, 2.0, 4.0])[:2] == [
        {"prediction": 0.5, "reference": 1.0},
        {"prediction": 9.0, "reference": None},
    ]


def test_an_answer_is_the_value() -> None:
    assert task().answers(Says([2.5]), batch([None])) == [{"prediction": 2.5}]


# From files


def prepare(folder: Path, **data: Any) -> RegressionTask:
    config = Config.model_validate(
        {
            "task": {"name": "regression"},
            "data": {"path": str(folder), "cache_dir": str(folder / "cache"), "max_length": 6, **data},
            "model": {"name_or_path": str(folder / "model")},
        }
    )
    return prepare_regression(config, ONE_PROCESS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer, and a table with a number per row."""
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "train.csv").write_text("sentence,score\nthe cat runs,1\na dog,-2.5e-1\na red bird,0\n")
    return tmp_path


def test_numbers_are_read_from_a_column_with_a_usual_name(folder: Path) -> None:
    made = prepare(folder)

    assert made.splits["train"][[0, 1, 2]]["label"] == [1.0, -0.25, 0.0]
    assert made.head_config == {"num_labels": 1}
    assert made.collate(made.splits["train"][[1]], tiny.HERE)["labels"].tolist() == [-0.25]


def test_numbers_of_json_and_parquet_keep_every_digit(folder: Path) -> None:
    (folder / "train.csv").unlink()
    (folder / "train.jsonl").write_text('{"text": "a cat", "label": 3}\n{"text": "a dog", "label": 0.1}\n')
    datasets.Dataset.from_dict({"text": ["a", "cat"], "label": [1 / 3, 2.0]}).to_parquet(str(folder / "dev.parquet"))

    made = prepare(folder)

    assert made.splits["train"][[0, 1]]["label"] == [3.0, 0.1]
    assert made.splits["validation"][[0, 1]]["label"] == [1 / 3, 2.0]


@pytest.mark.parametrize("label", ["good", "nan", "inf", "1e999", "1_000", "1,5"])
def test_a_label_that_is_not_a_finite_number_is_named_by_file_and_line(folder: Path, label: str) -> None:
    (folder / "train.csv").write_text(f'sentence,score\na cat,1\na dog,"{label}"\n')

    with pytest.raises(DataError, match=rf"train\.csv, line 3: the label '{label}' is not a finite number"):
        prepare(folder)


@pytest.mark.parametrize("label", ["true", "[1]", '{"a": 1}', "-Infinity", "NaN"])
def test_a_json_label_that_is_not_a_finite_number_is_named_by_line(folder: Path, label: str) -> None:
    (folder / "train.csv").unlink()
    (folder / "train.jsonl").write_text(f'{{"text": "a", "label": 1}}\n{{"text": "a", "label": {label}}}\n')

    with pytest.raises(DataError, match=r"train\.jsonl, line 2: the label .* is not a finite number"):
        prepare(folder)


def test_a_row_without_a_number_is_named_and_can_be_skipped(folder: Path) -> None:
    (folder / "train.csv").write_text("sentence,score\na cat,1\na dog,\na bird,2\n")

    with pytest.raises(DataError, match=r"train\.csv, line 3: no label \(score is ''\)"):
        prepare(folder)
    assert prepare(folder, max_bad_rows=1).splits["train"][[0, 1]]["label"] == [1.0, 2.0]


def test_a_test_split_without_numbers_is_predicted(folder: Path) -> None:
    (folder / "test.csv").write_text("sentence\na cat\n")
    splits = {"train": "train.csv", "test": "test.csv"}

    made = prepare(folder, splits=splits, columns={"label": "score"})

    assert made.targets(made.collate(made.splits["test"][[0]], tiny.HERE)) == Targets(0.0, 0)


def test_a_glue_task_with_classes_is_refused_and_the_right_task_is_named(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"labels of data\.name=sst2 are negative, positive, not numbers.*classification"
    ):
        prepare(folder, name="sst2")

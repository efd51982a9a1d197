"""multi_label: losses and metrics by hand, lists of labels in every format, padding, and the same numbers on any number of ranks."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config.schema import Config, Model
from dtrain.config.task import MultiLabel
from dtrain.data.label_lists import read_labels
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.errors import DataError
from dtrain.models.load import load_model
from dtrain.tasks.build import build_task
from dtrain.tasks.multi_label import MultiLabelTask
from dtrain.tasks.protocol import Targets
from dtrain.training.evaluation import evaluate_split
from tests.support import tiny, training
from tests.support.evaluated import records_of
from tests.support.multirank import run_ranks
from tests.support.tiny import HERE, Table
from tests.support.training import Recorder, Setting

BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
LABELS = ("art", "law", "war")
SETTING = Setting(steps=6, learning_rate=0.5)
"""21 rows, in steps of 8 and micro-batches of 3: no number of ranks divides them."""


class Says(nn.Module):
    """A model with fixed logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, **_inputs: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits)


def rows(number: int, seed: int) -> Table:
    ids, draw = tiny.sentences(number, seed=seed)[[*range(number)]]["input_ids"], random.Random(seed)
    labels = [[index for index in range(3) if draw.random() < 0.4] for _ in ids]
    return Table({"input_ids": ids, "label": [*labels[:-1], None]})


def task(**splits: Table) -> MultiLabelTask:
    splits = splits or {"train": rows(21, seed=0), "validation": rows(11, seed=1)}
    return MultiLabelTask(splits, tiny.tokenizer(), LABELS, MultiLabel(name="multi_label"), max_length=32)


def model() -> Any:
    made = task()
    settings = Model(from_scratch=True, config=BERT)
    return load_model(settings, head=made.head, head_config=made.head_config, tokenizer=made.tokenizer, seed=0)


def minus_log_sigmoid(value: float) -> float:
    return math.log1p(math.exp(-value))


def test_the_loss_is_the_sum_of_every_labels_cross_entropy_and_a_row_without_a_list_has_no_target() -> None:
    batch = task().collate({"input_ids": [[2, 5, 3], [2, 5, 6, 3], [2, 3]], "label": [[0, 2], [], None]}, HERE)
    logits = [[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [5.0, 5.0, 5.0]]
    expected = [
        minus_log_sigmoid(2.0) + minus_log_sigmoid(1.0) + minus_log_sigmoid(0.5),
        minus_log_sigmoid(3.0) + math.log(2) + minus_log_sigmoid(-1.0),
        0.0,
    ]

    scored = task().score(Says(logits), batch, lock_step=False)

    assert task().loss(Says(logits), batch).item() == pytest.approx(sum(expected), rel=1e-6)
    assert scored.loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert scored.targets.tolist() == [3, 3, 0]
    assert task().targets(batch) == Targets(weight=6.0, count=6)
    assert scored.prediction is not None
    assert scored.prediction.tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_the_loss_per_target_is_that_of_transformers() -> None:
    made, module = task(), model().eval()
    columns = made.splits["train"][[*range(5)]]
    batch = made.collate(columns, HERE)

    ours = made.loss(module, batch).item() / made.targets(batch).weight

    assert module.config.problem_type == "multi_label_classification"
    assert module(**batch).loss.item() == pytest.approx(ours, rel=1e-6)


def test_the_metrics_are_those_worked_out_by_hand() -> None:
    labels = [[0, 1], [2], [], [0], None]
    found = [[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]]
    made = task(validation=Table({"input_ids": [[2, 3]] * 5, "label": labels}))

    metrics = made.metrics("validation", loss=0.0, predictions=found)

    # art: 1 right, 1 missed; law: 1 right, 1 too many; war: 1 right. Rows 0 and 2 are right in all labels.
    assert metrics == pytest.approx(
        {
            "f1_micro": 2 * 3 / (2 * 3 + 1 + 1),
            "f1_macro": (2 / 3 + 2 / 3 + 1) / 3,
            "precision_micro": 3 / 4,
            "recall_micro": 3 / 4,
            "subset_accuracy": 2 / 4,
        }
    )
    assert made.records("validation", found)[1] == {"prediction": ["law", "war"], "reference": ["war"]}
    assert made.records("validation", found)[4]["reference"] is None
    assert set(metrics) == set(made.metric_names)


def test_a_label_that_never_occurs_and_is_never_predicted_counts_as_0_in_the_macro_average() -> None:
    made = task(validation=Table({"input_ids": [[2, 3]], "label": [[0]]}))

    metrics = made.metrics("validation", loss=0.0, predictions=[[1, 0, 0]])

    assert (metrics["f1_micro"], metrics["f1_macro"]) == pytest.approx((1.0, 1 / 3))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["law", "art"], ["law", "art"]),
        ([], []),
        ("", []),
        (" law; art ;law;", ["law", "art"]),
        ('["law", "art"]', ["law", "art"]),
        ([1, 2], ["1", "2"]),
        (None, None),
    ],
)
def test_a_list_of_labels_may_be_a_text(value: Any, expected: list[str] | None) -> None:
    assert read_labels(value, "a.csv, line 2", separator=";") == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "the labels must be a list, or a text with ',' between them"),
        (["law", None], "label 2 of .* is empty"),
        ([["law"]], "a label is a name or a number"),
        ('["law"', "start with \\[ but are not a list in JSON"),
    ],
)
def test_what_is_no_list_of_labels_is_a_bad_row(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"a.csv, line 2: .*{message}"):
        read_labels(value, "a.csv, line 2", separator=",")


def prepared(folder: Path, files: dict[str, str], **data: Any) -> MultiLabelTask:
    (folder / "data").mkdir()
    for name, text in files.items():
        (folder / "data" / name).write_text(text)
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "task": {"name": "multi_label"},
            "model": {"from_scratch": True, "tokenizer": "char", "config": BERT},
            "data": {"path": folder / "data", "cache_dir": folder / "cache", **data},
        }
    )
    made = build_task(config, ONE_PROCESS)
    assert isinstance(made, MultiLabelTask)
    return made


def test_rows_of_a_table_become_indices_of_the_sorted_labels(tmp_path: Path) -> None:
    csv = 'text,labels\na cat,"war,art"\na dog,\na bird,law\n'
    lines = [{"text": "a cat", "labels": ["law"]}, {"text": "a dog", "labels": []}]

    made = prepared(
        tmp_path, {"train.csv": csv, "validation.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}
    )

    assert made.labels == LABELS
    assert made.splits["train"][[0, 1, 2]]["label"] == [[2, 0], [], [1]]
    assert made.splits["validation"][[0, 1]]["label"] == [[1], []]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train.csv": "text,labels\na,art\nb,law\n", "validation.csv": "text,labels\na,art\nb,sea\n"},
            "validation.csv, line 3: 'sea' is not one of the known labels: art, law",
        ),
        ({"train.csv": "text,labels\na,art\nb,\n"}, "the training rows have 1 different label"),
        ({"train.jsonl": '{"text": "a", "labels": ["x", "y"]}\n{"text": "b", "labels": null}\n'}, "line 2: no label"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_their_place(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, files)


def trained(context: RankContext, setting: Setting) -> dict[str, Any]:
    """Collective. Evaluates the new model, then trains it."""
    run, recorder = training.build(context, setting, model(), task()), Recorder()
    result = evaluate_split(run.engine, run.task, "validation", micro_batch_size=4)
    run.go(recorder).release()
    return {"steps": recorder.steps, "metrics": dict(result.metrics), "records": records_of(result, context)}


def assert_same(ranks: list[dict[str, Any]], *, digits: bool) -> None:
    expected = trained(ONE_PROCESS, SETTING)
    for found in ranks:
        if digits:
            assert (found["metrics"], found["records"]) == (expected["metrics"], expected["records"])
        for step, alone in zip(found["steps"], expected["steps"], strict=True):
            assert step["targets"] == alone["targets"]
            assert step["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            assert step["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "engine", "stage"), [(2, "auto", None), (3, "auto", None), (2, "deepspeed", 3)])
def test_ranks_compute_what_one_process_computes(world_size: int, engine: str, stage: int | None) -> None:
    setting = Setting(steps=6, learning_rate=0.5, engine=engine, zero_stage=stage)

    assert_same(run_ranks(trained, world_size, setting, timeout_s=120), digits=stage is None)


@pytest.mark.ranks
def test_a_wrong_gradient_is_noticed() -> None:
    broken = Setting(steps=6, learning_rate=0.5, broken="scaled_gradient")

    with pytest.raises(AssertionError):
        assert_same(run_ranks(trained, 2, broken), digits=True)

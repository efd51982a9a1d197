"""dtrain.fit: one's own model, task and monitors, and what a run leaves in its folder.

A run sets the variables that libraries read of the context, so each test's runs are in a process of their own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain.config.task import Classification
from dtrain.data.seeding import DataPosition
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, NonFiniteError
from dtrain.runs.jsonl import read_metrics
from dtrain.tasks.classification import HEAD, ClassificationTask
from dtrain.tasks.protocol import Batch, ScoredBatch, Targets
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import faults, tiny
from tests.support.faults import Journal
from tests.support.multirank import run_ranks

pytestmark = pytest.mark.ranks


def config(folder: str, **sections: Any) -> dtrain.Config:
    return dtrain.Config.model_validate(
        {
            "run": {"name": "mine", "output_dir": folder},
            "task": {"name": "classification"},
            "optim": {"learning_rate": 3e-3},
            **sections,
            "train": {"epochs": 2, "global_batch_size": 8, "log_every": 3, **sections.get("train", {})},
        }
    )


def own_task(rows: int = 24) -> ClassificationTask:
    splits = {"train": tiny.sentences(rows), "validation": tiny.sentences(10, seed=1)}
    return ClassificationTask(
        splits, tiny.tokenizer(), ["no", "yes"], Classification(name="classification"), max_length=32
    )


def in_a_process(function: Any, *args: Any) -> Any:
    return run_ranks(function, 1, *args)[0]


def forget_place() -> None:
    """The helper has set them for this process; a user's script starts without."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


# Ten lines


def ten_lines(_context: RankContext, folder: str) -> dict[str, Any]:
    forget_place()
    names = ["no", "yes"]
    rows, held_out = tiny.sentences(24), tiny.sentences(10, seed=1)
    options = Classification(name="classification")
    task = ClassificationTask({"train": rows, "validation": held_out}, tiny.tokenizer(), names, options, max_length=32)
    model = tiny.bert()
    before = [type(part).__name__ for part in model.modules()]
    result = dtrain.fit(config(folder, model={"fast_linear": "on"}), model=model, task=task)
    is_as_given = [type(part).__name__ for part in model.modules()] == before
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    left = {"is_as_given": is_as_given, "hooks": hooks, "attention": model.config._attn_implementation}
    return {"metrics": result.metrics, "folder": str(result.run_dir), "left": left}


def test_ten_lines_train_an_own_model_on_own_data_and_leave_a_whole_run_folder(tmp_path: Path) -> None:
    result = in_a_process(ten_lines, str(tmp_path))
    folder = tmp_path / "mine"

    assert Path(result["folder"]) == folder
    assert result["left"] == {"is_as_given": True, "hooks": 0, "attention": "sdpa"}
    expected = {"loss", "accuracy", "f1", "precision", "recall", "matthews_correlation"}
    assert set(result["metrics"]) == expected
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval"] == result["metrics"]
    assert (summary["step"], summary["updates"], summary["examples"]) == (6, 6, 48)
    assert (summary["world_size"], summary["engine"], summary["command"]) == (1, "single", "train")
    assert {"python", "torch", "transformers"} <= set(summary["versions"])

    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["event"] == "checkpoint"] == [3, 6]
    events = [
        line for line in lines if line["event"] != "checkpoint"
    ]  # logged when they are complete, at any time after
    assert [event["event"] for event in events] == [
        "start",
        "train",
        "train",
        "eval",
        "train",
        "step_time",
        "eval",
        "end",
    ]
    assert [event["step"] for event in events if event["event"] == "train"] == [1, 3, 6]
    assert {key: events[-2][key] for key in expected} == result["metrics"]
    assert events[1]["learning_rate"] == 3e-3

    predictions = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert [line["example_index"] for line in predictions] == list(range(10))
    truth = [["no", "yes"][label] for label in tiny.sentences(10, seed=1)[[*range(10)]]["label"]]
    assert [line["reference"] for line in predictions] == truth
    right = [line["prediction"] == line["reference"] for line in predictions]
    assert result["metrics"]["accuracy"] == pytest.approx(sum(right) / 10, abs=1e-12)
    assert result["metrics"]["loss"] == pytest.approx(sum(line["loss"] for line in predictions) / 10, rel=1e-12)

    resolved = dtrain.load_config(folder / "config.yaml", [])
    assert resolved.run.name == "mine"
    assert resolved.optim.learning_rate == 3e-3


def test_the_saved_model_loads_with_transformers_alone_and_predicts_what_was_written(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    in_a_process(ten_lines, str(tmp_path))
    saved = tmp_path / "mine" / "model"

    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)

    assert tokenizer("the cat sees")["input_ids"] == tiny.tokenizer()("the cat sees")["input_ids"]
    lines = (tmp_path / "mine" / "predictions" / "validation.jsonl").read_text().splitlines()
    rows = tiny.sentences(10, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), tiny.bert().parameters(), strict=True))
    for index, line in enumerate(map(json.loads, lines)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(rows[[index]]["input_ids"])).logits[0]
        loss = float(-logits.log_softmax(0)[rows[[index]]["label"][0]])
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["prediction"] == ["no", "yes"][int(logits.argmax())]


# An own task from nothing


class Lengths:
    """How long is the sentence? A regression that dtrain knows nothing of."""

    name, head = "lengths", HEAD
    needs_padding = True
    head_config: Mapping[str, Any] = {"num_labels": 1}
    max_length = 32
    metric_names: Sequence[str] = ("worst_error",)

    def __init__(self) -> None:
        self.tokenizer = tiny.tokenizer()
        self.splits: Mapping[str, Any] = {"train": tiny.sentences(24), "validation": tiny.sentences(9, seed=1)}

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        batch: Batch = dict(self.tokenizer.pad({"input_ids": rows["input_ids"]}, return_tensors="pt"))
        return {**batch, "labels": torch.tensor([len(ids) / 20 for ids in rows["input_ids"]])}

    def targets(self, batch: Batch) -> Targets:
        return Targets(float(len(batch["labels"])), len(batch["labels"]))

    def _squares(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        found = model(**inputs).logits[:, 0]
        return found, (found - batch["labels"]) ** 2

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self._squares(model, batch)[1].sum()

    def score(self, module: Any, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        found, squares = self._squares(module, batch)
        return ScoredBatch(squares.double(), torch.ones(len(squares), dtype=torch.int64), found.double())

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        truth = [len(ids) / 20 for ids in self.splits[split][[*range(len(self.splits[split]))]]["input_ids"]]
        return {"worst_error": max(abs(a - b) for a, b in zip(truth, predictions, strict=True))}

    def records(self, split: str, predictions: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        return [{"prediction": found, "reference": None} for found in predictions]


def own_kind(_context: RankContext, folder: str) -> dict[str, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    forget_place()
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=26, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    shape.num_labels = 1
    settings = config(folder, train={"epochs": 8}, evaluation={"best": {"metric": "worst_error", "mode": "max"}})
    result = dtrain.fit(settings, model=BertForSequenceClassification(shape), task=Lengths())  # type: ignore[arg-type]
    return {"metrics": result.metrics}


def test_an_own_kind_of_task_brings_its_own_loss_and_metrics(tmp_path: Path) -> None:
    metrics = in_a_process(own_kind, str(tmp_path))["metrics"]

    folder = tmp_path / "mine"
    evaluations = [event for event in read_metrics(folder / "metrics.jsonl") if event["event"] == "eval"]
    errors = [event["worst_error"] for event in evaluations]
    assert evaluations[-1]["loss"] < 0.5 * evaluations[0]["loss"]  # it learns
    # The best was asked to be the worst here, so that the best step is not the last one.
    assert set(metrics) == {"loss", "worst_error"}
    assert metrics["worst_error"] == max(errors) == errors[0]
    assert json.loads((folder / "summary.json").read_text())["best_step"] == 3
    lines = [json.loads(line) for line in (folder / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert max(math.sqrt(line["loss"]) for line in lines) == pytest.approx(metrics["worst_error"], rel=1e-6)


def test_the_saved_model_is_the_best_steps(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    in_a_process(own_kind, str(tmp_path))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine" / "model").eval()

    task, lines = Lengths(), (tmp_path / "mine" / "predictions" / "validation.jsonl").read_text().splitlines()
    for index, line in enumerate(map(json.loads, lines)):
        with torch.no_grad():
            found = saved(input_ids=torch.tensor(task.splits["validation"][[index]]["input_ids"])).logits[0, 0]
        assert line["prediction"] == pytest.approx(float(found), rel=1e-4)


# Monitors, stopping, going wrong


class StopAt:
    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, record: StepRecord) -> Decision:
        return Decision.STOP if record.step == self._step else Decision.CONTINUE


def several(_context: RankContext, folder: str) -> dict[str, Any]:
    """Runs in one process, one after the other."""
    forget_place()
    found: dict[str, Any] = {}

    def named(name: str, **sections: Any) -> dtrain.Config:
        return config(folder, run={"name": name, "output_dir": folder}, **sections)

    journal = Journal()
    best = {"evaluation": {"best": {"metric": "loss"}}}
    stopped = dtrain.fit(named("stopped", **best), model=tiny.bert(), task=own_task(), monitors=[journal, StopAt(3)])
    found["stopped"] = {"steps": [record.step for record in journal.records], "metrics": stopped.metrics}

    again = dtrain.fit(named("stopped", **best), model=tiny.bert(), task=own_task())
    found["again"] = {"metrics": again.metrics, "folder": again.run_dir == stopped.run_dir}

    first = dtrain.fit(named("first"), model=tiny.bert(), task=own_task())
    second = dtrain.fit(named("second"), model=tiny.bert(), task=own_task())
    found["equal"] = first.metrics == second.metrics

    never = dtrain.fit(named("never", train={"eval_every": "never"}), model=tiny.bert(), task=own_task())
    found["never"] = never.metrics

    for name, expected, settings in (
        ("nan", NonFiniteError, {"train": {"shuffle": False}}),
        ("metric", ConfigError, {"evaluation": {"best": {"metric": "blue", "mode": "max"}}}),
    ):
        module, learns = faults.model("loss", faults.SETTING), faults.task(faults.SETTING)
        try:
            dtrain.fit(named(name, **settings), model=module, task=learns)
        except expected as error:
            found[name] = {"error": str(error), "files": sorted(p.name for p in (Path(folder) / name).iterdir())}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("runs")
    return in_a_process(several, str(folder)), folder


def test_an_own_monitor_sees_every_step_and_may_end_the_run_in_good_order(runs: tuple[dict[str, Any], Path]) -> None:
    found, folder = runs
    events = read_metrics(folder / "stopped" / "metrics.jsonl")
    evaluations = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}

    # Step 3 ends an epoch and is evaluated, so that the wish holds at once.
    assert found["stopped"]["steps"] == [1, 2, 3]
    assert list(evaluations) == [3]
    assert found["stopped"]["metrics"]["loss"] == evaluations[3]
    assert (folder / "stopped" / "model" / "model.safetensors").is_file()


def test_a_finished_run_gives_its_result_again(runs: tuple[dict[str, Any], Path]) -> None:
    assert runs[0]["again"] == {"metrics": runs[0]["stopped"]["metrics"], "folder": True}


def test_one_process_may_run_several_times_and_gets_the_same_answer(runs: tuple[dict[str, Any], Path]) -> None:
    assert runs[0]["equal"]


def test_without_evaluations_there_are_no_metrics_but_a_model(runs: tuple[dict[str, Any], Path]) -> None:
    found, folder = runs

    assert found["never"] == {}
    assert (folder / "never" / "model" / "model.safetensors").is_file()
    assert json.loads((folder / "never" / "summary.json").read_text())["eval"] == {}


def test_a_loss_that_is_not_a_number_leaves_the_fault_in_the_log_and_no_model(
    runs: tuple[dict[str, Any], Path],
) -> None:
    found, folder = runs
    events = read_metrics(folder / "nan" / "metrics.jsonl")

    assert (
        "Step 2: the loss is nan (rank 0, micro-batch 0, examples 8, 9, 10, 11, 12, 13, 14, 15)"
        in found["nan"]["error"]
    )
    assert [event["event"] for event in events] == ["start", "train", "train", "fault", "end"]
    assert (events[2]["step"], events[2]["loss"], events[2]["applied"]) == (2, "nan", False)
    assert events[3]["example_index"] == list(range(8, 16))
    assert not {"model", "summary.json"} & set(found["nan"]["files"])


def test_a_best_metric_that_will_not_come_is_refused_before_the_first_step(runs: tuple[dict[str, Any], Path]) -> None:
    found, folder = runs

    assert (
        "evaluation.best.metric=blue is not a metric of this run. This task has loss, accuracy"
        in found["metric"]["error"]
    )
    assert not (folder / "metric" / "metrics.jsonl").exists()


def stopped_after_five(_context: RankContext, folder: str) -> dict[str, Any]:
    """Evaluated at step 3; the wish of step 4 holds after step 5."""
    forget_place()
    settings = config(folder, train={"epochs": 4}, evaluation={"best": {"metric": "loss"}})
    result = dtrain.fit(settings, model=tiny.bert(dropout=0.0), task=own_task(), monitors=[StopAt(4)])
    return {"metrics": result.metrics}


def test_a_run_that_stops_between_evaluations_still_compares_its_last_step_with_the_best(tmp_path: Path) -> None:
    result = in_a_process(stopped_after_five, str(tmp_path))

    events = read_metrics(tmp_path / "mine" / "metrics.jsonl")
    evaluations = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}
    assert list(evaluations) == [3, 5]
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best == 5  # or this test could not fail
    assert json.loads((tmp_path / "mine" / "summary.json").read_text())["best_step"] == 5
    assert result["metrics"]["loss"] == evaluations[5]

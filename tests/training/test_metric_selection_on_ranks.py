"""A function of the user's own judges gathered data, once: the same numbers on any number of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dtrain import console
from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.config.task import Classification
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.tasks.classification import ClassificationTask
from tests.support import tiny
from tests.support.multirank import run_ranks

pytestmark = pytest.mark.ranks

OWN = """
import json, os

def score(predictions, references):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps([predictions, references]) + "\\n")
    hits = sum(p == r for p, r in zip(predictions, references))
    weights = sum(place * (p == "yes") for place, p in enumerate(predictions))
    return {"hits": hits, "places_of_yes": weights}
"""


def write(home: Path, *, best: str) -> str:
    """The function, and a config beside it; gives the folder."""
    (home / "own_score.py").write_text(OWN)
    (home / "own.yaml").write_text(
        "task: {name: classification}\n"
        f"run: {{output_dir: {home}}}\n"
        "train: {epochs: 2, global_batch_size: 8, eval_every: 2}\n"
        "optim: {learning_rate: 3e-3}\n"
        f"evaluation: {{metrics: [f1], factory: own_score:score, best: {{metric: {best}, mode: max}}}}\n"
        "tracking: {tensorboard: false}\n"
    )
    return str(home)


def fit(context: RankContext, folder: str) -> dict[str, Any]:
    """Trains with the function that lies in `folder`; run and calls are named after the number of ranks."""
    home, world = Path(folder), context.world_size
    os.environ["CALLS"] = str(home / f"calls-{world}")
    splits = {"train": tiny.sentences(24), "validation": tiny.sentences(5, seed=1)}
    options = Classification(name="classification")
    task = ClassificationTask(splits, tiny.tokenizer(), ["no", "yes"], options, max_length=32)
    console.configure_logging(rank=context.rank, world_size=world)
    config = load_config(home / "own.yaml", [f"run.name=ranks-{world}"])
    try:
        found = run_train(config, context, model=tiny.bert(), task=task)
    except ConfigError as error:
        return {"error": str(error)}
    return {"metrics": found.metrics}


def evaluations(folder: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time_s", "monotonic_s", "seconds")
    return [{key: e[key] for key in e if key not in clocks} for e in events if e["event"] == "eval"]


def test_the_users_metrics_are_the_same_on_one_process_and_on_three_ranks_and_may_choose_the_best(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, best="hits")

    (one,) = run_ranks(fit, 1, folder)
    three = run_ranks(fit, 3, folder)

    assert set(one["metrics"]) == {"loss", "f1", "hits", "places_of_yes"}
    assert [each["metrics"] for each in three] == [three[0]["metrics"]] * 3
    alone, together = evaluations(tmp_path / "ranks-1"), evaluations(tmp_path / "ranks-3")
    assert len(alone) == 3
    for ours, theirs in zip(alone, together, strict=True):
        assert [ours[key] for key in ("step", "f1", "hits", "places_of_yes")] == [
            theirs[key] for key in ("step", "f1", "hits", "places_of_yes")
        ]
    assert one["metrics"]["hits"] == max(each["hits"] for each in alone)
    calls = {name: (tmp_path / name).read_text().splitlines() for name in ("calls-1", "calls-3")}
    assert calls["calls-1"] == calls["calls-3"]
    assert len(calls["calls-1"]) == 3, "once for each evaluation, whatever the number of ranks"
    lines = (tmp_path / "ranks-1" / "predictions" / "validation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [[r["prediction"] for r in records], [r["reference"] for r in records]] in [
        json.loads(call) for call in calls["calls-1"]
    ]


def test_a_best_metric_that_the_function_does_not_give_ends_the_run_at_the_first_evaluation(tmp_path: Path) -> None:
    first, second = run_ranks(fit, 2, write(tmp_path, best="hist"))

    assert first == second
    assert "evaluation.best.metric=hist is not a metric of this run. This task has loss, f1, hits," in first["error"]
    assert len((tmp_path / "calls-2").read_text().splitlines()) == 1

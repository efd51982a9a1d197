"""Multiple choice gives the same losses, accuracy and choices on 2 and 3 ranks as on one process."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.tasks.multiple_choice import MultipleChoiceTask
from tests.support import parity, tiny
from tests.support.multirank import run_ranks
from tests.support.tiny import Table

pytestmark = pytest.mark.ranks


def rows(number: int, *, seed: int) -> Table:
    rng = random.Random(seed)
    ids = [[[2, *rng.choices(range(5, 25), k=rng.randint(2, 9)), 3] for _ in range(3)] for _ in range(number)]
    return Table({"input_ids": ids, "label": [rng.randrange(3) for _ in range(number)]})


def task() -> MultipleChoiceTask:
    splits = {"train": rows(13, seed=0), "validation": rows(7, seed=1)}
    return MultipleChoiceTask(splits, tiny.tokenizer(), max_length=16)


def model() -> Any:
    from transformers import BertForMultipleChoice

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForMultipleChoice(tiny.bert().config)


def trained(context: RankContext, broken: str | None = None, folder: str | None = None) -> Any:
    return parity.trained(context, task(), model(), broken, folder)


@cache
def truth() -> Any:
    return trained(ONE_PROCESS)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_losses_and_choices_of_one_process(world_size: int) -> None:
    for found in run_ranks(trained, world_size):
        parity.assert_same(truth(), found)


def test_a_repeated_example_is_noticed() -> None:
    with pytest.raises(AssertionError):
        parity.assert_same(truth(), run_ranks(trained, 2, "repeated_example")[0])


def test_accuracy_is_that_of_the_written_predictions() -> None:
    records = truth()["records"]

    assert truth()["metrics"]["accuracy"] == pytest.approx(
        accuracy_score([r["reference"] for r in records], [r["prediction"] for r in records]), abs=1e-12
    )


def test_plain_transformers_loads_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForMultipleChoice

    learner = model()
    parity.trained(ONE_PROCESS, task(), learner, None, str(tmp_path))
    inputs = task().collate(rows(2, seed=2)[[0, 1]], tiny.HERE)
    del inputs["labels"]

    parity.assert_loads(tmp_path, AutoModelForMultipleChoice, inputs, parity.logits_of(learner, inputs))

"""Question answering gives the same losses, answers and scores on 2 and 3 ranks as on one process.

Questions have one to four windows, so that micro-batches of as many examples hold different numbers of targets.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.config.task import QuestionAnswering
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.tasks.answers import squad_scores
from dtrain.tasks.question_answering import QuestionAnsweringTask, encode_windows
from tests.support import parity, tiny
from tests.support.multirank import run_ranks
from tests.support.tiny import Table

pytestmark = pytest.mark.ranks


def rows(number: int, *, seed: int) -> Table:
    rng = random.Random(seed)
    made: dict[str, list[Any]] = {key: [] for key in ("question", "context", "id", "answers", "answer_starts")}
    for index in range(number):
        words = rng.choices(tiny.WORDS, k=rng.randint(3, 24))
        first = rng.randrange(len(words) - 1)
        made["question"].append(words[first])
        made["context"].append(" ".join(words))
        made["id"].append(str(index))
        made["answers"].append([" ".join(words[first : first + 2])])
        made["answer_starts"].append([len(" ".join(["", *words[:first]]))])
    return Table(encode_windows(made, tiny.tokenizer(), [""] * number, max_length=12, doc_stride=3))


def task() -> QuestionAnsweringTask:
    splits = {"train": rows(13, seed=0), "validation": rows(7, seed=1)}
    settings = QuestionAnswering(name="question_answering", doc_stride=3)
    return QuestionAnsweringTask(splits, tiny.tokenizer(), settings, max_length=12)


def model() -> Any:
    from transformers import BertForQuestionAnswering

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForQuestionAnswering(tiny.bert().config)


def trained(context: RankContext, broken: str | None = None) -> Any:
    return parity.trained(context, task(), model(), broken, None)


@cache
def truth() -> Any:
    return trained(ONE_PROCESS)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_losses_and_answers_of_one_process(world_size: int) -> None:
    for found in run_ranks(trained, world_size):
        parity.assert_same(truth(), found)


def test_micro_batches_have_different_numbers_of_windows() -> None:
    targets = [step["targets"] for step in truth()["steps"]]

    assert len(set(targets)) > 1
    assert all(step > 5 for step in targets[:2])  # more windows than the five examples of a step


def test_a_repeated_example_is_noticed() -> None:
    with pytest.raises(AssertionError):
        parity.assert_same(truth(), run_ranks(trained, 2, "repeated_example")[0])


def test_metrics_are_those_of_the_written_predictions() -> None:
    records = truth()["records"]

    scores = squad_scores([r["prediction"] for r in records], [r["reference"] for r in records])
    metrics = truth()["metrics"]
    assert {name: metrics[name] for name in scores} == pytest.approx(scores, abs=1e-12)
    assert [record["id"] for record in records] == [str(index) for index in range(7)]


def test_plain_transformers_loads_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    learner, learns = model(), task()
    parity.trained(ONE_PROCESS, learns, learner, None, str(tmp_path))
    batch = learns.collate(rows(2, seed=2)[[0, 1]], tiny.HERE)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}

    parity.assert_loads(tmp_path, AutoModelForQuestionAnswering, inputs, parity.logits_of(learner, inputs))

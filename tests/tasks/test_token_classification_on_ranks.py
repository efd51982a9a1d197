"""Token classification gives the same losses, tags and scores on 2 and 3 ranks as on one process.

Sentences have one to twelve words, so that the ranks' shares of the targets are uneven.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.tasks.token_classification import TokenClassificationTask, encode_words
from tests.support import parity, tiny
from tests.support.multirank import run_ranks
from tests.support.tiny import Table

pytestmark = pytest.mark.ranks

LABELS = ("B-PER", "I-PER", "O")


def rows(number: int, *, seed: int) -> Table:
    rng = random.Random(seed)
    sentences = [rng.choices(tiny.WORDS, k=rng.randint(1, 12)) for _ in range(number)]
    tags = [[min(tiny.WORDS.index(word) % 4, 2) for word in words] for words in sentences]
    return Table({**encode_words(sentences, tiny.tokenizer(), max_length=16), "tags": tags})


def task() -> TokenClassificationTask:
    splits = {"train": rows(13, seed=0), "validation": rows(7, seed=1)}
    return TokenClassificationTask(splits, tiny.tokenizer(), LABELS, max_length=16)


def model() -> Any:
    from transformers import BertForTokenClassification

    config = tiny.bert().config
    config.num_labels = len(LABELS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForTokenClassification(config)


def trained(context: RankContext, broken: str | None = None) -> Any:
    return parity.trained(context, task(), model(), broken, None)


@cache
def truth() -> Any:
    return trained(ONE_PROCESS)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_losses_and_tags_of_one_process(world_size: int) -> None:
    for found in run_ranks(trained, world_size):
        parity.assert_same(truth(), found)


def test_a_repeated_example_is_noticed() -> None:
    with pytest.raises(AssertionError):
        parity.assert_same(truth(), run_ranks(trained, 2, "repeated_example")[0])


def test_metrics_are_those_of_seqeval_on_the_written_predictions() -> None:
    records, metrics = truth()["records"], truth()["metrics"]
    written = ([r["reference"] for r in records], [r["prediction"] for r in records])

    assert metrics["accuracy"] == pytest.approx(accuracy_score(*written), abs=1e-12)
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert metrics[name] == pytest.approx(score(*written, zero_division=0), abs=1e-12)
    assert 0 < metrics["f1"] < 1  # or nothing would be seen


def test_plain_transformers_loads_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    learner, learns = model(), task()
    parity.trained(ONE_PROCESS, learns, learner, None, str(tmp_path))
    inputs = learns.collate(rows(2, seed=2)[[0, 1]], tiny.HERE)
    del inputs["labels"]

    parity.assert_loads(tmp_path, AutoModelForTokenClassification, inputs, parity.logits_of(learner, inputs))

"""Masked language models: the same tokens are hidden, and the same loss found, however the work is shared out.

A task whose masks are drawn per rank, as trainers that seed their collators by process do, must be rejected.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dtrain.config.task import MaskedLm
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine.forward_only import ForwardOnly
from dtrain.tasks.masked_lm import MaskedLmTask
from dtrain.training.evaluation import evaluate_split
from dtrain.training.export import export_model
from tests.support import tiny, training
from tests.support.evaluated import records_of
from tests.support.multirank import run_ranks
from tests.support.training import Recorder, Setting

pytestmark = pytest.mark.ranks

# 21 rows in global batches of 8: the last step of an epoch has 5, in micro-batches of 3 and 2. Seven steps are 2.3 epochs.
SETTING = Setting(steps=7, dropout=0.1, learning_rate=0.2)


def model() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForMaskedLM(BertConfig(vocab_size=25, max_position_embeddings=32, **sizes))


def task(*, seed: int = 7) -> MaskedLmTask:
    splits = {"train": tiny.sentences(SETTING.rows), "validation": tiny.sentences(11, seed=1)}
    return MaskedLmTask(splits, tiny.tokenizer(), MaskedLm(name="masked_lm"), max_length=32, seed=seed)


def trained(context: RankContext, breaks: str = "", folder: str = "") -> dict[str, Any]:
    """Loss and targets of every step, the evaluation after the last, and what saving and loading changes."""
    learns = task(seed=7 + (context.rank if breaks == "masks_per_rank" else 0))
    setting = Setting(**{**SETTING.__dict__, "workers": 1 if breaks == "workers" else 0})
    run = training.build(context, setting, model(), learns)
    recorder = Recorder()
    engine = run.go(recorder)
    found = evaluate_split(engine, learns, "validation", micro_batch_size=4)
    if folder:
        export_model(engine, learns.tokenizer, Path(folder))
    return {
        "steps": recorder.steps,
        "metrics": dict(found.metrics),
        "records": records_of(found, context),
        "weights": training.weights_of(engine),
    }


@cache
def alone() -> dict[str, Any]:
    return trained(ONE_PROCESS)


def assert_same(found: dict[str, Any]) -> None:
    expected = alone()
    assert [step["targets"] for step in found["steps"]] == [step["targets"] for step in expected["steps"]]
    assert training.worst(found, expected) < 1e-6
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)  # of weights that are 1e-7 apart
    assert found["metrics"]["accuracy"] == expected["metrics"]["accuracy"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_mask_and_train_like_one_process(world_size: int) -> None:
    for found in run_ranks(trained, world_size):
        assert_same(found)


def test_masks_drawn_per_rank_are_rejected() -> None:
    found = run_ranks(trained, 2, "masks_per_rank")[0]

    with pytest.raises(AssertionError):
        assert_same(found)


def test_data_workers_draw_the_same_masks() -> None:
    found = trained(ONE_PROCESS, "workers")

    assert found == alone()


def test_each_epoch_masks_other_tokens() -> None:
    per_epoch = 3

    targets = [step["targets"] for step in alone()["steps"]]

    assert sum(targets[:per_epoch]) != sum(targets[per_epoch : 2 * per_epoch])


def evaluated(context: RankContext) -> dict[str, Any]:
    forward = ForwardOnly(model(), SETTING.config(), context)
    found = evaluate_split(forward, task(), "validation", micro_batch_size=2)
    return {"metrics": dict(found.metrics), "records": records_of(found, context)}


def test_evaluation_gives_the_digits_of_one_process() -> None:
    expected = evaluated(ONE_PROCESS)

    assert all(found == expected for found in run_ranks(evaluated, 3))
    assert len(expected["records"]) == 11
    assert all(record["targets"] >= 1 for record in expected["records"])


def test_the_saved_model_is_a_plain_masked_language_model(tmp_path: Path) -> None:
    weights = trained(ONE_PROCESS, folder=str(tmp_path / "model"))["weights"]

    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = model().eval()
    expected.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    inputs = tokenizer("the cat [MASK] a dog", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, expected(**inputs).logits, atol=1e-6)
    assert tokenizer.mask_token_id in inputs["input_ids"]

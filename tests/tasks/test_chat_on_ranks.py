"""Chat on several ranks: the loss of each step, the evaluation's digits, and a sharded model's export.

19 dialogues of uneven length of which replies only are learnt, one cut before its reply: ranks hold unequal numbers of
targets, the last step of an epoch has 3 dialogues in 1 micro-batch, and 3 to evaluate leave ranks empty.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.models.chat_format import TurnsFormat, encode_truncated
from dtrain.tasks.chat import ChatTask
from dtrain.training.evaluation import evaluate_split
from dtrain.training.export import export_model
from tests.support import tiny, training
from tests.support.evaluated import records_of
from tests.support.multirank import run_ranks
from tests.support.tiny import Table
from tests.support.training import Recorder, Setting, worst

pytestmark = pytest.mark.ranks

SETTING = Setting(rows=19, steps=6, global_batch_size=8, micro_batch_size=3, learning_rate=0.5)


def dialogues(rows: int, *, seed: int = 0) -> Table:
    rng, chat = random.Random(seed), TurnsFormat(tiny.tokenizer())
    encoded = []
    for row in range(rows):
        said = [" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 7))) for _ in range(rng.randint(2, 5))]
        if row == 1:
            said[0] = " ".join(tiny.WORDS * 2)  # longer than all that is kept: no target is left
        messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]
        encoded.extend(encode_truncated(chat, messages, max_length=24, replies_only=True)[0])
    return Table({"input_ids": [one.ids for one in encoded], "is_target": [one.is_target for one in encoded]})


def task() -> ChatTask:
    splits = {"train": dialogues(19), "validation": dialogues(11, seed=1), "validation_few": dialogues(3, seed=2)}
    return ChatTask(splits, tiny.tokenizer(), TurnsFormat(tiny.tokenizer()), max_length=24)


def gpt() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=25, n_layer=2, n_head=2, n_embd=16, n_positions=24))


def outcome(context: RankContext, setting: Setting, folder: str) -> dict[str, Any]:
    """Collective. The steps, the metrics of both splits and each dialogue's record; the model in `folder`."""
    built = training.build(context, setting, gpt(), task())
    recorder = Recorder()
    engine = built.go(recorder)
    found = {split: evaluate_split(engine, built.task, split, micro_batch_size=4) for split in built.task.splits}
    export_model(engine, built.task.tokenizer, Path(folder))
    engine.release()
    return {
        "steps": recorder.steps,
        "metrics": {split: dict(result.metrics) for split, result in found.items()},
        "records": {split: records_of(result, context) for split, result in found.items()},
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single") / "model"
    return {**outcome(ONE_PROCESS, SETTING, str(folder)), "folder": folder}


def assert_same(reference: dict[str, Any], other: dict[str, Any]) -> None:
    assert [step["targets"] for step in other["steps"]] == [step["targets"] for step in reference["steps"]]
    assert worst(reference, other) <= 1e-6
    assert worst(reference, other, "grad_norm") <= 1e-5
    for split, metrics in reference["metrics"].items():
        assert other["metrics"][split] == pytest.approx(metrics, rel=1e-5)  # weights differ in their last digits
        assert [r["targets"] for r in other["records"][split]] == [r["targets"] for r in reference["records"][split]]


def test_the_setting_is_uneven_and_learns(single: dict[str, Any]) -> None:
    assert len({step["targets"] for step in single["steps"]}) > 3
    assert single["steps"][-1]["loss"] < single["steps"][0]["loss"]
    assert [record["targets"] for record in single["records"]["train"]].count(0) == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_and_evaluate_like_one_process(single: dict[str, Any], tmp_path: Path, world_size: int) -> None:
    results = run_ranks(outcome, world_size, SETTING, str(tmp_path / "model"))

    assert_same(single, results[0])
    assert results[0]["metrics"] == results[-1]["metrics"]


def evaluation(context: RankContext, settings: str) -> dict[str, Any]:
    """Collective. The same untrained weights everywhere: metrics and records to the digit."""
    built = training.build(context, Setting(**json.loads(settings)), gpt(), task())
    found = {split: evaluate_split(built.engine, built.task, split, micro_batch_size=4) for split in built.task.splits}
    built.engine.release()
    return {split: [dict(result.metrics), records_of(result, context)] for split, result in found.items()}


def test_evaluation_gives_the_same_digits_on_three_ranks() -> None:
    settings = json.dumps({"rows": 19})

    one, three = evaluation(ONE_PROCESS, settings), run_ranks(evaluation, 3, settings)

    assert three[0] == json.loads(json.dumps(one))


def test_a_sharded_model_is_loaded_from_its_folder(single: dict[str, Any], tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    setting = replace(SETTING, engine="deepspeed", zero_stage=3)

    results = run_ranks(outcome, 2, setting, str(tmp_path / "model"), timeout_s=120)

    assert_same(single, results[0])
    models = [GPT2LMHeadModel.from_pretrained(path).eval() for path in (single["folder"], tmp_path / "model")]
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        one, sharded = (model(input_ids=ids).logits for model in models)
    assert float((one - sharded).abs().max()) <= 2e-6


def test_a_broken_run_is_rejected(single: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(outcome, 2, replace(SETTING, broken="repeated_example"), str(tmp_path / "model"))

    with pytest.raises(AssertionError):
        assert_same(single, results[0])

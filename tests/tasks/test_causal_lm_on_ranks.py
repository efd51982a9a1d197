"""Causal language models with windows and packed documents: training and evaluation are the same on several ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dtrain.config.task import CausalLm
from dtrain.data.packing import pack_segments, split_into_segments
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine.forward_only import ForwardOnly
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.training.evaluation import evaluate_split
from dtrain.training.export import export_model
from tests.support import tiny, training
from tests.support.evaluated import records_of
from tests.support.multirank import run_ranks
from tests.support.tiny import Table
from tests.support.training import Recorder, Setting

pytestmark = pytest.mark.ranks

SETTING = Setting(steps=5, learning_rate=0.2)
MAX_LENGTH = 12


def model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 25, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def task(kind: str) -> CausalLmTask:
    """kind: windows (a stream, evaluated with a stride of 5) or documents (packed, evaluated by blocks)."""
    options: dict[str, Any] = {"packing": "documents"} if kind == "documents" else {"stride": 5}
    splits = {}
    for split, rows, stride in (("train", 21, MAX_LENGTH), ("validation", 17, options.get("stride", MAX_LENGTH))):
        texts = tiny.sentences(rows, seed=rows)[list(range(rows))]["input_ids"]
        if kind == "windows":
            texts = [[token for text in texts for token in text]]
        segments = [
            segment for text in texts for segment in split_into_segments(text, max_length=MAX_LENGTH, stride=stride)
        ]
        splits[split] = Table(pack_segments(segments, row_length=MAX_LENGTH if kind == "documents" else None))
    settings = CausalLm(name="causal_lm", **options)
    words = {"train": 99, "validation": 77}
    return CausalLmTask(splits, tiny.tokenizer(), max_length=MAX_LENGTH, is_char=False, words=words, settings=settings)


def both_kinds(context: RankContext) -> dict[str, Any]:
    """For both: an evaluation before training, to the digit; then training, and the evaluation after it."""
    found = {}
    for kind in ("windows", "documents"):
        learns = task(kind)
        forward = ForwardOnly(model(), SETTING.config(), context)
        before = evaluate_split(forward, learns, "validation", micro_batch_size=2)
        run, recorder = training.build(context, SETTING, model(), learns), Recorder()
        engine = run.go(recorder)
        after = evaluate_split(engine, learns, "validation", micro_batch_size=2)
        found[kind] = {
            "before": [dict(before.metrics), records_of(before, context)],
            "steps": recorder.steps,
            "after": dict(after.metrics),
        }
        engine.release()
    return found


@cache
def alone() -> dict[str, Any]:
    return both_kinds(ONE_PROCESS)


@cache
def on_ranks(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(both_kinds, world_size)


@pytest.mark.parametrize("kind", ["windows", "documents"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_and_evaluate_like_one_process(world_size: int, kind: str) -> None:
    expected = alone()[kind]

    for rank in on_ranks(world_size):
        assert rank[kind]["before"] == expected["before"]
        assert training.worst(rank[kind], expected) < 1e-6
        assert rank[kind]["after"] == pytest.approx(expected["after"], rel=1e-5)  # of weights that are 1e-7 apart


def test_a_sliding_window_counts_each_token_once() -> None:
    judged = task("windows").splits["validation"]
    tokens = sum(len(text) for text in tiny.sentences(17, seed=17)[list(range(17))]["input_ids"])

    metrics, records = alone()["windows"]["before"]

    assert sum(record["targets"] for record in records) == tokens - 1
    assert len(records) == len(judged) > (tokens - 1) / MAX_LENGTH
    assert set(metrics) == {"loss", "perplexity", "word_perplexity"}


def test_the_saved_model_is_a_plain_language_model(tmp_path: Path) -> None:
    learns = task("documents")
    engine = training.build(ONE_PROCESS, SETTING, model(), learns).go()

    export_model(engine, learns.tokenizer, tmp_path / "model")

    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, engine.module.eval()(ids).logits, atol=1e-6)

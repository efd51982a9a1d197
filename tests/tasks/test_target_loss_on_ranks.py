"""Logits of targets only, in chunks, on several ranks and engines: the steps of complete logits on one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.tasks import target_loss
from dtrain.tasks.causal_lm import CausalLmTask
from tests.support import tiny, tiny_lm, training
from tests.support.multirank import run_ranks
from tests.support.training import Recorder, Setting, apart, weights_of, worst

pytestmark = pytest.mark.ranks

SETTING = Setting(rows=19, steps=6, global_batch_size=8, micro_batch_size=3, learning_rate=0.1)
VOCABULARY = 25

ENGINES = {
    "ddp": replace(SETTING, engine="ddp"),
    "zero 1": replace(SETTING, engine="deepspeed", zero_stage=1),
    "zero 3": replace(SETTING, engine="deepspeed", zero_stage=3),
    "fsdp": replace(SETTING, engine="fsdp"),
}


def task() -> CausalLmTask:
    """Sentences of 5 to 22 tokens, so that a micro-batch has padding."""
    return CausalLmTask({"train": tiny.sentences(19)}, tiny.tokenizer(), max_length=24, is_char=False)


def outcome(context: RankContext, setting: Setting, *, tried: bool) -> dict[str, Any]:
    """Collective. Each step and the final weights; `tried`: in chunks of 4 rows, else from complete logits."""
    return trained(context, setting, tiny_lm.gpt(positions=24, vocabulary=VOCABULARY), limit=4, tried=tried)


def trained(context: RankContext, setting: Setting, module: Any, *, limit: int, tried: bool) -> dict[str, Any]:
    """Collective. Each step and the final weights; `limit`: number of rows from which on logits are computed in chunks."""
    before, target_loss.MAX_LOGITS = target_loss.MAX_LOGITS, limit * VOCABULARY
    try:
        if tried:
            target_loss.try_last_layer(module, context)
        run, recorder = training.build(context, setting, module, task()), Recorder()
        engine = run.go(recorder)
        found = {"steps": recorder.steps, "weights": weights_of(engine)}
        engine.release()
        return found
    finally:
        target_loss.MAX_LOGITS = before


def on_every_engine(context: RankContext) -> dict[str, Any]:
    return {name: outcome(context, setting, tried=True) for name, setting in ENGINES.items()}


@cache
def on_two_ranks() -> list[dict[str, Any]]:
    return run_ranks(on_every_engine, 2)


@pytest.mark.parametrize("name", ["one process", *ENGINES])
def test_every_engine_takes_the_steps_of_complete_logits(name: str) -> None:
    plain = outcome(ONE_PROCESS, SETTING, tried=False)

    found = outcome(ONE_PROCESS, SETTING, tried=True) if name == "one process" else on_two_ranks()[0][name]

    assert worst(plain, found) < 1e-5
    assert (
        worst(plain, found, "grad_norm") < 1e-4
    )  # this model's gradient changes a thousand times as much as its weights
    assert apart(plain, found) < 1e-5


def with_bias(context: RankContext, zero_stage: int | None, limit: int) -> dict[str, Any]:
    """Collective. The steps of a model whose last layer has weights and a bias of its own; some micro-batches are large."""
    setting = replace(
        SETTING, micro_batch_size=2, **({} if zero_stage is None else {"engine": "deepspeed", "zero_stage": zero_stage})
    )
    module = tiny_lm.gpt(positions=24, vocabulary=VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module.lm_head = nn.Linear(16, VOCABULARY)
    return trained(context, setting, module, limit=limit, tried=True)


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_with_and_without_chunks_in_one_round_add_up_the_same_gradients(stage: int) -> None:
    plain = with_bias(ONE_PROCESS, None, 10**6)
    found = run_ranks(with_bias, 2, stage, 30)[0]

    assert worst(plain, found) < 1e-5
    assert apart(plain, found) < 1e-5


def in_lower_precision(context: RankContext, precision: str) -> dict[str, Any]:
    """Collective. The steps under DeepSpeed, which turns autocast on inside its wrapper only, and under DDP."""
    setting = replace(SETTING, precision=precision, dropout=0.0, max_grad_norm=None)
    zero = replace(setting, engine="deepspeed", zero_stage=1)
    engines = {"ddp": replace(setting, engine="ddp"), "zero 1": zero}
    found = {name: outcome(context, each, tried=True) for name, each in engines.items()}
    return {**found, "complete": outcome(context, zero, tried=False)}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_chunks_under_deepspeed_have_the_precision_that_they_have_under_ddp(precision: str) -> None:
    found = run_ranks(in_lower_precision, 2, precision)[0]

    assert worst(found["ddp"], found["zero 1"]) < 1e-6
    first = [found[name]["steps"][0]["loss"] for name in ("complete", "zero 1")]
    assert first[1] == pytest.approx(first[0], rel=1e-6)

"""Logits of targets only, in chunks, on several ranks and engines: the steps of complete logits on one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.tasks import target_loss
from tests.support import training
from tests.support.multirank import run_ranks
from tests.support.training import Recorder, Setting, apart, weights_of, worst
from tests.tasks.test_chat_on_ranks import SETTING, gpt, task

pytestmark = pytest.mark.ranks

ENGINES = {
    "ddp": replace(SETTING, engine="ddp"),
    "zero 1": replace(SETTING, engine="deepspeed", zero_stage=1),
    "zero 3": replace(SETTING, engine="deepspeed", zero_stage=3),
}


def outcome(context: RankContext, setting: Setting, *, tried: bool) -> dict[str, Any]:
    """Collective. Each step and the final weights; `tried`: in chunks of 4 rows, else from complete logits."""
    module, before = gpt(), target_loss.MAX_LOGITS
    target_loss.MAX_LOGITS = 4 * 25
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
    assert worst(plain, found, "grad_norm") < 1e-5
    assert apart(plain, found) < 1e-5

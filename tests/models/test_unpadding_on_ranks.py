"""A model without padding on any number of ranks and engine gives the losses of the padded one on one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from dtrain.distributed.rank_context import ONE_PROCESS
from tests.support import training
from tests.support.multirank import run_ranks
from tests.support.training import Setting, apart, worst

pytestmark = pytest.mark.ranks

PADDED = Setting(
    dropout=0.0, steps=12, learning_rate=0.1, unpad="off", freeze=("embeddings",), thaw=((2, "embeddings"),)
)


@cache
def padded() -> dict[str, Any]:
    return training.run(ONE_PROCESS, PADDED)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (2, {"checkpointing": True}),
        (3, {}),
        (3, {"engine": "deepspeed", "zero_stage": 3}),
        (2, {"engine": "deepspeed", "zero_stage": 3, "checkpointing": True}),
        (2, {"engine": "deepspeed", "zero_stage": 1}),
    ],
)
def test_unpadded_ranks_take_the_steps_of_the_padded_process(world_size: int, changes: dict[str, Any]) -> None:
    setting = replace(PADDED, unpad="on", **changes)

    (found, *_) = run_ranks(training.run, world_size, setting, timeout_s=120)

    assert worst(padded(), found) <= 1e-5
    assert worst(padded(), found, "grad_norm") <= 1e-4
    assert apart(padded(), found) <= 1e-5

"""Warnings about the length of a run, and about a run that changed no weight."""

from __future__ import annotations

import pytest

from dtrain.config.schema import Config
from dtrain.data.order import StepPlan
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.training import build, plan
from dtrain.training.plan import _warnings, warn_without_update
from tests.support import training
from tests.support.contexts import placed
from tests.support.training import Setting


def warnings_of(rows: int, **train: object) -> list[str]:
    config = Config.model_validate({"run": {"name": "test"}, "task": {"name": "causal_lm"}, "train": train})
    shape = config.train
    steps = StepPlan(rows, shape.global_batch_size, shape.micro_batch_size, seed=0, shuffle=True)
    return _warnings(config, ONE_PROCESS, steps)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"epochs": 2, "max_steps": 9}, "train.epochs=2 (4 steps) ends the run before train.max_steps=9"),
        ({"epochs": 9, "max_steps": 4}, "train.max_steps=4 ends the run before train.epochs=9 (18 steps)"),
    ],
)
def test_the_limit_that_ends_the_run_is_named(train: dict[str, int], words: str) -> None:
    assert warnings_of(20, global_batch_size=10, **train) == [f"warning: {words}"]


def test_a_batch_larger_than_the_data_is_named_and_what_is_usual_is_not() -> None:
    assert warnings_of(20, global_batch_size=20, epochs=3) == []
    assert warnings_of(20, global_batch_size=20, epochs=3, max_steps=3) == []
    (found,) = warnings_of(19, global_batch_size=20)
    assert "train.global_batch_size=20 is larger than the training data: each epoch is one step with all 19" in found


def test_a_run_without_an_update_is_named_with_its_cause() -> None:
    def said(precision: str, step: int, updates: int) -> str | None:
        return warn_without_update(
            Config.model_validate(
                {"run": {"name": "test"}, "task": {"name": "causal_lm"}, "engine": {"precision": precision}}
            ),
            step=step,
            updates=updates,
        )

    found = said("fp16", 5, 0)
    assert found is not None
    assert "All 5 steps were skipped" in found
    assert "engine.precision=bf16" in found
    assert "fp16" not in (said("fp32", 5, 0) or "fp16")
    assert said("fp16", 5, 1) is None
    assert said("fp16", 0, 0) is None


def test_the_plan_shows_micro_batches_by_tokens() -> None:
    def line(**changes: object) -> str:
        setting = Setting(table=True, **changes)  # type: ignore[arg-type]
        steps = build.step_plan(setting.config(), training.task(setting))
        return plan._shares(setting.config(), placed(ONE_PROCESS, world_size=2), steps, lock_step=False)

    assert line() == "3 micro-batches of 3, 1 to 2 per rank, 0 rank(s) idle"
    budget = line(micro_batch_tokens=40)
    assert budget == "4 micro-batches of at most 40 tokens, 2 per rank, 0 rank(s) idle (in the first step)"

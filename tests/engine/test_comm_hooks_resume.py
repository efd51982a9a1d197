"""Runs with PowerSGD or local steps that die go on with every bit: what they remember between steps is in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.engine import powersgd
from dtrain.errors import Preempted
from tests.support import resuming
from tests.support.multirank import run_ranks
from tests.support.resuming import STEPS, AskIn, life, losses, weights_and_moments

pytestmark = pytest.mark.ranks

WAYS: dict[str, dict[str, Any]] = {
    "powersgd": {"engine.powersgd": "{rank: 1, start_step: 3, min_rate: 1.0}"},
    "seldom": {"engine.powersgd": "{rank: 1, start_step: 3, min_rate: 1.0}", "checkpoint.every": 3},
    "sharded": {"engine.powersgd": "{rank: 1, start_step: 3, min_rate: 1.0}", "checkpoint.format": "sharded"},
    "local": {"train.local_steps": 2, "checkpoint.every": 2},
}


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("slow-links"))


def lives(context: RankContext, folder: str, name: str, changes: Mapping[str, Any], forgets: bool) -> list[str]:
    """Collective. A run that never dies, and one that dies in step 8 and goes on."""
    ended = [life(context, folder, f"{name}-steady", changes)["ended"]]
    ended.append(life(context, folder, f"{name}-died", changes, die_in=8)["ended"])
    if forgets:
        powersgd.PowerSgdCommHook.load_error_feedback = lambda *_: None  # type: ignore[method-assign]
    ended.append(life(context, folder, f"{name}-died", changes)["ended"])
    return ended


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_died_ends_with_every_bit_of_one_that_did_not(folder: Path, way: str, world_size: int) -> None:
    name = f"{way}-{world_size}"

    ranks = run_ranks(lives, world_size, str(folder), name, WAYS[way], False, timeout_s=150)

    assert ranks == [["done", "died", "done"]] * world_size
    steady, died = (weights_and_moments(folder, f"{name}-{run}", STEPS) for run in ("steady", "died"))
    assert steady
    assert steady == died
    assert losses(folder, f"{name}-steady") == losses(folder, f"{name}-died")


def test_a_start_that_forgets_what_the_factors_left_out_is_caught(folder: Path) -> None:
    run_ranks(lives, 2, str(folder), "forgets", WAYS["powersgd"], True, timeout_s=150)

    steady, died = (weights_and_moments(folder, f"forgets-{run}", STEPS) for run in ("steady", "died"))
    assert steady != died


def asked_to_stop(context: RankContext, folder: str, name: str) -> str:
    """Collective. A run that saves every third step is asked in step 7 to stop, saves the eighth, and goes on."""
    config = load_config(None, resuming.settings(Path(folder), name, WAYS["seldom"]))
    with pytest.raises(Preempted):
        run_train(config, context, monitors=[AskIn(7)])
    ended: str = life(context, folder, name, WAYS["seldom"])["ended"]
    return ended


def test_a_checkpoint_at_another_step_changes_rounding_and_nothing_else(folder: Path) -> None:
    run_ranks(life_of, 2, str(folder), "on-schedule", timeout_s=100)
    assert run_ranks(asked_to_stop, 2, str(folder), "asked", timeout_s=100) == ["done"] * 2

    steady, asked = (losses(folder, name) for name in ("on-schedule", "asked"))
    assert steady.keys() == asked.keys()
    assert max(abs(asked[step] / loss - 1) for step, loss in steady.items()) < 1e-5
    same = [weights_and_moments(folder, name, STEPS) for name in ("on-schedule", "asked")]
    assert same[0] != same[1], "if every bit is the same, say so in docs/exactness.md and engine/powersgd.py"


def life_of(context: RankContext, folder: str, name: str) -> str:
    """Collective. The same run, never asked."""
    ended: str = life(context, folder, name, WAYS["seldom"])["ended"]
    return ended


def wandering(context: RankContext, folder: str, name: str, die_in: int | None) -> str:
    """Collective. One start of the run with PowerSGD."""
    ended: str = life(context, folder, name, WAYS["powersgd"], die_in=die_in)["ended"]
    return ended


def test_powersgd_goes_on_on_other_numbers_of_ranks(folder: Path) -> None:
    # Of what the ranks remember only the average matters, so three go on as two did, up to rounding; one alone sends nothing.
    for name, worlds in (("moves", (2, 3)), ("stays", (2, 2)), ("alone", (2, 1, 2))):
        for number, world_size in enumerate(worlds):
            die_in = 6 + 2 * number if number < len(worlds) - 1 else None
            run_ranks(wandering, world_size, str(folder), name, die_in, timeout_s=100)

    stays, moves = losses(folder, "stays"), losses(folder, "moves")
    assert stays.keys() == moves.keys()
    assert max(abs(moves[step] / loss - 1) for step, loss in stays.items()) < 1e-5
    assert len(losses(folder, "alone")) == STEPS
    # The third start squeezes from its first step on: the place in the data counts, not the steps that it has seen.
    lines = (folder / "runs" / "alone" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    sent = {line["step"]: line["payload_bytes"] for line in map(json.loads, lines) if line["event"] == "train"}
    assert all(sent[step] < sent[1] / 2 for step in range(9, STEPS + 1)), sent

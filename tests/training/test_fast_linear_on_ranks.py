"""Runs whose linear layers are computed by oneDNN: the same numbers to rounding, on any number of ranks and engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.models import fast_linear
from tests.support import resuming
from tests.support.multirank import run_ranks
from tests.support.resuming import losses, weights_and_moments

FEW = {"train.max_steps": 6, "checkpoint.every": 3}
ROUNDING = 1e-5

pytestmark = pytest.mark.ranks


def life(context: Any, folder: str, name: str, changes: dict[str, Any], death: dict[str, Any]) -> Any:
    """Runs with every product of a linear layer by oneDNN, if that is on; gives the number of such products."""
    fast_linear.LEAST_PRODUCTS = fast_linear.LEAST_ROWS = 1
    multiply, calls = fast_linear._multiply, []

    def counted(*args: Any) -> Any:
        calls.append(None)
        return multiply(*args)

    fast_linear._multiply = counted
    resuming.life(context, folder, name, {**FEW, **changes}, **death)
    return len(calls)


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("linear"))


def _farthest(folder: Path, name: str, other: str) -> float:
    found, expected = losses(folder, name), losses(folder, other)
    assert found.keys() == expected.keys() == set(range(1, 7))
    return max(abs(found[step] / expected[step] - 1) for step in expected)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (1, {"engine.name": "deepspeed", "engine.zero_stage": 2}),
        (2, {}),
        (3, {"train.micro_batch_size": 3}),
        (2, {"engine.name": "deepspeed", "engine.zero_stage": 1}),
        (2, {"engine.name": "deepspeed", "engine.zero_stage": 3}),
        (2, {"model.gradient_checkpointing": True}),
    ],
    ids=["1", "1 zero 2", "2", "3", "2 zero 1", "2 zero 3", "2 checkpointing"],
)
def test_losses_are_those_of_torchs_layers(ranks: int, changes: dict[str, Any], folder: Path) -> None:
    name = f"{ranks}-" + "-".join(str(value) for value in changes.values()).replace("/", "")
    plain, fast = f"{name}-off", f"{name}-on"

    none = run_ranks(life, ranks, str(folder), plain, {**changes, "model.fast_linear": "off"}, {}, timeout_s=120)
    some = run_ranks(life, ranks, str(folder), fast, {**changes, "model.fast_linear": "on"}, {}, timeout_s=120)

    assert none == [0] * ranks
    assert min(some) > 100
    assert 0 < _farthest(folder, fast, plain) <= ROUNDING


def test_a_run_that_dies_ends_with_every_bit_it_would_have_had(folder: Path) -> None:
    on = {"model.fast_linear": "on"}
    run_ranks(life, 2, str(folder), "whole", on, {})
    run_ranks(life, 2, str(folder), "died", on, {"die_in": 5})
    run_ranks(life, 2, str(folder), "died", on, {})

    assert losses(folder, "died") == losses(folder, "whole")
    assert weights_and_moments(folder, "died", 6) == weights_and_moments(folder, "whole", 6)

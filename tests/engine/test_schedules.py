"""The learning rate schedules: Hugging Face's values at every step, with every option."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import nn

from dtrain.config import schema
from dtrain.config.optim import USED_BY
from dtrain.engine.schedules import learning_rate
from dtrain.errors import ConfigError


def test_the_first_step_runs_at_the_schedules_value_for_zero() -> None:
    rate = learning_rate(
        schema.Optim(learning_rate=1.0), schema.Schedule(name="linear", warmup_steps=2), total_steps=10
    )

    assert [rate(step) for step in range(4)] == pytest.approx([0.0, 0.5, 1.0, 0.875])
    assert rate(10) == 0.0


def test_a_warmup_ratio_is_a_share_of_all_steps() -> None:
    rate = learning_rate(
        schema.Optim(learning_rate=1.0), schema.Schedule(name="constant_with_warmup", warmup_ratio=0.4), total_steps=10
    )

    assert [rate(step) for step in range(6)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


TOTAL = 20

OPTIONS: dict[str, tuple[list[tuple[dict[str, Any], dict[str, Any]]], str]] = {
    # Our options, and Hugging Face's for the same curve; Hugging Face's name where it is another one.
    "linear": ([({}, {})], ""),
    "constant": ([({}, {})], ""),
    "constant_with_warmup": ([({}, {})], ""),
    "cosine": ([({}, {}), ({"min_ratio": 0.0}, {"min_lr_rate": 0.0}), ({"min_ratio": 0.2}, {"min_lr_rate": 0.2})], ""),
    "cosine_with_restarts": ([({}, {}), ({"cycles": 3}, {"num_cycles": 3}), ({"cycles": 7}, {"num_cycles": 7})], ""),
    "polynomial": (
        [
            ({}, {}),
            ({"power": 2.5}, {"power": 2.5}),
            ({"min_ratio": 0.0, "power": 0.5}, {"lr_end": 0.0, "power": 0.5}),
            ({"min_ratio": 0.3}, {"lr_end": 0.3 * 3e-4}),
        ],
        "",
    ),
    "inverse_sqrt": ([({}, {}), ({"timescale": 1}, {"timescale": 1}), ({"timescale": 33}, {"timescale": 33})], ""),
    "warmup_stable_decay": (
        [
            (
                {"decay_steps": decay, "decay_shape": shape, "min_ratio": floor},
                {"num_decay_steps": decay, "decay_type": shape, "min_lr_ratio": floor},
            )
            for decay in (1, 6)
            for shape in ("linear", "cosine", "1-sqrt")
            for floor in (0.0, 0.15)
        ],
        "",
    ),
}


def test_every_schedule_and_option_is_compared() -> None:
    assert set(OPTIONS) == set(get_args(schema.Schedule.model_fields["name"].annotation))
    for option, names in USED_BY.items():
        if option != "decay_ratio":  # another way to say decay_steps
            assert all(any(option in ours for ours, _ in OPTIONS[name][0]) for name in names)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_schedule_is_hugging_faces_own_at_every_step(name: str) -> None:
    from transformers import get_scheduler

    for ours, theirs in OPTIONS[name][0]:
        for warmup in (0, 1, 5) if name != "constant" else (0,):
            for peak in (1.0, 3e-4):
                their_name = "cosine_with_min_lr" if "min_lr_rate" in theirs else name
                if theirs.get("lr_end"):
                    theirs = {**theirs, "lr_end": ours["min_ratio"] * peak}
                optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
                scheduler = get_scheduler(
                    their_name,
                    optimizer,
                    num_warmup_steps=warmup,
                    num_training_steps=TOTAL,
                    scheduler_specific_kwargs=dict(theirs),
                )
                settings = schema.Schedule(name=name, warmup_steps=warmup, **ours)
                rate = learning_rate(schema.Optim(learning_rate=peak), settings, total_steps=TOTAL)

                for step in range(TOTAL + 3):
                    expected = peak * float(scheduler.lr_lambdas[0](step))
                    assert rate(step) == expected, (ours, warmup, peak, step)


def test_a_warm_up_as_long_as_the_run_ends_without_an_error() -> None:
    for name in OPTIONS:
        warmup = 10 if name not in ("constant", "warmup_stable_decay") else 0
        rate = learning_rate(schema.Optim(), schema.Schedule(name=name, warmup_steps=warmup), total_steps=10)

        assert all(math.isfinite(rate(step)) for step in range(12))


def test_a_learning_rate_below_the_end_of_polynomial_is_refused_with_a_cure_that_works() -> None:
    with pytest.raises(ConfigError, match=r"optim.learning_rate=1e-08 is not above 1e-07.*schedule.min_ratio=0"):
        learning_rate(schema.Optim(learning_rate=1e-8), schema.Schedule(name="polynomial"), total_steps=10)

    rate = learning_rate(
        schema.Optim(learning_rate=1e-8), schema.Schedule(name="polynomial", min_ratio=0), total_steps=10
    )

    assert (rate(0), rate(10)) == (1e-8, 0.0)


def test_schedules_import_nothing_of_transformers() -> None:
    code = "import sys, dtrain.engine.schedules; print(*(n for n in ('transformers', 'peft', 'torch') if n in sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert found.stdout.split() == []


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "cosine", "min_ratio": 0.2}, {0: 1.0, 5: 0.6, 10: 0.2}),
        (
            {"name": "cosine_with_restarts", "cycles": 2},
            {0: 1.0, 4: 0.5 + 0.5 * math.cos(0.8 * math.pi), 5: 1.0, 10: 0.0},
        ),
        ({"name": "polynomial", "power": 2.0, "min_ratio": 0.5}, {0: 1.0, 5: 0.5 + 0.5 * 0.25, 10: 0.5}),
        ({"name": "inverse_sqrt", "warmup_steps": 2, "timescale": 2}, {0: 0.0, 1: 0.5, 2: 1.0, 4: HALF, 8: 0.5}),
        (
            {"name": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 4},
            {0: 0.0, 1: 0.5, 2: 1.0, 6: 1.0, 7: 0.75, 8: 0.5, 10: 0.0},
        ),
        ({"name": "warmup_stable_decay", "decay_ratio": 0.4, "decay_shape": "1-sqrt"}, {6: 1.0, 8: 1 - HALF, 10: 0.0}),
        ({"name": "warmup_stable_decay", "min_ratio": 0.1, "decay_shape": "cosine"}, {8: 1.0, 9: 1.0, 10: 0.1}),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else None,
)
def test_a_schedules_options_give_the_values_worked_out_by_hand(
    settings: dict[str, Any], expected: dict[int, float]
) -> None:
    rate = learning_rate(schema.Optim(learning_rate=2.0), schema.Schedule(**settings), total_steps=10)

    assert {step: rate(step) for step in expected} == pytest.approx(
        {step: 2.0 * value for step, value in expected.items()}, abs=1e-12
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "linear", "min_ratio": 0.1}, "schedule.min_ratio is for schedule.name=cosine or polynomial"),
        ({"name": "cosine", "decay_steps": 3}, "schedule.decay_steps is for schedule.name=warmup_stable_decay"),
        (
            {"name": "warmup_stable_decay", "decay_steps": 3, "decay_ratio": 0.5},
            "set schedule.decay_steps or schedule.decay_ratio, not both",
        ),
    ],
)
def test_an_option_that_the_schedule_does_not_use_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        schema.Schedule(**settings)


def test_a_warm_up_and_a_decay_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 steps of warm-up and 5 of decay are more than the 10 steps of this run"):
        learning_rate(
            schema.Optim(), schema.Schedule(name="warmup_stable_decay", warmup_steps=6, decay_steps=5), total_steps=10
        )

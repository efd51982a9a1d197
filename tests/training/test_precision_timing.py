"""Timing of fp32 against bf16: alternating passes, a bounded time, and one sentence."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dtrain.training.precision_timing import (
    PASSES,
    PrecisionTimes,
    time_fixed_model,
    time_precisions,
    unchanged_random_state,
)


class Machine:
    """Takes the seconds that a test says, and keeps the order of the passes."""

    def __init__(self, *, fp32_s: float, bf16_s: float, first_s: float = 0.0) -> None:
        self.seconds = {"fp32": fp32_s, "bf16": bf16_s}
        self.now, self.first_s, self.passes = 0.0, first_s, list[str]()

    def run(self, precision: str) -> None:
        self.now += self.seconds[precision] + (0.0 if precision in self.passes else self.first_s)
        self.passes.append(precision)


def test_the_passes_alternate_and_the_first_of_each_does_not_count() -> None:
    machine = Machine(fp32_s=0.2, bf16_s=0.1, first_s=0.5)

    times = time_precisions(machine.run, now=lambda: machine.now)

    assert machine.passes == ["fp32", "bf16"] * (1 + PASSES)
    assert (times.fp32_s, times.bf16_s) == (pytest.approx(0.2), pytest.approx(0.1))


def test_a_slow_machine_takes_fewer_passes() -> None:
    machine = Machine(fp32_s=0.5, bf16_s=0.8)

    times = time_precisions(machine.run, now=lambda: machine.now)

    assert len(machine.passes) < 2 * (1 + PASSES)
    assert machine.now < 5.0
    assert times.gain == pytest.approx(0.625)


def test_emulated_bf16_ends_after_its_first_pass() -> None:
    machine = Machine(fp32_s=0.3, bf16_s=9.0)

    times = time_precisions(machine.run, now=lambda: machine.now)

    assert machine.passes == ["fp32", "bf16"]
    assert times.describe() == "fp32 fits this CPU: in bf16 forward and backward are 30.0x slower"


def test_the_sentence_says_what_to_set_or_that_nothing_is_gained() -> None:
    assert PrecisionTimes(0.34, 0.2).describe() == (
        "engine.precision=bf16 makes forward and backward 1.7x faster on this CPU (same method, other rounding)"
    )
    assert PrecisionTimes(1.0, 0.95).describe() == "fp32 fits this CPU: in bf16 forward and backward are not faster"
    assert PrecisionTimes(1.0, 1.05).describe() == "fp32 fits this CPU: in bf16 forward and backward are not faster"


def states() -> tuple[bytes, str, object]:
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()[1]), random.getstate()


def test_random_states_are_restored() -> None:
    before = states()

    with unchanged_random_state():
        torch.rand(3)
        np.random.rand(3)
        random.random()

    assert states() == before


def test_the_doctors_model_is_timed_and_draws_nothing() -> None:
    before = states()

    times = time_fixed_model()

    assert times.fp32_s > 0
    assert times.bf16_s > 0
    assert states() == before

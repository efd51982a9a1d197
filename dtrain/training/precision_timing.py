"""Times forward and backward in fp32 and in bf16 on this machine's CPU, and says what bf16 would gain."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dtrain.engine.forward_only import autocast
from dtrain.models.fast_linear import set_fast_linear

PASSES = 5
"""Number of timed passes of each precision, fewer if they would take longer than MAX_S."""

MAX_S = 4.0
"""About how long all timed passes may take."""

WORTHWHILE = 1.1
"""A smaller gain is not worth a change of the rounding."""

FIXED_ROWS, FIXED_LENGTH, FIXED_WIDTH, FIXED_LAYERS = 8, 64, 256, 2
"""The encoder that `time_fixed_model` runs."""


@dataclass(frozen=True)
class PrecisionTimes:
    """Median seconds of forward and backward.

    Attributes:
        fp32_s: in fp32.
        bf16_s: in bf16.
    """

    fp32_s: float
    bf16_s: float

    @property
    def gain(self) -> float:
        """How many times faster bf16 is."""
        return self.fp32_s / self.bf16_s

    def describe(self) -> str:
        """Returns a sentence without its end."""
        if self.gain >= WORTHWHILE:
            return (
                f"engine.precision=bf16 makes forward and backward {self.gain:.1f}x faster on this CPU "
                "(same method, other rounding)"
            )
        how = f"{1 / self.gain:.1f}x slower" if self.gain < 1 / WORTHWHILE else "not faster"
        return f"fp32 fits this CPU: in bf16 forward and backward are {how}"


def time_precisions(run: Callable[[str], None], now: Callable[[], float] = time.perf_counter) -> PrecisionTimes:
    """Times both precisions alternately, after a pass of each that does not count.

    Args:
        run: runs forward and backward in a precision, "fp32" or "bf16".
        now: returns the time in seconds.
    """

    def timed(precision: str) -> float:
        begin = now()
        run(precision)
        return max(now() - begin, 1e-9)

    begin = now()
    first = timed("fp32"), timed("bf16")
    pairs: list[tuple[float, float]] = []
    # Where a processor lacks bf16, the first pass alone may take longer than all others may.
    while len(pairs) < PASSES and now() - begin + sum(first) < MAX_S:
        pairs.append((timed("fp32"), timed("bf16")))
    fp32, bf16 = zip(*(pairs or [first]), strict=True)
    return PrecisionTimes(statistics.median(fp32), statistics.median(bf16))


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restores the state of every random generator on the host after the block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def time_fixed_model() -> PrecisionTimes:
    """Times a small encoder, for a machine without a config."""
    with unchanged_random_state():
        layer = nn.TransformerEncoderLayer(
            FIXED_WIDTH, nhead=4, dim_feedforward=4 * FIXED_WIDTH, dropout=0.0, batch_first=True
        )
        model = nn.TransformerEncoder(layer, FIXED_LAYERS, enable_nested_tensor=False)
        set_fast_linear(model, "auto")  # as in a run
        inputs = torch.randn(FIXED_ROWS, FIXED_LENGTH, FIXED_WIDTH)

        def run(precision: str) -> None:
            with autocast(precision, "cpu"):
                loss = model(inputs).float().square().mean()
            torch.autograd.backward(loss)

        return time_precisions(run)

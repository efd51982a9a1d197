"""Batches that are made a few steps at a time are the same ones, and errors come where they are due."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from dtrain.data import read_ahead as reading
from dtrain.data.batches import MicroBatch, StepBatches
from dtrain.data.read_ahead import MOST_BYTES, MOST_STEPS, read_ahead
from dtrain.errors import DataError


def _step(number: int, size: int = 4) -> StepBatches:
    return StepBatches(
        number, 1, (MicroBatch(0, True, (number,), {"input_ids": torch.zeros(size, dtype=torch.uint8)}),)
    )


class Source:
    """Steps that say how many were made."""

    def __init__(self, steps: int, *, fails_at: int | None = None, size: int = 4) -> None:
        self.made, self.is_closed = 0, False
        self._steps, self._fails_at, self._size = steps, fails_at, size

    def generator(self) -> Generator[StepBatches, None, None]:
        try:
            for number in range(self._steps):
                if number == self._fails_at:
                    raise DataError("a bad row")
                self.made += 1
                yield _step(number, self._size)
        finally:
            self.is_closed = True


@pytest.mark.parametrize("steps", [0, 1, MOST_STEPS - 1, MOST_STEPS, MOST_STEPS + 1, 5 * MOST_STEPS])
def test_every_step_comes_once_in_order(steps: int) -> None:
    source = Source(steps)

    assert [step.step for step in read_ahead(source.generator())] == list(range(steps))
    assert source.is_closed


@pytest.mark.parametrize("fails_at", [0, 1, MOST_STEPS, MOST_STEPS + 3])
def test_an_error_comes_after_the_steps_before_it(fails_at: int) -> None:
    steps = read_ahead(Source(100, fails_at=fails_at).generator())

    assert [next(steps).step for _ in range(fails_at)] == list(range(fails_at))
    with pytest.raises(DataError, match="a bad row"):
        next(steps)


def test_reading_stops_at_a_number_of_steps_or_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_SECONDS", 1e9)
    small, large = Source(100), Source(100, size=MOST_BYTES // 3)

    next(read_ahead(small.generator()))
    next(read_ahead(large.generator()))

    assert (small.made, large.made) == (MOST_STEPS, 4)


def test_batches_that_take_long_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_SECONDS", 0.0)
    source = Source(100)
    steps = read_ahead(source.generator())

    made = [source.made for _ in zip(range(5), steps, strict=False)]

    assert made == [1, 2, 3, 4, 5]


def test_closing_closes_the_source() -> None:
    source = Source(100)
    steps = read_ahead(source.generator())
    next(steps)

    steps.close()

    assert source.is_closed

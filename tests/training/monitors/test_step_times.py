"""The lines of the step-time account on one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dtrain.data.order import chunks
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.distributed.topology import SINGLE
from dtrain.training import loop
from dtrain.training.look_ahead import LookAhead
from dtrain.training.monitors.protocol import Decision, Monitor, StepRecord
from dtrain.training.monitors.step_times import DeviceRate, StepTimes
from dtrain.training.step_time import BatchCounter, HostClock, Part, measured
from tests.support import training
from tests.support.training import Setting

SETTING = Setting(rows=21, steps=7, dropout=0.0, shuffle=False)
"""Seven steps of 8, 8, 5, 8, 8, 5 and 8 rows, in micro-batches of 3."""


class Ticks:
    """A clock that goes on by a second whenever it is read, so that no load of the machine matters."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Lines:
    """Keeps what is written, and when."""

    def __init__(self, ticks: Ticks) -> None:
        self._ticks = ticks
        self.lines: list[dict[str, Any]] = []
        self.scalars: list[Mapping[str, float]] = []

    def event(self, event: str, **values: Any) -> None:
        self.lines.append({"event": event, **values})

    def step_time(self, step: int, values: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        self.event("step_time", step=step, now=self._ticks.now, **values)
        self.scalars.append(scalars)


def account(
    context: RankContext,
    every: int,
    *,
    rate: DeviceRate | None = None,
    unpad: str = "auto",
    before: Sequence[Monitor] = (),
) -> Lines:
    """Trains with the account, and other monitors before it; returns what it wrote."""
    ticks = Ticks()
    run, lines = training.build(context, replace(SETTING, unpad=unpad)), Lines(ticks)
    counter, clock = BatchCounter(run.task, run.prepared), HostClock(context.world_size, now=ticks)
    batches = loop.batches_ahead(run.settings, run.task, run.engine, start=0)
    run.look_ahead = LookAhead(counter.watch(batches), run.task, context)
    try:
        with measured(clock, context.heartbeat):
            loop.train(run, [*before, StepTimes(every, clock, counter, context, lines, rate=rate)])
    finally:
        run.look_ahead.close()
    return lines


def test_the_lines_cover_all_steps_and_their_parts_the_wall_time() -> None:
    written = account(RankContext(SINGLE), every=3)

    lines = written.lines
    assert [(line["event"], line["step"], line["steps"]) for line in lines] == [
        ("step_time", 3, 3),
        ("step_time", 6, 3),
        ("step_time", 7, 1),
    ]
    names = [f"{part.name.lower()}_s" for part in Part]
    for line in lines:
        assert sum(line[name][0] for name in names) == pytest.approx(line["wall_s"], abs=1e-4)
        assert all(line[f"{name}_s"][0] > 0 for name in ("data", "forward", "backward", "optimizer"))
        assert line["communication_s"] == [0.0]
    ends = [1.0, *(line["now"] for line in lines)]  # the clock was read once when it was made
    assert [line["wall_s"] for line in lines] == [end - begin for begin, end in pairwise(ends)], "nothing is left out"


@pytest.mark.parametrize("unpad", ["on", "off"])
def test_tokens_are_those_of_the_steps_of_the_line(unpad: str) -> None:
    table = training.task(SETTING).splits["train"]
    lengths = [len(ids) for ids in table[list(range(21))]["input_ids"]]
    tokens = [sum(lengths[:8]), sum(lengths[8:16]), sum(lengths[16:])]
    computed = [
        sum(len(part) * max(part) for part in chunks(step, 3)) for step in (lengths[:8], lengths[8:16], lengths[16:])
    ]

    written = account(RankContext(SINGLE), every=3, unpad=unpad)

    first, second, last = written.lines
    assert first["tokens"] == second["tokens"] == sum(tokens)
    assert first["fill"] == (1.0 if unpad == "on" else pytest.approx(sum(tokens) / sum(computed)))
    assert last["tokens"] == tokens[0]
    in_steps = first["wall_s"] - first["other_s"][0] - first["evaluation_s"][0] - first["checkpoint_s"][0]
    assert first["tokens_per_second"] == pytest.approx(first["tokens"] / in_steps, rel=1e-3)


def test_tensorboard_gets_the_parts_of_a_step_and_the_rates() -> None:
    written = account(RankContext(SINGLE), every=3)

    scalars, line = written.scalars[0], written.lines[0]
    assert scalars["step_time/forward"] == pytest.approx(line["forward_s"][0] / 3)
    assert scalars["train/tokens_per_second"] == line["tokens_per_second"]
    assert scalars["train/fill"] == line["fill"]


def test_on_a_gpu_the_arithmetic_is_rated_and_an_unknown_peak_is_left_out() -> None:
    known = account(RankContext(SINGLE), every=7, rate=DeviceRate(lambda: 3e6, peak_flops=1e9))
    unknown = account(RankContext(SINGLE), every=7, rate=DeviceRate(lambda: 3e6, peak_flops=None))
    no_estimate = account(RankContext(SINGLE), every=7, rate=DeviceRate(lambda: None, peak_flops=1e9))

    (line,) = known.lines
    assert line["model_flops_per_second"] == pytest.approx(3e6 * line["tokens_per_second"])
    assert line["utilization"] == pytest.approx(line["model_flops_per_second"] / 1e9)
    assert "model_flops_per_second" in unknown.lines[0]
    assert "utilization" not in unknown.lines[0]
    assert "model_flops_per_second" not in no_estimate.lines[0]


class RollsBack:
    """Requests a rollback after a step, so that no later monitor is called for it."""

    def after_step(self, record: StepRecord) -> Decision:
        return Decision.ROLLBACK if record.step == 2 else Decision.CONTINUE


def test_a_step_that_is_rolled_back_is_one_of_the_steps_whose_time_and_tokens_are_counted() -> None:
    plain, rolled = account(RankContext(SINGLE), every=3), account(RankContext(SINGLE), every=3, before=[RollsBack()])

    assert [line["steps"] for line in rolled.lines] == [line["steps"] for line in plain.lines] == [3, 3, 1]
    assert [line["tokens"] for line in rolled.lines] == [line["tokens"] for line in plain.lines]


class Ends:
    """Keeps the last record."""

    def after_step(self, record: StepRecord) -> Decision:
        self.record = record
        return Decision.CONTINUE


def test_the_account_changes_no_number() -> None:
    plain, ends = training.build(ONE_PROCESS, SETTING), Ends()
    plain.go(ends)
    before = training.weights_of(plain.engine)

    run = training.build(RankContext(SINGLE), SETTING)
    counter, clock = BatchCounter(run.task, run.prepared), HostClock(1)
    batches = loop.batches_ahead(run.settings, run.task, run.engine, start=0)
    run.look_ahead, watched = LookAhead(counter.watch(batches), run.task, run.context), Ends()
    with measured(clock, run.context.heartbeat):
        loop.train(run, [StepTimes(2, clock, counter, run.context, Lines(Ticks())), watched])

    assert watched.record == ends.record
    assert training.weights_of(run.engine) == before

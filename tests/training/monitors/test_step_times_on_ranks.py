"""The step-time account of several ranks: one collective where a line is due, and the slow rank is named."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dtrain.console import log
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.training import loop
from dtrain.training.look_ahead import LookAhead
from dtrain.training.monitors.protocol import Decision, StepRecord
from dtrain.training.monitors.step_times import StepTimes
from dtrain.training.step_time import BatchCounter, HostClock, Part, measured
from tests.support import training
from tests.support.multirank import run_ranks
from tests.support.training import Setting

pytestmark = pytest.mark.ranks

EVEN = Setting(rows=72, steps=100, global_batch_size=9, micro_batch_size=3, dropout=0.0)
"""One micro-batch for each of three ranks."""

UNEVEN = Setting(rows=80, steps=50, global_batch_size=16, micro_batch_size=4, dropout=0.0)
"""Four micro-batches: two for rank 0."""


class Counted(StepTimes):
    """Counts the collectives of each call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.collectives: dict[int, int] = {}

    def after_step(self, record: StepRecord) -> Decision:
        before = self._context.traffic.copy()
        decision = super().after_step(record)
        self.collectives[record.step] = self._context.traffic.since(before).collectives
        return decision


class Lines:
    """Keeps what is written, and what is printed."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def event(self, event: str, **values: Any) -> None:
        self.lines.append({"event": event, **values})

    def step_time(self, step: int, values: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        self.event("step_time", step=step, **values)


class Printed(logging.Handler):
    """Keeps what is printed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def trained(context: RankContext, setting: Setting, slow: int | None) -> dict[str, Any]:
    """Collective. Trains with the account; the rank `slow` does the work of its forward passes several times.

    The clock is that of the processor: how many other processes share it does not matter, and waiting takes no time.
    """
    run, lines, printed = training.build(context, setting), Lines(), Printed()
    if context.rank == slow:
        matrix = torch.ones(256, 256)
        run.engine.module.register_forward_pre_hook(lambda *_: [matrix @ matrix for _ in range(15)] and None)
    clock, counter = HostClock(context.world_size, now=time.process_time), BatchCounter(run.task, run.prepared)
    monitor = Counted(25, clock, counter, context, lines)
    batches = loop.batches_ahead(run.settings, run.task, run.engine, start=0)
    run.look_ahead = LookAhead(counter.watch(batches), run.task, context)
    log.addHandler(printed)
    log.setLevel(logging.INFO)
    try:
        with measured(clock, context.heartbeat):
            loop.train(run, [monitor])
    finally:
        log.removeHandler(printed)
        run.look_ahead.close()
    called = {step: count for step, count in monitor.collectives.items() if count}
    return {"lines": lines.lines, "printed": printed.texts, "collectives": called, "host": socket.gethostname()}


def test_a_rank_that_works_longer_is_named_once_by_all_ranks() -> None:
    found = run_ranks(trained, 3, EVEN, 1)

    for rank in found:
        stragglers = [line for line in rank["lines"] if line["event"] == "straggler"]
        assert [(line["step"], line["steps"], line["rank"]) for line in stragglers] == [(50, 50, 1), (100, 50, 1)]
        assert {(line["host"], line["part"]) for line in stragglers} == {(rank["host"], "compute")}
        assert min(line["factor"] for line in stragglers) > 1.3
        (said,) = rank["printed"]
        assert said.startswith(
            f"warning: rank 1 on {rank['host']} is slow, and the others wait for it: over 50 steps its"
        )
    counts = [{int(step): count for step, count in rank["collectives"].items()} for rank in found]
    # An all-gather of the hosts' names, which is two collectives, where the first one is named.
    assert counts == [{25: 1, 50: 3, 75: 1, 100: 1}] * 3


def test_each_rank_has_its_own_times_in_a_line() -> None:
    main = run_ranks(trained, 3, EVEN, 2)[0]

    lines = [line for line in main["lines"] if line["event"] == "step_time"]
    assert [line["step"] for line in lines] == [25, 50, 75, 100]
    for line in lines:
        assert all(len(line[f"{part.name.lower()}_s"]) == 3 for part in Part)
        assert line["forward_s"][2] > 1.3 * max(line["forward_s"][:2])
        assert min(line["communication_s"]) > 0
    rows = training.task(EVEN).splits["train"][list(range(72))]["input_ids"]
    in_an_epoch = sum(map(len, rows))
    # 100 steps are twelve epochs of 8 steps, and 4 steps.
    assert sum(line["tokens"] for line in lines[:4]) >= 12 * in_an_epoch
    assert sum(line["tokens"] for line in lines[:4]) < 13 * in_an_epoch


def test_a_rank_with_more_micro_batches_is_no_straggler() -> None:
    for rank in run_ranks(trained, 3, UNEVEN, None):
        assert [line["event"] for line in rank["lines"]] == ["step_time"] * 2
        assert rank["printed"] == []
        backward = rank["lines"][0]["backward_s"]
        assert backward[0] > 1.3 * max(backward[1:]), "it does have more to do"


def test_two_ranks_have_a_straggler_too() -> None:
    main = run_ranks(trained, 2, EVEN, 0)[0]

    assert {line["rank"] for line in main["lines"] if line["event"] == "straggler"} == {0}


def exchanges(context: RankContext, setting: Setting) -> dict[str, Any]:
    """Collective. Trains; rank 1 begins each exchange late. Seconds of each part on this rank."""
    run = training.build(context, setting)
    if context.rank == 1:
        matrix = torch.ones(512, 512)
        run.engine.module.register_forward_pre_hook(lambda *_: [matrix @ matrix for _ in range(8)] and None)
    clock, begun = HostClock(context.world_size), Counter[Phase]()

    def enter(phase: Phase) -> None:
        begun.update([phase])
        clock.enter(phase)

    context.heartbeat.on_phase = enter
    run.go()
    seconds = {part.name: value for part, value in zip(Part, clock.take(), strict=True)}
    return {**seconds, "exchanges": begun[Phase.EXCHANGE]}


@pytest.mark.parametrize(
    ("more", "exchanges_of_12_steps"),
    [({}, 12), ({"gradient_wire": "bf16"}, 12), ({"local_steps": 2, "engine": "ddp"}, 6)],
)
def test_waiting_for_another_rank_is_communication_and_not_its_own_work(
    more: dict[str, Any], exchanges_of_12_steps: int
) -> None:
    setting = Setting(rows=24, steps=12, global_batch_size=6, micro_batch_size=3, dropout=0.0, **more)

    fast, slow = run_ranks(exchanges, 2, setting)

    assert fast["exchanges"] == slow["exchanges"] == exchanges_of_12_steps
    extra = slow["FORWARD"] - fast["FORWARD"]
    assert extra > fast["FORWARD"]
    assert fast["COMMUNICATION"] > 0.6 * extra, "it waits for the other rank"
    assert fast["COMMUNICATION"] > 2 * slow["COMMUNICATION"]
    assert fast["BACKWARD"] < 0.5 * extra, "the wait is not in its backward pass"
    assert fast["OPTIMIZER"] < 0.5 * extra

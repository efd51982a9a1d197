"""The heartbeat: what a rank writes is what another process reads."""

from __future__ import annotations

import mmap
import time

import pytest

from dtrain.distributed.heartbeat import (
    HEARTBEAT_BYTES,
    IDLE_RULES,
    PHASE_DESCRIPTIONS,
    Heartbeat,
    Phase,
    read_heartbeat,
)
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.distributed.topology import Topology


def test_what_is_written_is_read_from_the_shared_memory() -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    heartbeat = Heartbeat(memory)
    begin = read_heartbeat(memory)

    heartbeat.at(Phase.MICRO_BATCH, step=41)
    heartbeat.claim_run_dir()
    heartbeat.record_gil(7)
    reading = read_heartbeat(memory)

    assert (begin.phase, begin.step, begin.owns_run_dir) == (Phase.STARTING, -1, False)
    assert (reading.phase, reading.step, reading.owns_run_dir, reading.collective) == (Phase.MICRO_BATCH, 41, True, 7)
    assert reading.writes > begin.writes
    assert reading.gil_acquired_s == pytest.approx(time.monotonic(), abs=5)


def test_a_rank_that_was_stopped_while_it_wrote_can_be_read() -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    Heartbeat(memory).at(Phase.DATA, step=3)
    memory[0] = 99  # the first of two counts that should be equal

    assert read_heartbeat(memory).phase == Phase.DATA


def test_each_unit_of_work_is_a_heartbeat() -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    heartbeat = Heartbeat(memory)
    heartbeat.at(Phase.EVALUATION)
    before = read_heartbeat(memory)

    heartbeat.tick()

    assert read_heartbeat(memory).writes == before.writes + 1
    assert read_heartbeat(memory).phase == Phase.EVALUATION


def test_leaving_a_phase_restores_the_previous_one_unless_the_rank_is_ending() -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    heartbeat = Heartbeat(memory)
    heartbeat.at(Phase.MONITORS)

    with heartbeat.within(Phase.EVALUATION), heartbeat.within(Phase.EXPORT):
        inner = read_heartbeat(memory).phase
    after = read_heartbeat(memory).phase
    with heartbeat.within(Phase.EXPORT):
        heartbeat.at(Phase.ENDING)

    assert (inner, after, read_heartbeat(memory).phase) == (Phase.EXPORT, Phase.MONITORS, Phase.ENDING)


def test_the_median_step_step_forgets_one_slow_step(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    heartbeat = Heartbeat(memory)
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    for step, clock["now"] in enumerate([0.0, 2.0, 4.0, 104.0, 106.0]):
        heartbeat.at(Phase.MICRO_BATCH, step=step)
        heartbeat.at(Phase.DATA, step=step)

    reading = read_heartbeat(memory)

    assert (reading.median_step_s, reading.steps_timed) == (2.0, 4)


def test_an_evaluation_counts_when_it_is_done() -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    heartbeat = Heartbeat(memory)

    with heartbeat.within(Phase.EVALUATION):
        heartbeat.tick()
        inner = read_heartbeat(memory).evaluations
        with heartbeat.within(Phase.METRICS):
            pass
    with heartbeat.within(Phase.EXPORT):
        pass

    assert (inner, read_heartbeat(memory).evaluations) == (0, 1)


def test_every_phase_has_a_rule_and_a_name() -> None:
    assert IDLE_RULES.keys() == PHASE_DESCRIPTIONS.keys() == set(Phase)


def test_the_heartbeat_is_not_part_of_the_identity_of_a_context() -> None:
    context = RankContext(Topology(0, 1, 0, 1, 0, 1, "none", None, None))

    context.heartbeat.at(Phase.EXPORT, step=3)

    assert context == ONE_PROCESS
    assert hash(context) == hash(ONE_PROCESS)
    assert "beat" not in repr(context)

"""The heartbeat: what a rank writes is what another process reads."""

from __future__ import annotations

import mmap
import time

import pytest

from dtrain.distributed.heartbeat import RULES, SIZE, WORDS, Heartbeat, Phase, read
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.distributed.topology import Topology


def test_what_is_written_is_read_from_the_shared_memory() -> None:
    memory = mmap.mmap(-1, SIZE)
    heartbeat = Heartbeat(memory)
    begin = read(memory)

    heartbeat.at(Phase.MICRO_BATCH, step=41)
    heartbeat.own_folder()
    heartbeat.thread(7)
    pulse = read(memory)

    assert (begin.phase, begin.step, begin.owns_folder) == (Phase.STARTING, -1, False)
    assert (pulse.phase, pulse.step, pulse.owns_folder, pulse.collective) == (Phase.MICRO_BATCH, 41, True, 7)
    assert pulse.number > begin.number
    assert pulse.lock_s == pytest.approx(time.monotonic(), abs=5)


def test_a_rank_that_was_stopped_while_it_wrote_can_be_read() -> None:
    memory = mmap.mmap(-1, SIZE)
    Heartbeat(memory).at(Phase.DATA, step=3)
    memory[0] = 99  # the first of two counts that should be equal

    assert read(memory).phase == Phase.DATA


def test_each_portion_of_work_counts_as_a_beat() -> None:
    memory = mmap.mmap(-1, SIZE)
    heartbeat = Heartbeat(memory)
    heartbeat.at(Phase.EVALUATION)
    before = read(memory)

    heartbeat.tick()

    assert read(memory).number == before.number + 1
    assert read(memory).phase == Phase.EVALUATION


def test_the_phase_before_goes_on_after_one_within_it_except_when_the_rank_ends() -> None:
    memory = mmap.mmap(-1, SIZE)
    heartbeat = Heartbeat(memory)
    heartbeat.at(Phase.MONITORS)

    with heartbeat.within(Phase.EVALUATION), heartbeat.within(Phase.EXPORT):
        inner = read(memory).phase
    after = read(memory).phase
    with heartbeat.within(Phase.EXPORT):
        heartbeat.at(Phase.ENDING)

    assert (inner, after, read(memory).phase) == (Phase.EXPORT, Phase.MONITORS, Phase.ENDING)


def test_the_median_step_forgets_one_slow_step(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = mmap.mmap(-1, SIZE)
    heartbeat = Heartbeat(memory)
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    for step, clock["now"] in enumerate([0.0, 2.0, 4.0, 104.0, 106.0]):
        heartbeat.at(Phase.MICRO_BATCH, step=step)
        heartbeat.at(Phase.DATA, step=step)

    pulse = read(memory)

    assert (pulse.median_s, pulse.steps_timed) == (2.0, 4)


def test_an_evaluation_counts_when_it_is_done() -> None:
    memory = mmap.mmap(-1, SIZE)
    heartbeat = Heartbeat(memory)

    with heartbeat.within(Phase.EVALUATION):
        heartbeat.tick()
        inner = read(memory).evaluations
        with heartbeat.within(Phase.METRICS):
            pass
    with heartbeat.within(Phase.EXPORT):
        pass

    assert (inner, read(memory).evaluations) == (0, 1)


def test_every_phase_has_a_rule_and_a_name() -> None:
    assert RULES.keys() == WORDS.keys() == set(Phase)


def test_a_beat_that_nobody_reads_changes_no_topology() -> None:
    context = RankContext(Topology(0, 1, 0, 1, 0, 1, "none", None, None))

    context.heartbeat.at(Phase.EXPORT, step=3)

    assert context == ONE_PROCESS
    assert hash(context) == hash(ONE_PROCESS)
    assert "beat" not in repr(context)

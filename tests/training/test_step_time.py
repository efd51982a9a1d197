"""The step-time account: every moment belongs to one part, and the tokens are those of the steps taken."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from dtrain.data.batches import MicroBatch, StepBatches
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import SINGLE
from dtrain.training.computed_tokens import token_counts
from dtrain.training.step_time import BatchCounter, DeviceClock, HostClock, Part, WorkCounts, measured
from tests.support import tiny, training
from tests.support.training import Setting

STEP = [
    (Phase.MICRO_BATCH, 2.0),
    (Phase.BACKWARD, 4.0),
    (Phase.MICRO_BATCH, 3.0),
    (Phase.BACKWARD, 5.0),
    (Phase.EXCHANGE, 7.0),
    (Phase.DATA, 11.0),
    (Phase.SUMMING, 13.0),
    (Phase.UPDATE, 17.0),
    (Phase.MONITORS, 19.0),
]
"""The phases of a step of two micro-batches, and made-up seconds of each."""

STEP_S = {
    Part.DATA: 11.0,
    Part.FORWARD: 5.0,
    Part.BACKWARD: 9.0,
    Part.COMMUNICATION: 20.0,
    Part.OPTIMIZER: 17.0,
    Part.LOGGING: 19.0,
}


def by_part(seconds: list[float]) -> dict[Part, float]:
    return {part: seconds[part] for part in Part if seconds[part]}


# The host's clock


def test_the_parts_of_a_step_add_up_to_its_wall_time() -> None:
    now, heartbeat = [0.0], Heartbeat()
    clock = HostClock(2, now=lambda: now[0])

    with measured(clock, heartbeat):
        for phase, seconds in STEP:
            heartbeat.at(phase)
            now[0] += seconds
        taken = clock.take()

    assert by_part(taken) == STEP_S
    assert sum(taken) == now[0]


def test_a_phase_inside_another_one_is_not_counted_twice() -> None:
    now, heartbeat = [0.0], Heartbeat()
    clock = HostClock(1, now=lambda: now[0])

    with measured(clock, heartbeat):
        heartbeat.at(Phase.MONITORS)
        now[0] += 1.0
        with heartbeat.within(Phase.EVALUATION):
            now[0] += 30.0
        with heartbeat.within(Phase.CHECKPOINT):
            now[0] += 4.0
        now[0] += 0.5
        taken = clock.take()

    assert by_part(taken) == {Part.LOGGING: 1.5, Part.EVALUATION: 30.0, Part.CHECKPOINT: 4.0}


def test_what_was_taken_is_not_taken_again_although_its_phase_goes_on() -> None:
    now = [0.0]
    clock = HostClock(1, now=lambda: now[0])
    clock.enter(Phase.MONITORS)
    now[0] += 2.0
    clock.take()
    now[0] += 3.0

    assert by_part(clock.take()) == {Part.LOGGING: 3.0}


def test_one_process_waits_for_nobody() -> None:
    now = [0.0]
    clock = HostClock(1, now=lambda: now[0])
    clock.enter(Phase.SUMMING)
    now[0] += 1.0

    assert by_part(clock.take()) == {Part.DATA: 1.0}


def test_outside_the_steps_nothing_is_measured() -> None:
    heartbeat = Heartbeat()
    before = heartbeat.on_phase

    with pytest.raises(ZeroDivisionError), measured(HostClock(1), heartbeat):
        raise ZeroDivisionError

    assert heartbeat.on_phase is before


# The device's clock, without a device


class Stream:
    """A device whose work takes the seconds that a test says. It has finished what was begun before `finished`."""

    def __init__(self) -> None:
        self.time = 0.0
        self.finished = 0.0
        self.made = 0


class Event:
    """torch.cuda.Event, as far as the clock may use it: it offers no way to wait."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.at = stream, -1.0
        stream.made += 1

    def record(self) -> None:
        self.at = self._stream.time

    def query(self) -> bool:
        return self.at <= self._stream.finished

    def elapsed_time(self, end: Event) -> float:
        assert self.query(), "torch raises where an event has not happened"
        assert end.query()
        return 1e3 * (end.at - self.at)


def test_the_device_is_read_when_it_has_finished_and_never_waited_for() -> None:
    stream = Stream()
    clock = DeviceClock(2, event=lambda: Event(stream))
    for phase, seconds in STEP:
        clock.enter(phase)
        stream.time += seconds
    clock.enter(Phase.MICRO_BATCH)

    stream.finished = 14.0  # the host is ahead: the device has ended the last backward pass, but not the exchange
    early = clock.take()
    stream.finished = stream.time
    late = clock.take()

    assert by_part(early) == {Part.FORWARD: 5.0, Part.BACKWARD: 9.0}
    assert {part: early[part] + late[part] for part in STEP_S} == pytest.approx(STEP_S)
    assert sum(early) + sum(late) == pytest.approx(stream.time)


def test_events_are_used_again() -> None:
    stream = Stream()
    clock = DeviceClock(2, event=lambda: Event(stream))
    for _ in range(100):
        for phase, seconds in STEP:
            clock.enter(phase)
            stream.time += seconds
        stream.finished = stream.time
        clock.poll()

    assert stream.made <= 2 * len(STEP)


# Tokens


def test_padding_is_no_token() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    ids = torch.ones(2, 4, dtype=torch.int64)

    assert token_counts({"input_ids": ids, "attention_mask": mask}, has_decoder=False) == (4, 8)
    assert token_counts({"input_ids": ids}, has_decoder=False) == (8, 8)
    documents = torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0]])
    assert token_counts({"input_ids": ids, "document_ids": documents}, has_decoder=False) == (4, 8)
    assert token_counts({"pixel_values": torch.ones(2, 3, 4, 4)}, has_decoder=False) == (0, 0)


def test_a_decoders_inputs_are_tokens_as_well() -> None:
    mask, labels = torch.tensor([[1, 1, 0]]), torch.tensor([[7, -100, -100, -100, -100]])
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": mask, "labels": labels}

    assert token_counts(batch, has_decoder=True) == (2 + 1, 3 + 5)
    assert token_counts(batch, has_decoder=False) == (2, 3)


def counter_of(unpad: str) -> BatchCounter:
    setting = Setting(unpad=unpad, dropout=0.0)
    run = training.build(RankContext(SINGLE), setting)
    return BatchCounter(run.task, run.prepared)


@pytest.mark.parametrize(("unpad", "computed"), [("off", [12, 12]), ("on", [7, 8])])
def test_a_step_counts_once_it_was_taken_and_a_dummy_only_as_computed(unpad: str, computed: list[int]) -> None:
    counter = counter_of(unpad)

    def batch(tokens: int, *, counted: bool = True) -> MicroBatch:
        mask = torch.tensor([[1] * tokens + [0] * (6 - tokens)])
        return MicroBatch(0, counted, (0,), {"input_ids": torch.ones(1, 6, dtype=torch.int64), "attention_mask": mask})

    def steps() -> Generator[StepBatches, None, None]:
        yield StepBatches(0, 2, (batch(3), batch(4)))
        yield StepBatches(1, 1, (batch(5), batch(3, counted=False)))

    watched = counter.watch(steps())
    next(watched)  # the loop has read the first step ahead
    assert counter.take() == WorkCounts()
    next(watched)
    assert counter.take() == WorkCounts(steps=1, tokens=7, padded=12, computed=computed[0], micro_batches=2)
    assert next(watched, None) is None
    assert counter.take() == WorkCounts(steps=1, tokens=5, padded=12, computed=computed[1], micro_batches=2)


def test_the_batches_behind_the_counter_are_closed_with_it() -> None:
    closed = []

    def steps() -> Generator[StepBatches, None, None]:
        try:
            while True:
                yield StepBatches(0, 0, ())
        finally:
            closed.append(True)

    watched = counter_of("off").watch(steps())
    next(watched)
    watched.close()

    assert closed


def test_a_real_collated_batch_is_counted_as_its_rows_are() -> None:
    learns, rows = training.task(Setting()), range(5)
    lengths = [len(ids) for ids in learns.splits["train"][list(rows)]["input_ids"]]
    batch = learns.collate(learns.splits["train"][list(rows)], tiny.HERE)

    assert token_counts(batch, has_decoder=False) == (sum(lengths), 5 * max(lengths))

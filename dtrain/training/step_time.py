"""The step-time account: where the time of this rank's steps goes, and how many tokens it computes.

The heartbeat reports each phase that begins; a clock adds up how long each lasts. Every moment belongs to one part, so the
parts of a step add up to its wall time. monitors/step_times.py gathers and writes them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import torch

from dtrain.data.batches import StepBatches
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.tasks.protocol import Task
from dtrain.training.build import PreparedModel
from dtrain.training.computed_tokens import computed_tokens, token_counts


class Part(IntEnum):
    """What a rank's time is spent on."""

    DATA = 0
    FORWARD = 1
    BACKWARD = 2
    COMMUNICATION = 3
    OPTIMIZER = 4
    LOGGING = 5
    CHECKPOINT = 6
    EVALUATION = 7
    OTHER = 8


STEP_PARTS = (Part.DATA, Part.FORWARD, Part.BACKWARD, Part.COMMUNICATION, Part.OPTIMIZER, Part.LOGGING)
"""The parts that every step has."""

_PARTS = {
    Phase.DATA: Part.DATA,
    Phase.MICRO_BATCH: Part.FORWARD,
    Phase.BACKWARD: Part.BACKWARD,
    Phase.EXCHANGE: Part.COMMUNICATION,
    Phase.SUMMING: Part.COMMUNICATION,
    Phase.UPDATE: Part.OPTIMIZER,
    Phase.MONITORS: Part.LOGGING,
    Phase.CHECKPOINT: Part.CHECKPOINT,
    Phase.EVALUATION: Part.EVALUATION,
    Phase.METRICS: Part.EVALUATION,
}


def parts_by_phase(world_size: int) -> list[Part]:
    """Returns the part that each phase counts to, by the phase's number."""
    parts = [_PARTS.get(phase, Part.OTHER) for phase in sorted(Phase)]
    if world_size == 1:
        # Nobody to wait for: what is left is counting the targets of the next batches.
        parts[Phase.SUMMING] = Part.DATA
    return parts


class Clock(Protocol):
    """Adds up the time of each part."""

    def enter(self, phase: Phase) -> None:
        """Ends the current phase and begins another one."""
        ...

    def poll(self) -> None:
        """Reads what the device has finished, without waiting for it. Called once per step."""
        ...

    def take(self) -> list[float]:
        """Returns the seconds of each part since the last call."""
        ...


class HostClock:
    """Measures on the host, which computes: the CPU."""

    def __init__(self, world_size: int, now: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            now: returns the time in seconds.
        """
        self._parts, self._now = parts_by_phase(world_size), now
        self._part, self._since = Part.OTHER, now()
        self._seconds = [0.0] * len(Part)

    def enter(self, phase: Phase) -> None:
        now = self._now()
        self._seconds[self._part] += now - self._since
        self._since, self._part = now, self._parts[phase]

    def poll(self) -> None:
        """Does nothing: the host's clock is never late."""

    def take(self) -> list[float]:
        now = self._now()
        self._seconds[self._part] += now - self._since
        self._since, taken = now, self._seconds
        self._seconds = [0.0] * len(Part)
        return taken


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceClock:
    """Measures on a CUDA device, which works behind the host: an event in its stream at the border of each phase.

    The host never waits for an event, so `take` may lack the last phases; the next call has them. A phase in which the
    host is busy counts here as long as the device waits for it.
    """

    def __init__(self, world_size: int, event: Callable[[], Any] = _timing_event) -> None:
        """
        Args:
            event: makes a timing event.
        """
        self._parts, self._make = parts_by_phase(world_size), event
        self._pending: deque[tuple[Part, Any]] = deque()
        self._unused: list[Any] = []
        self._seconds = [0.0] * len(Part)
        self.enter(Phase.BUILDING)

    def enter(self, phase: Phase) -> None:
        event = self._unused.pop() if self._unused else self._make()
        event.record()
        self._pending.append((self._parts[phase], event))

    def poll(self) -> None:
        while len(self._pending) > 1 and self._pending[1][1].query():
            part, event = self._pending.popleft()
            self._seconds[part] += event.elapsed_time(self._pending[0][1]) / 1e3
            self._unused.append(event)

    def take(self) -> list[float]:
        self.poll()
        taken, self._seconds = self._seconds, [0.0] * len(Part)
        return taken


@contextmanager
def measured(clock: Clock, heartbeat: Heartbeat) -> Generator[None, None, None]:
    """Lets the heartbeat report its phases to the clock inside the block."""
    before, heartbeat.on_phase = heartbeat.on_phase, clock.enter
    try:
        yield
    finally:
        heartbeat.on_phase = before


class WorkCounts(NamedTuple):
    """What this rank computed.

    Attributes:
        steps: steps taken, those included that a monitor skipped or rolled back.
        tokens: tokens of examples, without padding. A dummy micro-batch has none.
        padded: tokens of the batches, with padding; 0 where the task has no tokens.
        computed: tokens that the model's layers computed, with dummies. Padding is in it where it is computed.
        micro_batches: number of micro-batches, with dummies.
    """

    steps: int = 0
    tokens: int = 0
    padded: int = 0
    computed: int = 0
    micro_batches: int = 0

    def plus(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(*map(sum, zip(self, other, strict=True)))


class BatchCounter:
    """Counts the work of this rank's batches once they ran. They are handed to the loop one step ahead."""

    def __init__(self, task: Task, prepared: PreparedModel) -> None:
        self._has_decoder, self._prepared = task.head.has_decoder, prepared
        self._done = WorkCounts()

    def watch(self, steps: Generator[StepBatches, None, None]) -> Generator[StepBatches, None, None]:
        """Yields the same batches."""
        with closing(steps):
            for batches in steps:
                yield batches
                # The loop asks for the next step once it has run the micro-batches of this one, and before a thaw.
                self._done = self._done.plus(self._count(batches))

    def take(self) -> WorkCounts:
        """Returns the counts of the steps taken since the last call."""
        taken, self._done = self._done, WorkCounts()
        return taken

    def _count(self, batches: StepBatches) -> WorkCounts:
        total = WorkCounts(steps=1)
        for batch in batches.micro_batches:
            tokens, padded = token_counts(batch.tensors, has_decoder=self._has_decoder)
            computed = computed_tokens(self._prepared, batch.tensors, tokens=tokens, padded=padded)
            total = total.plus(WorkCounts(0, tokens if batch.counted else 0, padded, computed, 1))
        return total

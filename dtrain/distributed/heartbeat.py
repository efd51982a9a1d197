"""The heartbeat of a rank: where it is in its work, written to memory that another process reads.

One write of a few bytes for each change of phase and each portion of work; no call into the system. `watching/` reads
it and judges; which phases are judged, and how, is said here.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum
from mmap import mmap
from typing import NamedTuple

_MAIN = struct.Struct("<QqdQQBBQ")
"""Count, step, median step, steps timed, evaluations, phase, whether the run folder is ours, and the count once more."""

_THREAD = struct.Struct("<dq")
"""Of the helper thread: when it last had the interpreter lock, and the number of the last collective."""

SIZE = _MAIN.size + _THREAD.size

TRIES = 1000

STEPS = 31
"""How many of the last steps the median is taken over."""


class Rule(Enum):
    """How silence in a phase is judged."""

    STEP = "train.hang_timeout, lowered to 10 median steps (at least 60 s) when steps have been taken"
    TIMED = "train.hang_timeout"
    SLOW = "not judged while it works, however long, nor are those who wait for it; when all wait, train.hang_timeout"
    WAIT = "not judged: another rank is at work"


class Phase(IntEnum):
    """What a rank is doing."""

    STARTING = 0
    PREPARING = 1
    LOADING = 2
    BUILDING = 3
    WAITING_FOR_NODE = 4
    DATA = 5
    MICRO_BATCH = 6
    SUMMING = 7
    UPDATE = 8
    MONITORS = 9
    EVALUATION = 10
    METRICS = 11
    EXPORT = 12
    CHECKPOINT = 13
    FINISHING = 14
    ENDING = 15
    ANSWERING = 16


RULES = {
    Phase.STARTING: Rule.SLOW,
    Phase.PREPARING: Rule.SLOW,
    Phase.LOADING: Rule.SLOW,
    Phase.BUILDING: Rule.SLOW,
    Phase.WAITING_FOR_NODE: Rule.WAIT,
    Phase.DATA: Rule.STEP,
    Phase.MICRO_BATCH: Rule.STEP,
    Phase.SUMMING: Rule.STEP,
    Phase.UPDATE: Rule.STEP,
    Phase.MONITORS: Rule.TIMED,
    Phase.EVALUATION: Rule.TIMED,
    Phase.METRICS: Rule.SLOW,
    Phase.EXPORT: Rule.SLOW,
    Phase.CHECKPOINT: Rule.SLOW,
    Phase.FINISHING: Rule.TIMED,
    Phase.ENDING: Rule.SLOW,
    Phase.ANSWERING: Rule.TIMED,
}

WORDS = {
    Phase.STARTING: "starting",
    Phase.PREPARING: "preparing the data",
    Phase.LOADING: "loading the model",
    Phase.BUILDING: "building the engine",
    Phase.WAITING_FOR_NODE: "waiting for another rank's work",
    Phase.DATA: "reading the next batches",
    Phase.MICRO_BATCH: "in forward and backward",
    Phase.SUMMING: "adding up the step's losses",
    Phase.UPDATE: "updating the weights",
    Phase.MONITORS: "in a monitor after a step",
    Phase.EVALUATION: "evaluating",
    Phase.METRICS: "working out metrics",
    Phase.EXPORT: "writing the model",
    Phase.CHECKPOINT: "saving a checkpoint",
    Phase.FINISHING: "leaving",
    Phase.ENDING: "ending",
    Phase.ANSWERING: "writing an answer",
}


class Pulse(NamedTuple):
    """What was last written.

    number: rises with every write. step: 0-based; -1 before the first. median_s: of the last steps; 0 before two began.
    steps_timed, evaluations: how many have been done since the start. owns_folder: whether exit.json is ours to write.
    lock_s: time.monotonic() at which a thread last had the interpreter lock. collective: number of the last, or -1.
    """

    number: int
    step: int
    median_s: float
    steps_timed: int
    evaluations: int
    phase: Phase
    owns_folder: bool
    lock_s: float
    collective: int


class Heartbeat:
    """The pen of one rank. Without shared memory it writes where nobody reads."""

    def __init__(self, memory: mmap | None = None) -> None:
        self._memory: mmap | bytearray = memory if memory is not None else bytearray(SIZE)
        self._count, self._step, self._timed, self._evaluations, self._median = 0, -1, 0, 0, 0.0
        self._phase, self._owns_folder = Phase.STARTING, False
        self._began: float | None = None
        self._durations: deque[float] = deque(maxlen=STEPS)
        self.lock = ""
        self.on_disowned: Callable[[str], None] = lambda _words: None
        self.tick()

    def at(self, phase: Phase, *, step: int | None = None) -> None:
        """Work of another kind begins, or the next portion of the same.

        Args:
            step: 0-based; None leaves it as it is.
        """
        self._phase = phase
        if step is not None and step != self._step:
            self._begin(step)
        self.tick()

    def tick(self) -> None:
        """A portion of work is done."""
        self._count += 1
        _MAIN.pack_into(
            self._memory,
            0,
            self._count,
            self._step,
            self._median,
            self._timed,
            self._evaluations,
            self._phase,
            self._owns_folder,
            self._count,
        )

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Around work of another kind; what was before goes on after it."""
        before = self._phase
        self.at(phase)
        try:
            yield
        finally:
            self._evaluations += phase == Phase.EVALUATION
            # An error on its way out has been reported as the end before it comes here, or will be.
            if self._phase != Phase.ENDING:
                self.at(before)

    def own_folder(self, lock: str = "") -> None:
        """The run folder is this run's from here on, so that its end may be written there.

        Args:
            lock: the id in its run.lock; empty where there is none.
        """
        self.lock, self._owns_folder = lock, True
        self.tick()

    def disown_folder(self, words: str) -> None:
        """From a helper thread: the folder is another job's now, which is why this one ends."""
        self._owns_folder = False
        self.tick()
        self.on_disowned(words)

    def thread(self, collective: int) -> None:
        """From the helper thread: the interpreter lock can be had, and this is the last collective's number."""
        _THREAD.pack_into(self._memory, _MAIN.size, time.monotonic(), collective)

    def _begin(self, step: int) -> None:
        now = time.monotonic()
        if self._began is not None:
            self._durations.append(now - self._began)
            self._timed += 1
            self._median = statistics.median(self._durations)
        self._began, self._step = now, step


def read(memory: mmap | bytearray) -> Pulse:
    """What a rank wrote last, from the memory that it shares."""
    for _ in range(TRIES):
        count, step, median_s, timed, evaluations, phase, owns_folder, again = _MAIN.unpack_from(memory, 0)
        if count == again:  # else the rank writes just now, or was stopped while it wrote
            break
    lock_s, collective = _THREAD.unpack_from(memory, _MAIN.size)
    return Pulse(count, step, median_s, timed, evaluations, Phase(phase), bool(owns_folder), lock_s, collective)

"""The heartbeat of a rank: its current phase and progress, written to memory that another process reads.

Each change of phase and each unit of work writes a few bytes, without a system call. `job/watchdog` reads them and
decides whether the rank hangs. This file defines the phases and which idle rule applies to each.
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

_MAIN_THREAD = struct.Struct("<QqdQQBBQ")
"""Format of: writes, step, median step, steps timed, evaluations, phase, owns_run_dir, and writes again."""

_HELPER_THREAD = struct.Struct("<dq")
"""Format of: time when the helper thread last held the interpreter lock (GIL), and number of the last collective."""

HEARTBEAT_BYTES = _MAIN_THREAD.size + _HELPER_THREAD.size

MAX_READ_ATTEMPTS = 1000

MEDIAN_WINDOW = 31
"""Number of recent steps that the median is taken over."""


class IdleRule(Enum):
    """How long a rank may be idle in a phase: without a heartbeat and without starting a collective."""

    STEP = "train.hang_timeout, lowered to 10 median steps (at least 60 s) once steps have been timed"
    TIMED = "train.hang_timeout"
    UNLIMITED = "no limit, also for ranks that wait for it; if all ranks wait for each other, train.hang_timeout"
    WAITING = "no limit: another rank is at work"


class Phase(IntEnum):
    """The kind of work that a rank is doing."""

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
    BACKWARD = 17
    EXCHANGE = 18


IDLE_RULES = {
    Phase.STARTING: IdleRule.UNLIMITED,
    Phase.PREPARING: IdleRule.UNLIMITED,
    Phase.LOADING: IdleRule.UNLIMITED,
    Phase.BUILDING: IdleRule.UNLIMITED,
    Phase.WAITING_FOR_NODE: IdleRule.WAITING,
    Phase.DATA: IdleRule.STEP,
    Phase.MICRO_BATCH: IdleRule.STEP,
    Phase.SUMMING: IdleRule.STEP,
    Phase.UPDATE: IdleRule.STEP,
    Phase.MONITORS: IdleRule.TIMED,
    Phase.EVALUATION: IdleRule.TIMED,
    Phase.METRICS: IdleRule.UNLIMITED,
    Phase.EXPORT: IdleRule.UNLIMITED,
    Phase.CHECKPOINT: IdleRule.UNLIMITED,
    Phase.FINISHING: IdleRule.TIMED,
    Phase.ENDING: IdleRule.UNLIMITED,
    Phase.ANSWERING: IdleRule.TIMED,
    Phase.BACKWARD: IdleRule.STEP,
    Phase.EXCHANGE: IdleRule.STEP,
}

PHASE_DESCRIPTIONS = {
    Phase.STARTING: "starting",
    Phase.PREPARING: "preparing the data",
    Phase.LOADING: "loading the model",
    Phase.BUILDING: "building the engine",
    Phase.WAITING_FOR_NODE: "waiting for another rank's work",
    Phase.DATA: "reading the next batches",
    Phase.MICRO_BATCH: "in a forward pass",
    Phase.SUMMING: "adding up the step's losses",
    Phase.UPDATE: "updating the weights",
    Phase.MONITORS: "in a monitor after a step",
    Phase.EVALUATION: "evaluating",
    Phase.METRICS: "computing metrics",
    Phase.EXPORT: "writing the model",
    Phase.CHECKPOINT: "saving a checkpoint",
    Phase.FINISHING: "leaving the process group",
    Phase.ENDING: "exiting",
    Phase.ANSWERING: "generating an answer",
    Phase.BACKWARD: "in a backward pass",
    Phase.EXCHANGE: "averaging over ranks",
}


class HeartbeatReading(NamedTuple):
    """The last values that a rank wrote.

    Attributes:
        writes: increases with every write.
        step: 0-based; -1 before the first.
        median_step_s: median duration of the last steps; 0 until two steps have started.
        steps_timed: number of steps timed since the start.
        evaluations: number of evaluations completed since the start.
        phase: the kind of work that the rank is doing.
        owns_run_dir: whether this run may write exit.json.
        gil_acquired_s: time.monotonic() when the helper thread last held the interpreter lock (GIL).
        collective: number of the last collective; -1 for none.
    """

    writes: int
    step: int
    median_step_s: float
    steps_timed: int
    evaluations: int
    phase: Phase
    owns_run_dir: bool
    gil_acquired_s: float
    collective: int


class Heartbeat:
    """Writes one rank's heartbeat; writes to a private buffer if there is no shared memory.

    Attributes:
        lock_id: id in the run.lock of this run's folder; empty if there is none.
        on_run_dir_lost: called with the reason when another job has taken over the run folder.
        on_phase: called with each phase that begins; training/step_time.py measures how long they take.
    """

    def __init__(self, memory: mmap | None = None) -> None:
        self._memory: mmap | bytearray = memory if memory is not None else bytearray(HEARTBEAT_BYTES)
        self._writes, self._step, self._steps_timed, self._evaluations, self._median_step_s = 0, -1, 0, 0, 0.0
        self._phase, self._owns_run_dir = Phase.STARTING, False
        self._step_start: float | None = None
        self._step_durations: deque[float] = deque(maxlen=MEDIAN_WINDOW)
        self.lock_id = ""
        self.on_run_dir_lost: Callable[[str], None] = lambda _reason: None
        self.on_phase: Callable[[Phase], None] = lambda _phase: None
        self.tick()

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self._phase

    def at(self, phase: Phase, *, step: int | None = None) -> None:
        """Records the start of a phase, or of the next unit of work in the same phase.

        Args:
            step: 0-based; None keeps the current one.
        """
        self._phase = phase
        if step is not None and step != self._step:
            self._start_step(step)
        self.tick()
        self.on_phase(phase)

    def tick(self) -> None:
        """Records that a unit of work is done."""
        self._writes += 1
        _MAIN_THREAD.pack_into(
            self._memory,
            0,
            self._writes,
            self._step,
            self._median_step_s,
            self._steps_timed,
            self._evaluations,
            self._phase,
            self._owns_run_dir,
            self._writes,
        )

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Records a phase for the duration of the block, then restores the previous one."""
        before = self._phase
        self.at(phase)
        try:
            yield
        finally:
            self._evaluations += phase == Phase.EVALUATION
            # After an error the phase may be ENDING already, and must stay so.
            if self._phase != Phase.ENDING:
                self.at(before)

    def claim_run_dir(self, lock_id: str = "") -> None:
        """Records that the run folder belongs to this run from now on, so that its exit.json may be written.

        Args:
            lock_id: the id in its run.lock; empty if there is none.
        """
        self.lock_id, self._owns_run_dir = lock_id, True
        self.tick()

    def lose_run_dir(self, reason: str) -> None:
        """Records that another job has taken over the run folder, which ends this one. Called by a helper thread."""
        self._owns_run_dir = False
        self.tick()
        self.on_run_dir_lost(reason)

    def record_gil(self, collective: int) -> None:
        """Records that the interpreter lock (GIL) is available, and the last collective. For the helper thread."""
        _HELPER_THREAD.pack_into(self._memory, _MAIN_THREAD.size, time.monotonic(), collective)

    def _start_step(self, step: int) -> None:
        now = time.monotonic()
        if self._step_start is not None:
            self._step_durations.append(now - self._step_start)
            self._steps_timed += 1
            self._median_step_s = statistics.median(self._step_durations)
        self._step_start, self._step = now, step


def read_heartbeat(memory: mmap | bytearray) -> HeartbeatReading:
    """Reads what a rank wrote last, from the memory that it shares."""
    for _ in range(MAX_READ_ATTEMPTS):
        writes, step, median_s, timed, evaluations, phase, owns, writes_again = _MAIN_THREAD.unpack_from(memory, 0)
        if writes == writes_again:  # else the rank is writing, or was stopped while it wrote
            break
    gil_s, collective = _HELPER_THREAD.unpack_from(memory, _MAIN_THREAD.size)
    return HeartbeatReading(writes, step, median_s, timed, evaluations, Phase(phase), bool(owns), gil_s, collective)

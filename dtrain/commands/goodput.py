"""The goodput command: how the wall time of a run was spent, over all its starts, from metrics.jsonl alone.

A generation is one start of the job. Time inside a generation comes from its monotonic clock, and time between two
generations from the wall clock. Every second of the run belongs to exactly one category. Needs no torch.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dtrain.console import log
from dtrain.errors import ConfigError, DataError
from dtrain.runs.jsonl import read_events
from dtrain.runs.time_ranges import StepRanges, Waits

CATEGORIES = {
    "training": "steps that count",
    "recomputed": "steps repeated after a crash",
    "start_up": "imports, data, model, engine, restoring a checkpoint",
    "checkpoint": "training waited for a checkpoint",
    "evaluation": "on the other splits",
    "faults": "hangs, rollbacks, and steps whose update was dropped or undone",
    "finishing": "export, last files, stopping",
    "down": "between two starts, with what a killed start had not written yet",
}
"""The categories of time and their descriptions, in the order of the table."""

STEP_PARTS = ("data", "forward", "backward", "communication", "optimizer", "logging")
"""The parts of a step in `step_time` lines, in the order in which they are shown."""

LAST_SECOND = 1e12
"""No clock of a run shows this many seconds, nor NaN."""

Event = Mapping[str, Any]


@dataclass
class TimeReport:
    """The wall time of a run by category."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    """Seconds in each category. Their sum is the run's wall time."""
    steps: int = 0
    """The last step reached."""
    recomputed_steps: int = 0
    """Steps repeated after a crash."""
    generations: int = 0
    """Starts of the job."""
    step_parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEP_PARTS, 0.0))
    """Seconds of each part of the steps, on all ranks together, from the lines of `train.time_every`."""

    @property
    def total(self) -> float:
        """Seconds of wall time from the first start to the last line."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the wall time spent in steps that count."""
        return self.seconds["training"] / self.total if self.total else 0.0

    @property
    def step_shares(self) -> dict[str, float]:
        """The share of each part of the steps; empty if they were not measured."""
        total = sum(self.step_parts.values())
        return {part: seconds / total for part, seconds in self.step_parts.items()} if total else {}

    def as_json(self) -> dict[str, Any]:
        """Returns all figures in one flat object."""
        return {
            "goodput": self.goodput,
            "total_s": self.total,
            **{f"{category}_s": seconds for category, seconds in self.seconds.items()},
            "steps": self.steps,
            "recomputed_steps": self.recomputed_steps,
            "generations": self.generations,
            **{f"step_{part}_share": share for part, share in self.step_shares.items()},
        }


def run_goodput(run: Path, *, as_json: bool) -> None:
    """Prints the time report of a run.

    Raises:
        ConfigError: the folder does not exist or has no training run in it.
        DataError: its metrics.jsonl is damaged.
    """
    path = run / "metrics.jsonl"
    if not run.is_dir():
        raise ConfigError(f"{run} is not a folder. Name the folder of a run: dtrain goodput runs/<name>")
    if not path.is_file():
        raise ConfigError(f"{run} has no training run: it contains no metrics.jsonl. Name the folder of a training run")
    try:
        report = build_report(_checked_events(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not report.generations:
        raise ConfigError(
            f"{path} has no start of a run: the run ended before it started training, or another program wrote the file"
        )
    if as_json:
        sys.stdout.write(json.dumps(report.as_json()) + "\n")
    else:
        log.info("%s", format_table(report))


def format_table(report: TimeReport) -> str:
    """Returns the table: one line for each category that took time, and the goodput last."""
    starts = "1 start" if report.generations == 1 else f"{report.generations} starts"
    total = report.total
    lines = [f"{report.steps} steps, {report.recomputed_steps} of them repeated, in {starts}"]
    lines += [
        f"{category.replace('_', '-'):12s} {seconds:12.1f} s {100 * seconds / total if total else 0:6.1f} %"
        f"   {CATEGORIES[category]}"
        for category, seconds in report.seconds.items()
        if seconds or category == "training"
    ]
    lines.append(f"{'total':12s} {total:12.1f} s")
    if report.step_shares:
        shares = ", ".join(f"{part} {100 * share:.1f} %" for part, share in report.step_shares.items())
        lines.append(f"{'a step':12s} {shares}")
    lines.append(f"goodput {100 * report.goodput:.1f} %")
    return "\n".join(lines)


def build_report(lines: Iterable[Event]) -> TimeReport:
    """Returns the time report of the lines of one metrics.jsonl, which are read once and not kept."""
    report, last_step, end = TimeReport(), 0, None
    generations = _read_generations(lines, report.step_parts)
    paces = [pace for generation in generations if (pace := generation.pace()) is not None]
    median_pace = sorted(paces)[len(paces) // 2] if paces else None
    for generation in generations:
        if end is not None:
            report.seconds["down"] += max(generation.begin - end, 0.0)
        last_step = generation.add_to(report, last_step, median_pace)
        end = generation.begin + generation.seconds
    report.steps, report.generations = last_step, len(generations)
    return report


def _read_generations(lines: Iterable[Event], step_parts: dict[str, float]) -> list[_Generation]:
    """Returns each start. Lines before the first one are ignored.

    Args:
        step_parts: gets the seconds of each part of the steps.
    """
    generations: list[_Generation] = []
    for line in lines:
        if line.get("event") == "start":
            generations.append(_Generation(line))
        elif generations:
            generations[-1].note(line)
            if line.get("event") == "step_time":
                _add_step_parts(line, step_parts)
    return generations


class _Generation:
    """One start, from its `start` event on. Of a `train` line, two numbers are kept."""

    def __init__(self, start: Event) -> None:
        self._startup_s = _seconds(start.get("startup_s"))
        self._start_s = self._last_s = start["monotonic_s"]
        self.begin = start["time_s"] - self._startup_s
        """Wall time at which the process started, in seconds since 1970."""
        self._first_step: int | None = None
        self._latest = 0
        self._lost = StepRanges()
        self._stalls = Waits()
        self._times, self._steps = array("d"), array("d")
        """When each interval but the last one ended, and at which step."""
        self._noted: dict[int, _Interval] = {}
        """What the lines report of an interval, by its number; most have nothing."""

    @property
    def seconds(self) -> float:
        """Duration until the last line: its `end` event, or the last one before it was killed."""
        return float(self._startup_s + self._last_s - self._start_s)

    def note(self, line: Event) -> None:
        """Adds the next line."""
        kind, step, now = line.get("event"), line.get("step"), line["monotonic_s"]
        self._last_s = now
        self._lost.add(_lost_steps(line))
        if (stall := _stall(line)) is not None:
            self._stalls.add(*stall)
        number = len(self._times)
        if kind in _REPORTING and stall is None:
            self._noted.setdefault(number, _Interval(0)).note(line)
        if kind == "resume" and number == 0:
            if isinstance(step, int) and self._first_step is None:
                self._first_step, self._latest = step, max(self._latest, step)
            # Restoring ends here. Everything before counts as start-up.
            self._noted.setdefault(0, _Interval(0)).known["start_up"] = now - self._start_s
        if isinstance(step, int) and kind in ("train", "eval", "checkpoint", "preempt", "end"):
            self._latest = max(self._latest, step)
        if kind == "train":
            self._times.append(now)
            self._steps.append(self._latest)

    def pace(self) -> float | None:
        """Returns the seconds per step between two train lines, without other work; None with fewer than two lines."""
        steps, rest = 0, 0.0
        for interval in self._intervals():
            if not (interval.is_first or interval.is_last):
                steps, rest = steps + interval.steps, rest + interval.rest
        return rest / steps if steps else None

    def add_to(self, report: TimeReport, last_step: int, median_pace: float | None) -> int:
        """Adds this generation's time to the report and returns the last step reached so far.

        Args:
            report: changed in place.
            last_step: the last step that an earlier generation reached.
            median_pace: seconds per step over all generations, for one that is too short to measure its own; None if
                no generation is long enough.
        """
        pace, seconds = self.pace() or median_pace, report.seconds
        seconds["start_up"] += self._startup_s
        for interval in self._intervals():
            for category, known in interval.known.items():
                seconds[category] += known
            in_steps = interval.in_steps(pace)
            other = "faults" if interval.hangs else "start_up" if interval.is_first else "finishing"
            seconds[other] += interval.rest - in_steps
            repeated = min(max(last_step - interval.first, 0), interval.steps)
            share = 1 / interval.steps if interval.steps else 0.0
            dropped = in_steps * interval.dropped * share
            recomputed = (in_steps - dropped) * repeated * share
            seconds["faults"] += dropped
            seconds["recomputed"] += recomputed
            seconds["training"] += in_steps - dropped - recomputed
            report.recomputed_steps += repeated
            last_step = max(last_step, interval.first + interval.steps)
        return last_step

    def _intervals(self) -> Iterator[_Interval]:
        """Yields the time between `train` lines, and up to the end of the generation."""
        since, first, last = self._start_s, self._first_step or 0, len(self._times)
        ends = chain(zip(self._times, map(int, self._steps), strict=True), [(self._last_s, self._latest)])
        for number, (now, step) in enumerate(ends):
            noted = self._noted.get(number)
            interval = _Interval(first, is_first=number == 0, is_last=number == last)
            if noted is not None:
                interval.known, interval.hangs = dict(noted.known), noted.hangs
            for begin, end in self._stalls.between(since, now):
                interval.add("checkpoint", min(end, now) - max(begin, since))
            interval.dropped = self._lost.count(first + 1, step + 1)
            yield interval.close(step, now - since)
            since, first = now, step


_REPORTING = ("eval", "export", "rollback", "checkpoint", "fault")
"""Events that report time of their own."""


@dataclass
class _Interval:
    """The time between two lines."""

    first: int
    """The last step before it."""
    is_first: bool = False
    is_last: bool = False
    known: dict[str, float] = field(default_factory=dict)
    """Seconds by category, from what the lines report."""
    rest: float = 0.0
    """The remaining seconds."""
    steps: int = 0
    """Steps taken in it."""
    dropped: int = 0
    """Those of its steps whose update is not in the weights."""
    hangs: bool = False
    """Whether a hang ended it."""

    def note(self, line: Event) -> None:
        """Adds the time that a line reports."""
        match line.get("event"):
            case "eval":
                self.add("evaluation", line.get("seconds"))
            case "export":
                self.add("finishing", line.get("seconds"))
            case "rollback":
                self.add("faults", line.get("seconds"))
            case "checkpoint" if _stall(line) is None:
                self.add("checkpoint", line.get("stall_s"))
            case "fault":
                self.hangs = self.hangs or line.get("kind") == "hang"

    def in_steps(self, pace: float | None) -> float:
        """Returns the seconds of the rest spent in steps. The first and last intervals also contain other work.

        Args:
            pace: seconds per step; None if unknown, and then all of the rest counts as steps.
        """
        if not self.steps or not (self.is_first or self.is_last):
            return self.rest if self.steps else 0.0
        return self.rest if pace is None else min(self.rest, self.steps * pace)

    def close(self, step: int, seconds: float) -> _Interval:
        """Ends the interval at a step, after that many seconds."""
        known = sum(self.known.values())
        if known > seconds:
            # The lines report more time than passed, by rounding or because a clock stopped: scale them down.
            self.known = {category: value * max(seconds, 0.0) / known for category, value in self.known.items()}
        self.rest = max(seconds - known, 0.0)
        self.steps = step - self.first
        return self

    def add(self, category: str, seconds: Any) -> None:
        """Adds known seconds to a category."""
        self.known[category] = self.known.get(category, 0.0) + _seconds(seconds)


def _add_step_parts(line: Event, parts: dict[str, float]) -> None:
    """Adds the seconds of every rank in a line to the parts of the steps."""
    for part in parts:
        seconds = line.get(f"{part}_s")
        if isinstance(seconds, list):
            parts[part] += sum(_seconds(value) for value in seconds)


def _seconds(value: Any) -> float:
    """Returns the duration in a line's field; 0 if the field is missing."""
    return max(float(value), 0.0) if isinstance(value, int | float) else 0.0


def _stall(line: Event) -> tuple[float, float] | None:
    """Returns the start and end of a wait for a checkpoint, in monotonic time.

    Its line comes later, when the checkpoint is complete.
    """
    begin = line.get("stall_began_s")
    return (begin, begin + _seconds(line.get("stall_s"))) if isinstance(begin, int | float) else None


def _lost_steps(line: Event) -> range:
    """Returns the steps whose update was lost, according to a line: dropped, or undone by a rollback."""
    step = line.get("step")
    if not isinstance(step, int):
        return range(0)
    match line:
        case {"event": "train", "applied": False} | {"event": "fault", "kind": "spike", "action": "skip"}:
            return range(step, step + 1)
        case {"event": "rollback", "to_step": int(to_step)}:
            return range(to_step + 1, step + 1)
    return range(0)


def _checked_events(path: Path) -> Iterable[Event]:
    for number, line in enumerate(read_events(path), 1):
        times = [line.get(name) for name in ("time_s", "monotonic_s")] if isinstance(line, dict) else [None]
        if not all(isinstance(value, int | float) and abs(value) < LAST_SECOND for value in times):
            raise DataError(f"{path}, line {number}: time_s or monotonic_s is missing or no time; the file is damaged")
        yield line

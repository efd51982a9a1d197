"""The goodput command: where the wall time of a run went, over all its starts, from metrics.jsonl alone.

A generation is one start of the job. Inside one, time is measured by its monotonic clock; between two, by the wall
clock. Every second of the run is in exactly one of the parts. Needs no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from dtrain.console import log
from dtrain.errors import ConfigError, DataError
from dtrain.runs.jsonl import read_events

PARTS = {
    "training": "steps that count",
    "recomputed": "steps taken again after a crash",
    "start_up": "imports, data, model, engine, restoring",
    "checkpoint": "the loop stood still for a checkpoint",
    "evaluation": "on the other splits",
    "faults": "hangs, going back to a checkpoint, and steps whose update was dropped or undone",
    "finishing": "export, last files, being stopped",
    "down": "between two starts; also what a killed one had not yet written",
}
"""Where time goes, in the order in which it is shown."""

Event = Mapping[str, Any]


@dataclass
class Account:
    """seconds: by part; together they are the run's whole wall time. steps: taken for good. generations: starts."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    steps: int = 0
    recomputed_steps: int = 0
    generations: int = 0

    @property
    def total(self) -> float:
        """Wall time from the first start to the last line, in seconds."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of it that went into steps that count."""
        return self.seconds["training"] / self.total if self.total else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it, flat."""
        return {
            "goodput": self.goodput,
            "total_s": self.total,
            **{f"{part}_s": seconds for part, seconds in self.seconds.items()},
            "steps": self.steps,
            "recomputed_steps": self.recomputed_steps,
            "generations": self.generations,
        }


def run_goodput(run: Path, *, as_json: bool) -> None:
    """Prints the account of a run.

    Raises:
        ConfigError: there is no such folder, or no training run in it.
        DataError: its metrics.jsonl is damaged.
    """
    path = run / "metrics.jsonl"
    if not run.is_dir():
        raise ConfigError(f"{run} is no folder. Name a run's: dtrain goodput runs/<name>")
    if not path.is_file():
        raise ConfigError(f"{run} holds no training run: there is no metrics.jsonl in it. Name the folder of one")
    try:
        account = account_of(_checked(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not account.generations:
        raise ConfigError(
            f"{path} holds no start of a run: it ended before it began, or the file is of another program"
        )
    if as_json:
        sys.stdout.write(json.dumps(account.as_json()) + "\n")
    else:
        log.info("%s", describe(account))


def describe(account: Account) -> str:
    """The table: a line for each part that took time, and the goodput last."""
    starts = "1 start" if account.generations == 1 else f"{account.generations} starts"
    total = account.total
    lines = [f"{account.steps} steps, {account.recomputed_steps} of them taken again, in {starts}"]
    lines += [
        f"{part.replace('_', '-'):12s} {seconds:12.1f} s {100 * seconds / total if total else 0:6.1f} %   {PARTS[part]}"
        for part, seconds in account.seconds.items()
        if seconds or part == "training"
    ]
    lines.append(f"{'total':12s} {total:12.1f} s")
    lines.append(f"goodput {100 * account.goodput:.1f} %")
    return "\n".join(lines)


def account_of(lines: Iterable[Event]) -> Account:
    """Adds up the lines of one metrics.jsonl."""
    account, reached, end = Account(), 0, None
    generations = [_Generation(members) for members in _generations(lines)]
    paces = [pace for generation in generations if (pace := generation.pace()) is not None]
    usual = sorted(paces)[len(paces) // 2] if paces else None
    for generation in generations:
        if end is not None:
            account.seconds["down"] += max(generation.begin - end, 0.0)
        reached = generation.add_to(account, reached, usual)
        end = generation.begin + generation.seconds
    account.steps, account.generations = reached, len(generations)
    return account


class _Generation:
    """The lines of one start, from `start` on."""

    def __init__(self, lines: Sequence[Event]) -> None:
        start = lines[0]
        self._lines = lines
        self._startup_s = _seconds(start.get("startup_s"))
        self.begin = start["time_s"] - self._startup_s
        """Wall time at which the process began, in seconds since 1970."""
        self.seconds = self._startup_s + lines[-1]["monotonic_s"] - start["monotonic_s"]
        """Until the last line, whether that is its `end` or it was killed after it."""
        self._lost = {step for line in lines for step in _lost_steps(line)}
        self._stalls = [stall for line in lines if (stall := _stall(line)) is not None]

    def pace(self) -> float | None:
        """Seconds a step between two train lines, without what else happened there; None with less than two lines."""
        between = [stretch for stretch in self._stretches() if not (stretch.is_first or stretch.is_last)]
        steps = sum(stretch.steps for stretch in between)
        return sum(stretch.rest for stretch in between) / steps if steps else None

    def add_to(self, account: Account, reached: int, usual: float | None) -> int:
        """Adds this generation's time; gives the last step that is reached after it.

        Args:
            reached: the last step that an earlier one took.
            usual: seconds a step of the whole run, for a generation too short to tell; None where none is.
        """
        pace, seconds = self.pace() or usual, account.seconds
        seconds["start_up"] += self._startup_s
        for stretch in self._stretches():
            for part, taken in stretch.parts.items():
                seconds[part] += taken
            in_steps = stretch.in_steps(pace)
            other = "faults" if stretch.hangs else "start_up" if stretch.is_first else "finishing"
            seconds[other] += stretch.rest - in_steps
            again = min(max(reached - stretch.first, 0), stretch.steps)
            share = 1 / stretch.steps if stretch.steps else 0.0
            dropped = in_steps * stretch.dropped * share
            recomputed = (in_steps - dropped) * again * share
            seconds["faults"] += dropped
            seconds["recomputed"] += recomputed
            seconds["training"] += in_steps - dropped - recomputed
            account.recomputed_steps += again
            reached = max(reached, stretch.first + stretch.steps)
        return reached

    def _stretches(self) -> list[_Stretch]:
        """The time from line to line of those that tell a step: `train`, and what ends the generation."""
        start, found = self._lines[0], []
        stretch = _Stretch(_step_before(self._lines), is_first=True)
        since, latest = start["monotonic_s"], stretch.first

        def close(now: float) -> _Stretch:
            for begin, end in self._stalls:
                stretch.add("checkpoint", min(end, now) - max(begin, since))
            stretch.dropped = sum(stretch.first < step <= latest for step in self._lost)
            return stretch.close(latest, now - since)

        for line in self._lines[1:]:
            kind, now = line.get("event"), line["monotonic_s"]
            stretch.note(line)
            if kind == "resume" and stretch.is_first:
                # Restoring ends here: it is start-up in full.
                stretch.parts["start_up"] = now - since
            if isinstance(line.get("step"), int) and kind in ("train", "eval", "checkpoint", "preempt", "end"):
                latest = max(latest, line["step"])
            if kind == "train":
                found.append(close(now))
                stretch, since = _Stretch(latest), now
        stretch.is_last = True
        return [*found, close(self._lines[-1]["monotonic_s"])]


@dataclass
class _Stretch:
    """Time between two lines. first: the step before it. parts: what is known of it. rest: what is not, in seconds.

    steps: taken in it; dropped: those of them whose update is not in the weights. hangs: a hang ended it.
    """

    first: int
    is_first: bool = False
    is_last: bool = False
    parts: dict[str, float] = field(default_factory=dict)
    rest: float = 0.0
    steps: int = 0
    dropped: int = 0
    hangs: bool = False

    def note(self, line: Event) -> None:
        """Takes what a line says of this time."""
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
        """How much of the rest went into steps, in seconds; at both ends of a generation it is more than that.

        Args:
            pace: seconds a step; None where it is not known, and then all of it did.
        """
        if not self.steps or not (self.is_first or self.is_last):
            return self.rest if self.steps else 0.0
        return self.rest if pace is None else min(self.rest, self.steps * pace)

    def close(self, step: int, seconds: float) -> _Stretch:
        """Ends it at a step, after so long."""
        known = sum(self.parts.values())
        if known > seconds:  # said to have taken longer than there was: rounding, or a clock that stood still
            self.parts = {part: taken * max(seconds, 0.0) / known for part, taken in self.parts.items()}
        self.rest = max(seconds - known, 0.0)
        self.steps = step - self.first
        return self

    def add(self, part: str, seconds: Any) -> None:
        """So much of it is known to be of that part."""
        self.parts[part] = self.parts.get(part, 0.0) + _seconds(seconds)


def _seconds(value: Any) -> float:
    """A duration as a line has it; nothing, where it says none."""
    return max(float(value), 0.0) if isinstance(value, int | float) else 0.0


def _stall(line: Event) -> tuple[float, float] | None:
    """From when to when, in monotonic time, the loop stood still for a checkpoint; its line comes when that is written."""
    begin = line.get("stall_began_s")
    return (begin, begin + _seconds(line.get("stall_s"))) if isinstance(begin, int | float) else None


def _lost_steps(line: Event) -> Iterable[int]:
    """The steps that a line says to have been in vain: dropped, or undone by going back to an older checkpoint."""
    step = line.get("step")
    if not isinstance(step, int):
        return ()
    match line:
        case {"event": "train", "applied": False} | {"event": "fault", "kind": "spike", "action": "skip"}:
            return (step,)
        case {"event": "rollback", "to_step": int(to_step)}:
            return range(to_step + 1, step + 1)
    return ()


def _step_before(lines: Iterable[Event]) -> int:
    """The step at which a generation began: as its `resume` says, else 0."""
    before_training = takewhile(lambda line: line.get("event") != "train", lines)
    return next((line["step"] for line in before_training if line.get("event") == "resume" and "step" in line), 0)


def _generations(lines: Iterable[Event]) -> list[list[Event]]:
    """Lines by start. What stands before the first start belongs to none."""
    found: list[list[Event]] = []
    for line in lines:
        if line.get("event") == "start":
            found.append([line])
        elif found:
            found[-1].append(line)
    return found


def _checked(path: Path) -> Iterable[Event]:
    for number, line in enumerate(read_events(path), 1):
        times = [line.get(name) for name in ("time_s", "monotonic_s")] if isinstance(line, dict) else [None]
        if not all(isinstance(value, int | float) for value in times):
            raise DataError(f"{path}, line {number}: it has no time_s and monotonic_s; the file is damaged")
        yield line

"""The row `checkpoint`: how long training waits for a checkpoint, and how much slower steps are while it is written."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import ContestantError, Lane
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.spec import DTRAIN, HF, Spec
from tests.benchmarks.suite.workloads import T2, Workload

EVERY, STEPS = 20, 70
COLUMNS = {
    "wait s": ("wait_s", 1.0, 2),
    "step ms, nothing written": ("quiet_s", 1e3, 0),
    "step ms, while written": ("writing_s", 1e3, 0),
    "steps slower by %": ("inflation", 100.0, 1),
    "s a checkpoint costs in all": ("cost_s", 1.0, 2),
    "MB": ("bytes", 1e-6, 0),
}


def checkpoint(options: Options) -> RowResult:
    """T2, 2 rows of 16 tokens a step, a checkpoint every 20 steps. Not bound to a core: the writer may use another."""
    workload = Workload(T2, rows=STEPS * 2, batch=2, length=16)
    result = RowResult(
        "checkpoint",
        "training while a checkpoint is written",
        f"T2, 2 rows of 16 tokens a step, {STEPS} steps, a checkpoint every {EVERY}. wait = the step that saves less the "
        "median of quiet steps. In all = the run's time over that of quiet steps, per checkpoint.",
        [],
        COLUMNS,
        compared={"wait / dtrain": "wait_s", "cost / dtrain": "cost_s"},
    )
    if options.quick:
        result.notes.append("nothing here is equal in every run: not part of --quick")
        return result
    for one in options.chosen([DTRAIN, HF]):
        lane = Lane(one.name, one.unavailable() or "ran")
        result.lanes.append(lane)
        for turn in range(options.rounds(1)):
            if lane.ran:
                spec = options.spec("checkpoint", one, workload, steps=STEPS)
                output = spec.output / str(turn)
                _measure(lane, replace(spec, save_every=EVERY, traced=True, core=None, output=output))
    return result


def _measure(lane: Lane, spec: Spec) -> None:
    try:
        ends = race.run_whole(spec)["step_ends"]
    except ContestantError as error:
        lane.status = f"failed: {error}"
        return
    events = _events(spec)
    for name, value in figures_of(ends, events).items():
        lane.add(**{name: value})
    if events:
        lane.add(bytes=events[0]["bytes"])


def figures_of(ends: Sequence[float], events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns wait, quiet and slowed steps, and the whole cost, in seconds.

    Args:
        ends: monotonic time at the end of each step.
        events: dtrain's checkpoint lines, which say when the writer worked; empty: it is known only that it wrote.
    """
    steps = list(itertools.pairwise(ends))[1:]  # without the first, in which much is prepared
    saves = [ends[number - 1] for number in range(EVERY, len(ends), EVERY)]
    written = [
        (event["stall_began_s"], event["stall_began_s"] + event["stall_s"] + event["seconds"]) for event in events
    ]
    saving = [end - begin for begin, end in steps if begin in saves]
    writing, quiet = [], []
    for begin, end in steps:
        if begin not in saves:
            busy = any(begin < stop and end > start for start, stop in written)
            (writing if busy else quiet).append(end - begin)
    usual = statistics.median(quiet)
    found = {
        "wait_s": statistics.median(saving) - usual,
        "quiet_s": usual,
        "cost_s": (sum(end - begin for begin, end in steps) - usual * len(steps)) / len(saves),
    }
    if writing:
        found |= {"writing_s": statistics.median(writing), "inflation": statistics.median(writing) / usual - 1}
    return found


def _events(spec: Spec) -> list[dict[str, Any]]:
    path = spec.output / "dtrain" / "metrics.jsonl"
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == "checkpoint"]

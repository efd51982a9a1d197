"""The row `start`: from the start of the process, or of torchrun, to the end of the first optimizer step."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import ContestantError, Lane
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.spec import DTRAIN, HF, RAW, Spec
from tests.benchmarks.suite.workloads import T0, Workload

NOT_NEEDED = {"deepspeed", "peft", "sklearn", "tensorboard"}
"""Packages that take long to import, and that no first step of this row needs."""


def start(options: Options) -> RowResult:
    """Runs of one step, each in new processes. What was there before: Python's bytecode and the tokenized rows."""
    workload = Workload(T0, rows=256, batch=8)
    specs = _specs(options, workload.counted() if options.quick else workload)
    result = RowResult(
        "start",
        "from the start to the first step",
        "T0, 8 rows of D_glue a step, on one process and on two under torchrun. To the end of the first optimizer step on all "
        "ranks; CPU time of all ranks, without the launcher. Not bound to cores. Rows are tokenized and bytecode is written "
        "before.",
        race.count(specs) if options.quick else [],
        {
            "wall s": ("wall_s", 1.0, 2),
            "CPU s": ("cpu_s", 1.0, 2),
            "modules imported": ("modules_at_first_step", 1.0, 0),
        },
    )
    if not options.quick:
        result.lanes = _timed(specs, rounds=options.rounds(5))
    own = result.lane("dtrain, 1 rank")
    if own is not None:
        found = NOT_NEEDED & set(own.figures["heavy_at_first_step"])
        result.checks[f"dtrain imports {', '.join(sorted(NOT_NEEDED))} after its first step, or never"] = not found
    return result


def _specs(options: Options, workload: Workload) -> list[Spec]:
    return [
        replace(
            options.spec(
                "start", replace(one, name=f"{one.name}, {ranks} rank" + "s" * (ranks > 1)), workload, steps=1
            ),
            ranks=ranks,
            core=None,
        )
        for ranks in ((1,) if options.quick else (1, 2))
        for one in options.chosen([DTRAIN, RAW, HF])
    ]


def _timed(specs: Sequence[Spec], *, rounds: int) -> list[Lane]:
    """Runs all in turns, every second round in the opposite order. The first round does not count."""
    lanes = [Lane(spec.contestant.name, spec.contestant.unavailable() or "ran") for spec in specs]
    pairs = list(zip(lanes, specs, strict=True))
    for turn in range(rounds + 1):
        for lane, spec in pairs if turn % 2 == 0 else reversed(pairs):
            if not lane.ran:
                continue
            try:
                found = first_step(replace(spec, output=spec.output / str(turn)))
            except ContestantError as error:
                lane.status = f"failed: {error}"
                continue
            if turn > 0:
                lane.add(wall_s=found.pop("wall_s"), cpu_s=found.pop("cpu_s"))
            lane.figures = found
    return lanes


def first_step(spec: Spec) -> dict[str, float]:
    """Runs a contestant once; returns what was known at the end of its first step, all ranks together."""
    begin = time.monotonic()
    race.run_command(race.command_of(spec), spec.output)
    ranks = [json.loads((spec.output / f"result-{rank}.json").read_text("utf-8")) for rank in range(spec.ranks)]
    return {
        "wall_s": max(rank["first_step_s"] for rank in ranks) - begin,
        "cpu_s": sum(rank["first_step_cpu_s"] for rank in ranks),
        "modules_at_first_step": ranks[0]["modules_at_first_step"],
        "heavy_at_first_step": ranks[0]["heavy_at_first_step"],
    }

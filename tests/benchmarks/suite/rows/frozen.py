"""Rows with frozen parts: `frozen` and `frozen_10` (the whole backbone), and `half_frozen`.

A trainer may compute frozen parts once for all epochs, at any moment: before the first step, or in it. So a sample is a
whole run, from start to end, less a run of one step that keeps nothing: that is what starting and ending cost.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import ContestantError, Lane
from tests.benchmarks.suite.result import RowResult, close, merge_counts
from tests.benchmarks.suite.spec import DTRAIN, HF, RAW, Contestant, Spec, dtrain_with, knows
from tests.benchmarks.suite.workloads import T1, Workload

BACKBONE = ("embeddings", "encoder", "pooler")
HALF = ("embeddings", "encoder.layer[:3]")
COLUMNS = {
    "CPU ms a step": ("cpu_s", 1e3, 1),
    "wall ms a step": ("wall_s", 1e3, 1),
    "tokens computed / real tokens": ("computed_share", 1.0, 3),
}
LOSS_TOLERANCE = 1e-5
QUICK_ROWS = 96


def frozen(options: Options) -> RowResult:
    return _frozen(options, "frozen", "the whole backbone is frozen, 5 epochs", BACKBONE, epochs=5)


def frozen_10(options: Options) -> RowResult:
    return _frozen(options, "frozen_10", "the whole backbone is frozen, 10 epochs", BACKBONE, epochs=10)


def half_frozen(options: Options) -> RowResult:
    return _frozen(options, "half_frozen", "embeddings and 3 of 4 layers are frozen, 5 epochs", HALF, epochs=5)


def _frozen(options: Options, name: str, title: str, modules: tuple[str, ...], *, epochs: int) -> RowResult:
    workload = Workload(T1, rows=2048 if options.full else 512, batch=32)
    contestants = options.chosen([DTRAIN, dtrain_with(freeze__cache="off"), RAW, HF])
    lanes = _counted(options, name, workload, contestants, modules, epochs)
    if not options.quick:
        lanes = merge_counts(_timed(options, name, workload, contestants, modules, epochs), lanes)
    result = RowResult(
        name,
        title,
        f"T1, {workload.rows:,} rows of D_glue in batches of 32. Time of a whole run less that of a run of one step, per step. "
        "Tokens are those of a layer, over all epochs.",
        lanes,
        COLUMNS,
    )
    own = result.lane(DTRAIN.name)
    for lane in result.lanes:
        if own is not None and lane.ran and lane is not own:
            check = f"mean loss of the first 10 steps: dtrain and {lane.name} agree to {LOSS_TOLERANCE:g}"
            result.checks[check] = close(own.figures.get("loss"), lane.figures.get("loss"), LOSS_TOLERANCE)
    return result


def _counted(
    options: Options,
    name: str,
    workload: Workload,
    contestants: list[Contestant],
    modules: tuple[str, ...],
    epochs: int,
) -> list[Lane]:
    small = replace(workload.counted(), rows=QUICK_ROWS if options.quick else workload.rows)
    freeze = ("embeddings", "encoder.layer[:1]") if modules == HALF else modules  # it has two layers
    steps = epochs * -(-small.rows // small.batch)
    specs = [
        replace(options.spec(f"{name}-counts", one, small, steps=steps), freeze=freeze, core=None)
        for one in contestants
    ]
    specs = [replace(spec, cache=spec.output / "cache") for spec in specs]
    lanes = race.count(specs)
    for lane, spec in zip(lanes, specs, strict=True):
        if lane.ran:
            tokens = lane.figures["tokens_in_training"] + lane.figures["tokens_in_evaluation"]
            lane.figures["computed_share"] = tokens / spec.real_tokens()
    return lanes


def _timed(
    options: Options,
    name: str,
    workload: Workload,
    contestants: list[Contestant],
    modules: tuple[str, ...],
    epochs: int,
) -> list[Lane]:
    lanes = [Lane(one.name, one.unavailable() or "ran") for one in contestants]
    pairs = list(zip(lanes, contestants, strict=True))
    steps = epochs * -(-workload.rows // workload.batch)
    for turn in range(options.rounds(3)):
        for lane, one in pairs if turn % 2 == 0 else reversed(pairs):
            if not lane.ran:
                continue
            try:
                spec = replace(options.spec(name, one, workload, steps=steps), freeze=modules)
                short = replace(spec, contestant=_without_cache(one), steps=1)
                whole = race.run_whole(_apart(spec, Path(f"whole-{turn}")))
                start = race.run_whole(_apart(short, Path(f"start-{turn}")))
            except ContestantError as error:
                lane.status = f"failed: {error}"
                continue
            lane.add(
                cpu_s=(whole["whole_cpu_s"] - start["whole_cpu_s"]) / (steps - 1),
                wall_s=(whole["whole_wall_s"] - start["whole_wall_s"]) / (steps - 1),
            )
    return lanes


def _without_cache(contestant: Contestant) -> Contestant:
    """Returns dtrain without its cache, so that the run of one step does not pay for it."""
    has_cache = contestant.kind == "dtrain" and knows("freeze.cache")
    return contestant.with_settings(**{"freeze.cache": "off"}) if has_cache else contestant


def _apart(spec: Spec, name: Path) -> Spec:
    """Returns the spec with folders of its own: nothing that an earlier run kept helps it."""
    return replace(spec, output=spec.output / name, cache=spec.output / name / "cache")

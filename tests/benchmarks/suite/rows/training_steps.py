"""Rows of steady training steps: `loop_overhead`, `padding` and `two_ranks`."""

from __future__ import annotations

from dataclasses import replace

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import Lane
from tests.benchmarks.suite.result import RowResult, close, difference, merge_counts, value_of
from tests.benchmarks.suite.spec import (
    ACCELERATE,
    DTRAIN,
    HF,
    HF_FIXED,
    HF_GROUPED,
    LIGHTNING,
    RAW,
    RAW_COLLATING,
    Contestant,
    dtrain_with,
)
from tests.benchmarks.suite.workloads import T0, T1, Workload

LOSS_TOLERANCE = 1e-5
COUNTED_STEPS, MOST_STEPS = 16, 32
TIMES = {"CPU ms a step": ("cpu_s", 1e3, 2), "wall ms a step": ("wall_s", 1e3, 2)}
COUNTS = {"fill": ("fill", 1.0, 3), "tokens computed a step": ("tokens_per_step", 1.0, 0)}


def loop_overhead(options: Options) -> RowResult:
    """T0: what a trainer adds to the model's own arithmetic, where that is small."""
    workload = Workload(T0, rows=1024, batch=8, length=16)
    contestants = [DTRAIN, RAW, RAW_COLLATING, HF, ACCELERATE, LIGHTNING]
    result = RowResult(
        "loop_overhead",
        "milliseconds that the loop adds",
        "T0 (0.5M parameters), 8 rows of 16 tokens a step: nothing is padded. RAW has its batches ready before the loop.",
        _lanes(options, "loop_overhead", workload, contestants, warm=60, block=60, rounds=9),
        {**TIMES, "ms over RAW": ("over_raw_s", 1e3, 2), **COUNTS, "modules imported": ("modules", 1.0, 0)},
    )
    raw = result.lane(RAW.name)
    for lane in result.lanes:
        if raw is not None and (over := difference(lane, raw, "cpu_s")) is not None:
            lane.figures["over_raw_s"] = over
    return checked(result)


def padding(options: Options) -> RowResult:
    """T1 on D_glue: how much of a step is spent on padding."""
    workload = Workload(T1, rows=6400, batch=32)  # group_by_length groups 50 batches: four of its groups
    contestants = [
        DTRAIN,
        dtrain_with(model__unpad="off"),
        dtrain_with(train__micro_batch_tokens=1024),
        RAW,
        HF,
        HF_GROUPED,
        HF_FIXED,
        ACCELERATE,
        LIGHTNING,
    ]
    result = RowResult(
        "padding",
        "a step on rows of unequal length",
        "T1 (5.4M parameters), 32 rows of D_glue a step: lengths round(lognormal(ln 24, 0.55)) in 5..128. "
        "fill = real tokens / tokens that the layers computed.",
        _lanes(options, "padding", workload, contestants, warm=4, block=4, rounds=7),
        {**TIMES, **COUNTS},
    )
    return checked(result)


def two_ranks(options: Options) -> RowResult:
    """T1: weak scaling from one to two processes on two cores, each bound to one."""
    workload = Workload(T1, rows=1024, batch=32, length=64)
    counted = _counted(options, "two_ranks", workload, [DTRAIN, RAW, HF], ranks=2)
    for lane in counted:
        lane.name = _with_ranks(lane.name, 2)
        if lane.ran:
            for name in ("collectives", "collective_bytes"):
                lane.figures[name] = lane.figures["laps"][0][name]
    result = RowResult(
        "two_ranks",
        "two ranks on two cores",
        "T1, 32 rows of 64 tokens a rank. Efficiency = wall time of a step of one rank / of two ranks with twice the rows; "
        "1 is perfect. CPU time is rank 0's. Collectives are counted on a small model, whose gradients are one bucket.",
        counted,
        {
            **TIMES,
            "efficiency": ("efficiency", 1.0, 3),
            **COUNTS,
            "collectives a step": ("collectives", 1.0, 0),
            "bytes of collectives a step": ("collective_bytes", 1.0, 0),
        },
    )
    if options.quick:
        return result
    specs = []
    for contestant in options.chosen([DTRAIN, RAW, HF]):
        for ranks in (1, 2):
            named = replace(contestant, name=_with_ranks(contestant.name, ranks))
            spec = options.spec("two_ranks", named, workload, steps=0)
            specs.append(replace(spec, ranks=ranks, warm=3, block=4))
    lanes = result.lanes = merge_counts(race.race(specs, rounds=options.rounds(7)), counted)
    for one, two in zip(lanes[::2], lanes[1::2], strict=True):
        alone, together = value_of(one, "wall_s"), value_of(two, "wall_s")
        if alone is not None and together is not None:
            two.figures["efficiency"] = alone / together
    return result


def _with_ranks(name: str, ranks: int) -> str:
    return f"{name}, {ranks} rank" + "s" * (ranks > 1)


def _lanes(
    options: Options,
    row: str,
    workload: Workload,
    contestants: list[Contestant],
    *,
    warm: int,
    block: int,
    rounds: int,
) -> list[Lane]:
    counted = _counted(options, row, workload, contestants)
    if options.quick:
        return counted
    specs = [
        replace(options.spec(row, one, workload, steps=0), warm=warm, block=block)
        for one in options.chosen(contestants)
    ]
    return merge_counts(race.race(specs, rounds=options.rounds(rounds)), counted)


def _counted(
    options: Options, row: str, workload: Workload, contestants: list[Contestant], *, ranks: int = 1
) -> list[Lane]:
    """Counts an epoch, or a few steps if quick, of the same data with a model that costs nothing."""
    small = workload.counted()
    steps = COUNTED_STEPS if options.quick else MOST_STEPS
    specs = [
        replace(options.spec(f"{row}-counts", one, small, steps=steps), ranks=ranks, core=None, laps=(4, 5))
        for one in options.chosen(contestants)
    ]
    lanes = race.count(specs)
    for lane, spec in zip(lanes, specs, strict=True):
        if lane.ran:
            computed = lane.figures["tokens_after_first_step"]
            lane.figures["tokens_per_step"] = computed / (steps - 1)
            lane.figures["fill"] = spec.real_tokens(after=1) / computed
    return lanes


def checked(result: RowResult) -> RowResult:
    """Adds the checks that hold on every machine."""
    own, raw = result.lane(DTRAIN.name), result.lane(RAW.name)
    if own is not None:
        result.checks["dtrain computes every real token, and none twice (fill at most 1)"] = own.figures["fill"] <= 1
    if own is not None and raw is not None and "tokens_per_step" in raw.figures:
        result.checks["dtrain computes no more tokens than RAW"] = (
            own.figures["tokens_per_step"] <= raw.figures["tokens_per_step"]
        )
    same_batches = [lane for lane in result.lanes if lane.ran and "other batches" not in lane.name]
    if own is not None:
        for lane in same_batches:
            if lane is not own:
                check = f"mean loss of the first 10 steps: dtrain and {lane.name} agree to {LOSS_TOLERANCE:g}"
                result.checks[check] = close(own.figures.get("loss"), lane.figures.get("loss"), LOSS_TOLERANCE)
    return result

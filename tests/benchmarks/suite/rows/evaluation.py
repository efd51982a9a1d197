"""The row `evaluation`: each block is one training step of a tiny batch and one evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import Lane
from tests.benchmarks.suite.result import RowResult, value_of
from tests.benchmarks.suite.spec import DTRAIN, HF, RAW, Contestant, Spec
from tests.benchmarks.suite.workloads import T1, Workload

MOST_COLLECTIVES = 12
"""Of dtrain's evaluation, whatever its size."""


def evaluation(options: Options) -> RowResult:
    """T1: the rows of D_glue, on one process and on two, each with the field's usual metrics."""
    rows = 10_007 if options.full else 1_003
    workload = Workload(T1, rows=64, batch=1, length=5, validation=207 if options.quick else rows)
    lanes = _counted(options, workload)
    if not options.quick:
        counts = {lane.name: lane for lane in lanes}
        lanes = race.race(_specs(options, workload), rounds=options.rounds(3))
        for lane in lanes:
            lane.figures |= counts[lane.name].figures if lane.name in counts else {}
        for one, two in zip(lanes, lanes[1:], strict=False):
            alone, together = value_of(one, "wall_s"), value_of(two, "wall_s")
            if two.name.endswith("2 ranks") and alone is not None and together is not None:
                two.figures["wall_share"] = together / alone
    result = RowResult(
        "evaluation",
        "one evaluation",
        f"T1, {workload.validation:,} rows of D_glue in batches of 32; accuracy, F1 and Matthews. "
        "Each block also has one training step of one short row. CPU time of two ranks is rank 0's.",
        lanes,
        {
            "CPU s": ("cpu_s", 1.0, 2),
            "wall s": ("wall_s", 1.0, 2),
            "wall of 2 ranks / 1 rank": ("wall_share", 1.0, 3),
            "fill": ("fill", 1.0, 3),
            "collectives": ("collectives_of_evaluation", 1.0, 0),
        },
    )
    for lane in result.lanes:
        if lane.ran and lane.name.startswith(DTRAIN.name):
            result.checks[f"{lane.name}: fill is at most 1"] = lane.figures["fill"] <= 1
            if "collectives_of_evaluation" in lane.figures:
                check = f"{lane.name}: at most {MOST_COLLECTIVES} collectives"
                result.checks[check] = lane.figures["collectives_of_evaluation"] <= MOST_COLLECTIVES
    return result


def _specs(options: Options, workload: Workload) -> list[Spec]:
    """Returns dtrain and HF on one and two ranks, and RAW, which as people write it evaluates on one, on one."""
    specs = []
    for one, ranks in ((DTRAIN, 1), (DTRAIN, 2), (HF, 1), (HF, 2), (RAW, 1)):
        if options.chosen([one]):
            named = replace(one, name=_name(one, ranks))
            spec = options.spec("evaluation", named, workload, steps=1)
            specs.append(replace(spec, ranks=ranks, eval_every=1, learning_rate=1e-12))
    return specs


def _name(contestant: Contestant, ranks: int) -> str:
    return f"{contestant.name}, {ranks} rank" + "s" * (ranks > 1)


def _counted(options: Options, workload: Workload) -> list[Lane]:
    """Counts runs of two steps, with one evaluation and with two: the difference is one evaluation."""
    small = workload.counted()
    lanes = []
    for spec in _specs(options, small):
        if options.quick and spec.ranks == 1 and spec.contestant.kind == "dtrain":
            continue  # two ranks count the same tokens
        both = [
            replace(
                spec, steps=2, eval_every=every, core=None, output=spec.output.with_name(f"{spec.output.name}-{every}")
            )
            for every in (2, 1)
        ]
        once, twice = race.count(both)
        lane = Lane(spec.contestant.name, once.status if not once.ran else twice.status)
        if lane.ran:
            lane.figures = _one_evaluation(once.figures, twice.figures, spec)
        lanes.append(lane)
    return lanes


def _one_evaluation(once: dict[str, Any], twice: dict[str, Any], spec: Spec) -> dict[str, float]:
    tokens = twice["tokens_in_evaluation"] - once["tokens_in_evaluation"]
    figures = {
        "tokens_of_evaluation": tokens,
        "fill": float(spec.workload.lengths("validation").sum()) / tokens,
    }
    if spec.ranks > 1:
        calls = [sum(found["collectives"].values()) for found in (once, twice)]
        figures["collectives_of_evaluation"] = calls[1] - calls[0]
    return figures

"""The row `evaluation`: each block is one training step of a tiny batch and one evaluation."""

from __future__ import annotations

import itertools
from dataclasses import replace

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import Lane
from tests.benchmarks.suite.result import RowResult, value_of
from tests.benchmarks.suite.spec import DTRAIN, HF, RAW, Contestant, Spec
from tests.benchmarks.suite.workloads import T1, Workload

MOST_COLLECTIVES = 4
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
        for one, two in itertools.pairwise(lanes):
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
            "bytes of collectives": ("collective_bytes_of_evaluation", 1.0, 0),
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
    """Counts a run with an evaluation at steps 3, 6 and 9: laps of a step alone, and of three steps and an evaluation.

    What belongs to an evaluation may come as late as in the next step, so step 5 is the one that stands for steps.
    """
    specs = [
        replace(
            spec,
            steps=9,
            eval_every=3,
            core=None,
            laps=(4, 5, 8),
            output=spec.output.with_name(f"{spec.output.name}-n"),
        )
        for spec in _specs(options, workload.counted())
        # Two ranks count the same tokens as one, and the collectives besides.
        if not options.quick or spec.ranks == 2 or spec.contestant.kind == "raw"
    ]
    lanes = race.count(specs)
    for lane, spec in zip(lanes, specs, strict=True):
        if lane.ran:
            lane.figures |= one_evaluation(*lane.figures["laps"], spec=spec)
    return lanes


def one_evaluation(step: dict[str, float], cycle: dict[str, float], *, spec: Spec) -> dict[str, float]:
    """Returns what belongs to one evaluation, from the counts of a step and of three steps with an evaluation."""
    tokens = cycle["tokens_in_evaluation"]
    figures = {"fill": float(spec.workload.lengths("validation").sum()) / tokens}
    if spec.ranks > 1:
        for name in ("collectives", "collective_bytes"):
            figures[f"{name}_of_evaluation"] = cycle[name] - 3 * step[name]
    return figures

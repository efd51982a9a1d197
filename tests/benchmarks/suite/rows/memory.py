"""The row `memory`: the largest resident memory of the process over a few steps of a model with 66M parameters."""

from __future__ import annotations

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import ContestantError, Lane
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.spec import ACCELERATE, DTRAIN, HF, RAW, dtrain_with
from tests.benchmarks.suite.workloads import T2, Workload

STEPS = 4


def memory(options: Options) -> RowResult:
    """T2, 32 rows of D_glue a step. The export at the end of a run does not count."""
    workload = Workload(T2, rows=STEPS * 32, batch=32)
    result = RowResult(
        "memory",
        "peak resident memory",
        f"T2 (66M parameters), 32 rows of D_glue a step, {STEPS} steps. Weights, gradients and AdamW's moments alone are "
        "1,063 MB, the imports about 500 MB.",
        [],
        {"peak MB": ("peak_memory_bytes", 1e-6, 0)},
        compared={"MB / dtrain": "peak_memory_bytes"},
    )
    if options.quick:
        result.notes.append("nothing here is equal in every run: not part of --quick")
        return result
    for one in options.chosen([DTRAIN, dtrain_with(train__micro_batch_tokens=1024), RAW, HF, ACCELERATE]):
        lane = Lane(one.name, one.unavailable() or "ran")
        result.lanes.append(lane)
        for _ in range(options.rounds(1)):
            if lane.ran:
                try:
                    found = race.run_whole(options.spec("memory", one, workload, steps=STEPS))
                    lane.add(peak_memory_bytes=found["peak_memory_bytes"])
                except ContestantError as error:
                    lane.status = f"failed: {error}"
    return result

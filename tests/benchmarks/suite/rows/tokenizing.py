"""The row `tokenizing`: from a CSV file to tokens, for the first time and again."""

from __future__ import annotations

from dataclasses import replace

from tests.benchmarks.suite import race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import ContestantError, Lane
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.spec import DTRAIN, HF, Contestant
from tests.benchmarks.suite.workloads import T0, Workload

HF_CSV = replace(HF, name="HF Trainer, load_dataset and map", options={"from_csv": True})
FEW = 100


def tokenizing(options: Options) -> RowResult:
    """Runs of one step on many rows, less the same on few: what is left is reading and tokenizing the rows."""
    many = 100_000 if options.full else 40_000
    result = RowResult(
        "tokenizing",
        "reading and tokenizing a CSV file",
        f"{many:,} rows of D_glue. Time of a run of one step on {many:,} rows less one on {FEW}. Cold: nothing was kept. "
        "Warm: the same run again.",
        [],
        {
            "CPU s, cold": ("cold_cpu_s", 1.0, 2),
            "CPU s, warm": ("warm_cpu_s", 1.0, 2),
            "wall s, cold": ("cold_wall_s", 1.0, 2),
            "wall s, warm": ("warm_wall_s", 1.0, 2),
        },
        compared={"cold CPU / dtrain": "cold_cpu_s", "warm CPU / dtrain": "warm_cpu_s"},
    )
    if options.quick:
        result.notes.append("nothing here is equal in every run: not part of --quick")
        return result
    contestants = options.chosen([DTRAIN, HF_CSV])
    result.lanes = [Lane(one.name, one.unavailable() or "ran") for one in contestants]
    pairs = list(zip(result.lanes, contestants, strict=True))
    for turn in range(options.rounds(3)):
        for lane, one in pairs if turn % 2 == 0 else reversed(pairs):
            if lane.ran:
                try:
                    _measure(options, lane, one, many, turn)
                except ContestantError as error:
                    lane.status = f"failed: {error}"
    return result


def _measure(options: Options, lane: Lane, contestant: Contestant, many: int, turn: int) -> None:
    times: dict[tuple[int, str], tuple[float, float]] = {}
    for rows in (many, FEW):
        workload = Workload(T0, rows=rows, batch=8)
        spec = options.spec("tokenizing", contestant, workload, steps=1)
        cache = spec.output / f"cache-{rows}-{turn}"
        for state in ("cold", "warm"):
            found = race.run_whole(replace(spec, cache=cache, output=spec.output / f"{rows}-{turn}-{state}"))
            times[rows, state] = found["whole_cpu_s"], found["whole_wall_s"]
    for state in ("cold", "warm"):
        cpu, wall = (a - b for a, b in zip(times[many, state], times[FEW, state], strict=True))
        lane.add(**{f"{state}_cpu_s": cpu, f"{state}_wall_s": wall})

"""One process, or rank, of a contestant: `python -m tests.benchmarks.suite.worker SPEC` (the driver starts it).

Writes result.json into its output folder: what was counted, the mean loss of the first steps, peak memory.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.suite import counting, machine
from tests.benchmarks.suite.gate import Gate
from tests.benchmarks.suite.spec import LOSSES, Spec


def main() -> None:
    spec = Spec.read(Path(sys.argv[1]))
    rank = int(os.environ.get("RANK", "0"))
    if spec.core is not None:
        machine.bind(spec.core + int(os.environ.get("LOCAL_RANK", "0")))
    counter = counting.TokenCounter(spec.workload.shape.layers)
    laps = counting.Laps(counter, marks=len(spec.laps), collectives=spec.ranks > 1)
    peak: list[int] = []  # of the steps alone: what a trainer does at its end is left out
    first: dict[str, Any] = {}

    def after_first_step() -> None:
        first.update(counting.at_first_step())
        counter.begin()
        if spec.steps == 1:
            peak.append(machine.peak_memory_bytes())

    gate = Gate(
        spec.gate if rank == 0 else None,
        warm=spec.warm,
        block=spec.block,
        at_step={
            spec.steps: lambda: peak.append(machine.peak_memory_bytes()),
            1: after_first_step,
            **dict.fromkeys(spec.laps, laps.mark),
        },
        traced=spec.traced,
    )
    with ExitStack() as stack:
        if spec.counted:
            stack.enter_context(counter.watch())
        losses = _train(spec, gate)
    result: dict[str, Any] = {
        "loss": sum(losses[:LOSSES]) / len(losses[:LOSSES]) if losses else None,
        "peak_memory_bytes": peak[0] if peak else None,
        "step_ends": gate.ends,
        "process_cpu_s": machine.tree_cpu_seconds(),
        **counting.imported(),
        **first,
    }
    if spec.counted:
        result |= {**counter.figures(), "laps": laps.counts}
    (spec.output / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def _train(spec: Spec, gate: Gate) -> list[float]:
    match spec.contestant.kind:
        case "dtrain":
            from tests.benchmarks.suite.contestants.own import train
        case "raw":
            from tests.benchmarks.suite.contestants.plain_loop import train
        case "hf":
            from tests.benchmarks.suite.contestants.hf_trainer import train
        case "accelerate":
            from tests.benchmarks.suite.contestants.with_accelerate import train
        case "lightning":
            from tests.benchmarks.suite.contestants.with_lightning import train
        case kind:
            raise AssertionError(f"no contestant is called {kind}")
    return train(spec, gate)


if __name__ == "__main__":
    main()

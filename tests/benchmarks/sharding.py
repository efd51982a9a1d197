"""What each engine keeps, sends and computes on two ranks: T2 (67M parameters), 32 rows of D_glue a step, on the CPU.

    .venv/bin/python -m tests.benchmarks.sharding [--times]

Prints a line for each engine: rank 0's own memory after the last step (what imports take is subtracted), collectives and
bytes per step, and the largest relative difference of a loss from ddp's. DeepSpeed's collectives are not counted. --times: CPU
time of a step instead of memory. Memory is measured with an allocator that gives each tensor back at once, which costs time:
otherwise gaps in the heap count, of which engines that gather and free weights leave many.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.config.option_parser import OptionParser
from dtrain.distributed.rank_context import RankContext
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.benchmarks.suite.workloads import T2, Workload, write
from tests.support.memory import own_memory
from tests.support.multirank import run_ranks

STEPS = 8
WARM_UP = 3
ENGINES = {
    "ddp": [],
    "ZeRO 1": ["engine.zero_stage=1"],
    "ZeRO 2": ["engine.zero_stage=2"],
    "ZeRO 3": ["engine.zero_stage=3"],
    "FSDP2": ["engine.name=fsdp"],
    "FSDP2, reshard_after_forward=false": ["engine.name=fsdp", "engine.reshard_after_forward=false"],
}


class Meter:
    """Takes the CPU time and memory after each step."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def after_step(self, record: StepRecord) -> Decision:
        traffic = record.traffic
        self.records.append(
            {
                "cpu_s": time.process_time(),
                "own": own_memory(),
                "loss": record.loss,
                "collectives": None if traffic is None else traffic.collectives,
                "bytes": None if traffic is None else traffic.payload_bytes,
            }
        )
        return Decision.CONTINUE


def train(context: RankContext, folder: str, name: str, settings: list[str]) -> list[dict[str, Any]]:
    """Collective. Trains; returns what the meter took, without what was there before."""
    before, meter = own_memory(), Meter()
    overrides = [
        f"run.output_dir={folder}/runs",
        f"run.name={name}",
        "task.name=classification",
        f"model.name_or_path={folder}/model",
        f"data.path={folder}",
        f"data.cache_dir={folder}/cache",
        f"train.max_steps={STEPS}",
        "train.global_batch_size=32",
        "train.micro_batch_size=16",
        "train.eval_every=never",
        "tracking.tensorboard=false",
        *settings,
    ]
    run_train(load_config(None, overrides), context, monitors=[meter])
    return [{**record, "own": record["own"] - before} for record in meter.records]


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="measure CPU time instead of memory")
    takes_times = parser.parse_args().times
    if not takes_times:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # before the server of the ranks starts
    with tempfile.TemporaryDirectory() as place:
        folder = write(Workload(T2, rows=STEPS * 32, batch=32), Path(place) / "data")
        reference: list[float] = []
        print(
            f"{'engine':38s} {'CPU ms' if takes_times else 'own MB':>7s} {'collectives':>11s} {'MB sent':>8s}  loss off by"
        )
        for number, (engine, settings) in enumerate(ENGINES.items()):
            records = run_ranks(train, 2, str(folder), f"run-{number}", settings, timeout_s=300)[0]
            losses = [record["loss"] for record in records]
            reference = reference or losses
            spent = [b["cpu_s"] - a["cpu_s"] for a, b in zip(records[WARM_UP - 1 :], records[WARM_UP:], strict=False)]
            off = max(abs(a - b) / abs(a) for a, b in zip(reference, losses, strict=True))
            last = records[-1]
            collectives = "-" if last["collectives"] is None else last["collectives"]
            sent = "-" if last["bytes"] is None else f"{last['bytes'] / 1e6:.0f}"
            measured = 1e3 * statistics.median(spent) if takes_times else last["own"] / 1e6
            print(f"{engine:38s} {measured:7.0f} {collectives:>11} {sent:>8}  {off:.1e}", flush=True)


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

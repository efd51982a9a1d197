"""A long run of a tiny model: memory, open files and threads must not grow.

    .venv/bin/python tests/benchmarks/endurance.py --steps 100000

Trains the model T0 of the suite and prints resident memory, open files and threads ten times. Exit 1 if any is larger at the end
than after a tenth of the steps, but for 5 MB of memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dtrain
from dtrain.config.option_parser import OptionParser
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.benchmarks.suite.workloads import T0, Workload, write

ALLOWED_MB = 5.0


class Held:
    """Records what the process holds, every `every` steps."""

    def __init__(self, every: int) -> None:
        self._every = every
        self.rows: list[tuple[int, float, int, int]] = []

    def after_step(self, record: StepRecord) -> Decision:
        if record.step % self._every == 0:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            megabytes, threads = int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
            self.rows.append((record.step, megabytes, len(list(Path("/proc/self/fd").iterdir())), threads))
            print(
                f"step {record.step:7d}  {megabytes:7.1f} MB  {self.rows[-1][2]} files  {threads} threads", flush=True
            )
        return Decision.CONTINUE


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    arguments = parser.parse_args()
    held = Held(max(1, arguments.steps // 10))
    with tempfile.TemporaryDirectory() as folder:
        workload = write(Workload(T0, rows=512, batch=8, length=16), Path(folder) / "workload")
        settings = [
            f"run.output_dir={folder}",
            "run.name=long",
            "task.name=classification",
            f"model.name_or_path={workload / 'model'}",
            f"data.path={workload}",
            f"data.cache_dir={folder}/cache",
            "train.global_batch_size=8",
            f"train.max_steps={arguments.steps}",
            "train.log_every=100",
            f"train.eval_every={max(1, arguments.steps // 20)}",
            f"checkpoint.every={max(1, arguments.steps // 20)}",
        ]
        dtrain.fit(dtrain.load_config(None, settings), monitors=[held])
    first, last = held.rows[0], held.rows[-1]
    has_grown = last[1] > first[1] + ALLOWED_MB or last[2] > first[2] or last[3] > first[3]
    print("grown" if has_grown else "no growth")
    return int(has_grown)


if __name__ == "__main__":
    sys.exit(main())

"""How long training waits for a checkpoint of a 66M-parameter model, and how soon a resumed run has its next batch.

    .venv/bin/python tests/benchmarks/checkpoint_stall.py

The model is DistilBERT's size with new weights, AdamW, one process; a checkpoint has 0.8 GB. Written while training goes
on, and, for comparison, waited for. The second part asks for the first batch at 90 % of a million rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.data.batches import step_batches  # noqa: E402
from dtrain.data.order import StepPlan, permutation  # noqa: E402
from dtrain.distributed.rank_context import ONE_PROCESS  # noqa: E402
from tests.support import tiny  # noqa: E402

MODEL = {
    "model_type": "distilbert",
    "vocab_size": 30522,
    "dim": 768,
    "n_layers": 6,
    "n_heads": 12,
    "hidden_dim": 3072,
}


def stalls(folder: Path, *, asynchronous: bool) -> list[dict[str, float]]:
    """The checkpoint lines of a short run."""
    name = "asynchronous" if asynchronous else "waiting"
    settings = {
        "run.output_dir": folder,
        "run.name": name,
        "task.name": "classification",
        "model.from_scratch": "true",
        "model.config": json.dumps(MODEL),
        "model.tokenizer": folder / "words",
        "data.name": "cola",
        "data.path": folder / "cola",
        "train.global_batch_size": 2,
        "train.micro_batch_size": 2,
        "train.max_steps": 40,
        "train.log_every": 1,
        "train.eval_every": "never",
        "checkpoint.every": 10,
        "checkpoint.keep": 1,
        "checkpoint.asynchronous": str(asynchronous).lower(),
        "tracking.tensorboard": "false",
    }
    command = [sys.executable, str(ROOT / "dtrain/main.py"), *(f"{key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        sys.exit((done.stdout + done.stderr)[-3000:])
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "checkpoint"]


def next_batch(rows: int) -> float:
    """Seconds from the start of the loop to the first batch, in the middle of an epoch."""

    class Rows:
        def __len__(self) -> int:
            return rows

        def __getitem__(self, indices: list[int]) -> dict[str, list[int]]:
            return {"index": indices}

    plan = StepPlan(rows, 32, 8, seed=7, shuffle=True)
    permutation.cache_clear()
    begin = time.perf_counter()
    start = int(0.9 * plan.steps_per_epoch)
    next(
        step_batches(
            plan, Rows(), lambda _rows, _place: {}, ONE_PROCESS, lock_step=False, start=start, stop=start + 1, workers=0
        )
    )
    return time.perf_counter() - begin


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tiny.write_cola(folder / "cola", train=100, dev=4)
        tiny.tokenizer().save_pretrained(folder / "words")
        for asynchronous in (True, False):
            found = stalls(folder, asynchronous=asynchronous)
            waits = ", ".join(f"{event['stall_s']:.3f}" for event in found)
            print(
                f"{'while training goes on' if asynchronous else 'waited for':22s}: {found[0]['bytes'] / 1e9:.2f} GB, stall "
                f"{waits} s (written in {statistics.median(event['seconds'] for event in found):.2f} s)",
                flush=True,
            )
    waits = ", ".join(f"{next_batch(1_000_000):.3f}" for _ in range(3))
    print(f"next batch at 90 % of 1,000,000 rows: {waits} s")
    return 0


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

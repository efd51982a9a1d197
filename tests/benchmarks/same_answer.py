"""The same loss, step by step, on every engine and world size, for a real pretrained model on the real CoLA data.

    .venv/bin/python tests/benchmarks/same_answer.py --model MINILM_FOLDER --data ../shared/data/CoLA

Trains 50 steps (global batch 32, micro-batch 4, dropout, AdamW, clipping 1.0, fp32) in each layout through the command
line and prints the largest relative difference of `loss` from one process. Exit 1 if any is above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: list[tuple[str, int, list[str]]] = [
    ("one process", 1, ["engine.name=single"]),
    *((f"ddp W={world}", world, ["engine.name=ddp"]) for world in (2, 3, 4)),
    *(
        (f"deepspeed ZeRO {stage} W=2", 2, ["engine.name=deepspeed", f"engine.zero_stage={stage}"])
        for stage in range(4)
    ),
]


def losses(folder: Path, name: str, world: int, settings: list[str], arguments: argparse.Namespace) -> list[float]:
    """The loss of every step of one run."""
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [
        *start,
        str(ROOT / "dtrain/main.py"),
        f"run.output_dir={folder}",
        f"run.name={name}",
        "run.seed=7",
        "task.name=classification",
        f"model.name_or_path={arguments.model}",
        "data.name=cola",
        f"data.path={arguments.data}",
        f"train.max_steps={arguments.steps}",
        "train.global_batch_size=32",
        "train.micro_batch_size=4",
        "train.log_every=1",
        "train.eval_every=never",
        "tracking.tensorboard=false",
        *settings,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a BERT-family folder or name")
    parser.add_argument("--data", required=True, type=Path, help="a folder in CoLA's format")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        reference: list[float] = []
        for label, world, settings in LAYOUTS:
            begin = time.monotonic()
            found = losses(Path(folder), label.replace(" ", "-").replace("=", ""), world, settings, arguments)
            reference = reference or found
            assert len(found) == len(reference) == arguments.steps
            off = max(abs(a - b) / abs(a) for a, b in zip(reference, found, strict=True))
            failed |= off > 1e-5
            ends = f"first {found[0]:.6f} last {found[-1]:.6f}"
            seconds = time.monotonic() - begin
            print(f"{label:24s} {ends}  off by {off:.1e} at worst  {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The same loss, step by step, on every engine and world size, for a real pretrained model on the real CoLA data.

    .venv/bin/python tests/benchmarks/same_answer.py --model MINILM_FOLDER --data ../shared/data/CoLA
    .venv/bin/python tests/benchmarks/same_answer.py --shapes --model MINILM_FOLDER --data ../shared/data/CoLA

Trains 50 steps (global batch 32, micro-batch 4, dropout, AdamW, clipping 1.0, fp32) in each layout through the command
line and prints the largest relative difference of `loss` from one process. Exit 1 if any is above 1e-5.

--shapes compares what saves computation (sorting, a token budget, no padding, a frozen part that is read, chunks of the
loss) with the plain padded run instead, without dropout, at one, two and three ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dtrain.config.option_parser import OptionParser

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: list[tuple[str, int, list[str]]] = [
    ("one process", 1, ["engine.name=single"]),
    *((f"ddp W={world}", world, ["engine.name=ddp"]) for world in (2, 3, 4)),
    *(
        (f"deepspeed ZeRO {stage} W=2", 2, ["engine.name=deepspeed", f"engine.zero_stage={stage}"])
        for stage in range(4)
    ),
    *((f"fsdp W={world}", world, ["engine.name=fsdp"]) for world in (2, 3, 4)),
]

PLAIN = ["train.sort_by_length=false", "model.unpad=off", "freeze.cache=off"]
NO_DROPOUT = ["model.config.hidden_dropout_prob=0.0", "model.config.attention_probs_dropout_prob=0.0"]
BUDGET = "train.micro_batch_tokens=256"
MASKED = [
    "task.name=masked_lm",
    "data.name=null",
    "data.columns.text=3",
    "data.header=false",
    "data.splits.train=train.tsv",
]
SHAPES: dict[str, tuple[list[str], list[tuple[str, int, list[str]]]]] = {
    "all learns": (
        [],
        [
            ("sorted", 1, ["model.unpad=off"]),
            ("token budget", 1, ["model.unpad=off", BUDGET]),
            ("no padding", 1, ["train.sort_by_length=false", "model.unpad=on"]),
            *((f"all of them, W={world}", world, ["model.unpad=on", BUDGET]) for world in (1, 2, 3)),
        ],
    ),
    "frozen backbone": (
        ["freeze.modules=[base_model]"],
        [(f"read, W={world}", world, ["freeze.cache=on"]) for world in (1, 2, 3)],
    ),
    "half frozen": (
        ["freeze.modules=[embeddings,'encoder.layer[:3]']"],
        [(f"read, W={world}", world, ["freeze.cache=on", BUDGET]) for world in (1, 2, 3)],
    ),
    "masked LM": (
        MASKED,
        [(f"loss in chunks, W={world}", world, ["train.micro_batch_size=32"]) for world in (1, 2)],
    ),
}
"""What learns -> its settings, and the layouts that are compared with the plain padded run."""


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
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a BERT-family folder or name")
    parser.add_argument("--data", required=True, type=Path, help="a folder in CoLA's format")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", help="a word in the name of the layouts to compare with one process, e.g. fsdp")
    parser.add_argument("--shapes", action="store_true", help="compare with the plain padded run, without dropout")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.shapes:
            first, *others = LAYOUTS
            chosen = [layout for layout in others if arguments.only is None or arguments.only in layout[0]]
            return 0 if compare(Path(folder), [first, *chosen], arguments) else 1
        are_equal = True
        for learns, (settings, layouts) in SHAPES.items():
            print(f"{learns}:")
            common = [*NO_DROPOUT, *settings, f"data.cache_dir={folder}/cache"]
            listed = [("plain, padded", 1, PLAIN), *layouts]
            are_equal &= compare(Path(folder) / learns, [(n, w, [*common, *more]) for n, w, more in listed], arguments)
        return 0 if are_equal else 1


def compare(folder: Path, layouts: list[tuple[str, int, list[str]]], arguments: argparse.Namespace) -> bool:
    """Runs the layouts and prints how far each is from the first one; returns whether all are within 1e-5."""
    reference: list[float] = []
    worst = 0.0
    for label, world, settings in layouts:
        begin = time.monotonic()
        found = losses(folder, re.sub(r"\W+", "-", label), world, settings, arguments)
        reference = reference or found
        assert len(found) == len(reference) == arguments.steps
        off = max(abs(a - b) / abs(a) for a, b in zip(reference, found, strict=True))
        worst = max(worst, off)
        ends = f"first {found[0]:.6f} last {found[-1]:.6f}"
        seconds = time.monotonic() - begin
        print(f"{label:24s} {ends}  off by {off:.1e} at worst  {seconds:.0f} s", flush=True)
    return worst <= 1e-5


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.support.script import run_script

    run_script(main)

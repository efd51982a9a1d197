"""The same eight examples through Hugging Face's Trainer and through dtrain: loss and gradient norm of one step.

    python tests/benchmarks/versus_hf_trainer.py

Makes a tiny random BERT classifier without dropout and two CSV files. Every layout below takes the same eight examples in
one optimizer step; only the size of the micro-batches and the number of processes change. Both trainers start from the
same weights, so each must report one and the same loss and gradient norm. Then both evaluate those weights on eleven
examples. Needs no network and no data. Exits with 1 if dtrain's numbers differ by more than 1e-5 relative.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.config.option_parser import OptionParser  # noqa: E402
from tests.support import tiny  # noqa: E402

EXAMPLES, VALIDATION = 8, 11
EVAL_BATCH = 4
TOLERANCE = 1e-5
TIMEOUT_S = 600


class Layout(NamedTuple):
    """One way to compute the step.

    Attributes:
        ranks: number of processes.
        micro_batch: examples per forward pass.
    """

    ranks: int
    micro_batch: int

    @property
    def accumulation(self) -> int:
        """Forward passes of each rank in the step."""
        return EXAMPLES // (self.ranks * self.micro_batch)


LAYOUTS = [Layout(1, 8), Layout(1, 4), Layout(1, 2), Layout(2, 4), Layout(2, 2), Layout(2, 1)]


class Numbers(NamedTuple):
    """What a trainer reports."""

    loss: float
    grad_norm: float
    eval_loss: float


def write_data(folder: Path) -> None:
    """Writes train.csv and validation.csv: random sentences, and labels that depend on their first word."""
    rng = random.Random(0)
    for split, rows in (("train", EXAMPLES), ("validation", VALIDATION)):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(rows):
                words = rng.choices(tiny.WORDS, k=rng.randint(3, 20))
                writer.writerow([" ".join(words), int(tiny.WORDS.index(words[0]) < len(tiny.WORDS) // 2)])


def run(command: Sequence[str], ranks: int) -> str:
    """Runs a script on that many processes and returns what it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    full = [sys.executable, *launcher, *command]
    done = subprocess.run(full, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(full)}\nexit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def hf_trainer(folder: Path, layout: Layout) -> Numbers:
    """One step and one evaluation by transformers.Trainer."""
    command = [__file__, "--worker", str(folder), "--micro-batch", str(layout.micro_batch)]
    printed = run([*command, "--accumulation", str(layout.accumulation)], layout.ranks)
    return Numbers(*json.loads(printed.splitlines()[-1]))


def work(folder: Path, micro_batch: int, accumulation: int) -> None:
    """Runs in each process of `hf_trainer`; rank 0 prints the numbers as JSON.

    It trains before it evaluates. In the other order, Trainer of transformers 5.23 reports another gradient norm on two
    ranks: 0.049 instead of 0.479 in the fourth layout.
    """
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    files = {split: str(folder / f"{split}.csv") for split in ("train", "validation")}
    data = load_dataset("csv", data_files=files, cache_dir=str(folder / "cache"))
    data = data.map(lambda row: tokenizer(row["text"]), remove_columns="text", load_from_cache_file=False)
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=EVAL_BATCH,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,  # so that the evaluation after it sees the weights that all layouts share
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "model"),
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    eval_loss = trainer.evaluate()["eval_loss"]
    step: dict[str, Any] = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    if trainer.is_world_process_zero():
        print(json.dumps([step["loss"], step["grad_norm"], eval_loss]))


def dtrain(folder: Path, layout: Layout) -> Numbers:
    """The same step and the same evaluation by dtrain."""
    name = f"ranks-{layout.ranks}-micro-{layout.micro_batch}"
    settings = [
        f"run.output_dir={folder / 'runs'}",
        "task.name=classification",
        f"model.name_or_path={folder / 'model'}",
        f"data.path={folder}",
        "data.max_length=64",
        f"evaluation.micro_batch_size={EVAL_BATCH}",
    ]
    step = [
        f"train.global_batch_size={EXAMPLES}",
        f"train.micro_batch_size={layout.micro_batch}",
        "train.max_steps=1",
        "train.eval_every=never",
        "optim.name=sgd",
    ]
    main = str(ROOT / "dtrain" / "main.py")
    run([main, *settings, *step, f"run.name={name}"], layout.ranks)
    run([main, "evaluate", *settings, f"run.name={name}-evaluate"], layout.ranks)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trained = next(event for event in map(json.loads, lines) if event["event"] == "train")
    summary = json.loads((folder / "runs" / f"{name}-evaluate" / "summary.json").read_text(encoding="utf-8"))
    return Numbers(trained["loss"], trained["grad_norm"], summary["eval"]["loss"])


def compare(folder: Path) -> bool:
    """Prints one line per layout; returns whether dtrain's numbers agree."""
    tiny.write_model(folder / "model", dropout=0.0)
    write_data(folder)
    print(f"{'HF Trainer':>52}{'dtrain':>33}")
    print("ranks  micro-batch  accumulate" + 2 * "".join(f"{name:>11}" for name in Numbers._fields))
    own = []
    for layout in LAYOUTS:
        theirs, ours = hf_trainer(folder, layout), dtrain(folder, layout)
        own.append(ours)
        print(f"{layout.ranks:5}  {layout.micro_batch:11}  {layout.accumulation:10}", end="")
        print("".join(f"{number:11.6f}" for number in (*theirs, *ours)), flush=True)
    worst = max(abs(a - b) / abs(b) for numbers in own for a, b in zip(numbers, own[0], strict=True))
    print(f"dtrain differs from its first line by at most {worst:.1e} relative")
    return worst <= TOLERANCE


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--accumulation", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        return work(arguments.worker, arguments.micro_batch, arguments.accumulation)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if compare(Path(folder)) else 1)


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

"""How long a start takes until its first step, and a restart after a SIGKILL until its next new step.

    .venv/bin/python tests/benchmarks/restart.py --rounds 5

Model T0 of the suite on 2 ranks: dtrain's own launcher (`--ranks 2`), torchrun, Hugging Face's Trainer under torchrun, and dtrain
on one process. All in turns, in each round in the opposite order; a first round does not count. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.config.option_parser import OptionParser  # noqa: E402
from tests.benchmarks.suite import workloads  # noqa: E402
from tests.benchmarks.suite.workloads import T0, Workload  # noqa: E402
from tests.support import jobs  # noqa: E402

HF = """
import json, sys, time
import torch
from pathlib import Path
from tests.benchmarks.suite.workloads import read_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback
from transformers import TrainingArguments

class Notes(TrainerCallback):
    def on_step_end(self, arguments, state, control, **_):
        if state.is_world_process_zero:
            Path(sys.argv[2]).write_text(str(time.monotonic()))

folder = Path(sys.argv[1])
texts, labels = read_csv(folder / "train.csv")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
rows = [{**tokenizer(text), "labels": label} for text, label in zip(texts, labels)]
arguments = TrainingArguments(
    output_dir=sys.argv[3], per_device_train_batch_size=8, max_steps=1, report_to="none", save_strategy="no", use_cpu=True,
    disable_tqdm=True,
)
model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
collate = DataCollatorWithPadding(tokenizer)
Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Notes()]).train()
"""


def settings(workload: Path, output: Path, ranks: int, **more: object) -> list[str]:
    """Returns dtrain's settings; more: section__key=value."""
    values = {
        "run.output_dir": output,
        "run.name": "run",
        "task.name": "classification",
        "model.name_or_path": workload / "model",
        "data.path": workload,
        "data.max_length": 128,
        "data.cache_dir": workload / "cache",
        "train.global_batch_size": 8 * ranks,
        "train.micro_batch_size": 8,
        "train.epochs": "null",
        "train.max_steps": 1,
        "train.log_every": 1,
        "train.eval_every": "never",
        "tracking.tensorboard": "false",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [f"{key}={value}" for key, value in values.items()]


def steps(run: Path) -> dict[int, float]:
    """Returns when each step was logged last, by time.monotonic()."""
    events = jobs.read_events(run) if (run / "metrics.jsonl").exists() else []
    return {event["step"]: event["monotonic_s"] for event in events}


def first_step(start: list[str], ranks: int, workload: Path) -> float:
    """Returns seconds from the start of the command to the end of its first step."""
    with tempfile.TemporaryDirectory() as place:
        begin = time.monotonic()
        job = jobs.run([*start, *settings(workload, Path(place), ranks)])
        assert job.process.returncode == 0, job.text
        return steps(Path(place) / "run")[1] - begin


def first_step_of_trainer(workload: Path) -> float:
    """Returns the same for Hugging Face's Trainer under torchrun."""
    with tempfile.TemporaryDirectory() as place:
        script, note = Path(place) / "hf.py", Path(place) / "note"
        script.write_text(HF)
        command = [*jobs.torchrun()[:-1], str(script), str(workload), str(note), place]
        begin = time.monotonic()
        job = jobs.run(command, env={"PYTHONPATH": str(ROOT)})
        assert note.exists(), job.text
        return float(note.read_text()) - begin


def next_step(start: list[str], workload: Path) -> float:
    """Returns seconds from the SIGKILL of rank 1 to the end of the first step that no earlier start has done."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        endless = settings(workload, Path(place), 2, train__max_steps=1000000, checkpoint__every=50)
        with jobs.started([*start, *endless]) as job:
            assert jobs.until(lambda: max(steps(run), default=0) > 100), job.text
            os.kill(job.ranks()[1], signal.SIGKILL)
            begin = time.monotonic()
            assert jobs.until(lambda: any(when > begin + 0.2 for when in steps(run).values())), job.text
            last = max(step for step, when in steps(run).items() if when < begin + 0.2)
            assert jobs.until(lambda: last + 1 in steps(run)), job.text
            found = steps(run)[last + 1] - begin
            os.kill(job.process.pid, signal.SIGTERM)
            job.end()
        return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        workload = workloads.write(Workload(T0, rows=4000, batch=8), Path(place) / "t0")
        cases: dict[str, Callable[[], float]] = {
            "first step: one process": lambda: first_step(jobs.python(), 1, workload),
            "first step: dtrain --ranks 2": lambda: first_step(jobs.forked(2), 2, workload),
            "first step: torchrun, 2 ranks": lambda: first_step(jobs.torchrun(2), 2, workload),
            "first step: HF Trainer, torchrun, 2 ranks": lambda: first_step_of_trainer(workload),
            "SIGKILL to next new step: dtrain --ranks 2": lambda: next_step(
                jobs.forked(2, "--max-restarts", "1"), workload
            ),
            "SIGKILL to next new step: torchrun": lambda: next_step(
                jobs.torchrun(2, "--standalone", "--max-restarts", "1"), workload
            ),
        }
        samples: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(arguments.rounds + 1):
            for name in list(cases) if turn % 2 == 0 else reversed(cases):
                seconds = cases[name]()
                if turn:
                    samples[name].append(round(seconds, 3))
    print("| | median s | samples |\n|---|---|---|")
    for name, found in samples.items():
        print(f"| {name} | {statistics.median(found):.2f} | {', '.join(f'{each:.2f}' for each in found)} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(samples, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

"""Prove that a refactoring changes no number: record what the old and the new code compute, and compare every bit.

    python tests/benchmarks/same_bits.py record before.json --checkout ../old    # a worktree of the old code
    python tests/benchmarks/same_bits.py record after.json                       # this checkout
    python tests/benchmarks/same_bits.py compare before.json after.json

`record` runs tiny training jobs on the CPU through the command line: every engine, every task, and resumed runs. It
writes down each job's exit codes, train lines, evaluations, predictions and final weights, as text and hashes.
`--only NAME ...` limits the jobs and `--seed N` changes `run.seed`, which must make `compare` fail. It exits with 1
if a job fails or records nothing.

`compare` prints one line per job. It exits with 1 and names the first difference of each job (run, step, field, both
values) if the records are not identical. Both records must come from the same machine and the same environment, because
other libraries and processors round differently.

The script uses the command line only. It imports nothing from dtrain and does not depend on where its modules are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.config.option_parser import OptionParser

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 150.0
"""Limit for one subprocess. A run takes about 10 seconds on an idle machine."""

STOP_S = 15.0
"""How long a process that ran out of time may take to stop after SIGTERM."""

STEPS, STEPS_PER_EPOCH = 20, 10
GLOBAL_BATCH, MICRO_BATCH = 13, 3
"""Five micro-batches per step, the last one smaller. Neither 2 nor 3 ranks can share them equally."""

ROWS, VALIDATION_ROWS = (STEPS_PER_EPOCH - 1) * GLOBAL_BATCH + 8, 21
"""Rows of the classification data. The last step of each epoch has 8 examples."""

TASK_STEPS, TASK_ROWS, TASK_VALIDATION_ROWS = 6, 21, 11
"""Size of the task jobs: three steps per epoch with 8, 8 and 5 examples."""

# fmt: off
WORDS = [
    "the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "big", "small",
    "red", "quick", "old", "with", "near", "under", "never", "always", "runs", "sleeps",
]
# fmt: on
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.2,
}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
    "hidden_dropout_prob": 0.1,
}
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""With DeepSpeed's default threshold, ZeRO 3 keeps parameters of this size whole on every rank."""

OWN_CODE = '''"""A model and a metric of the user's own."""

from torch import nn


class BagOfEmbeddings(nn.Module):
    def __init__(self, vocab_size, num_labels):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 16)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(16, num_labels)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask[:, :, None].float()
        return self.out(self.dropout((self.embed(input_ids) * weights).sum(dim=1) / weights.sum(dim=1)))


def build(*, num_labels, vocab_size):
    return BagOfEmbeddings(vocab_size, num_labels)


def score(predictions, references):
    return {"wrong": sum(a != b for a, b in zip(predictions, references, strict=True))}
'''

FROM_OUTSIDE = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "TORCHELASTIC_",
    "OMPI_",
    "SLURM_",
    "DTRAIN_",
    "PYTHON",
    "HF_",
)
"""Beginnings of environment variables that must not reach a job."""

TRAIN_FIELDS = ("loss", "grad_norm", "learning_rate", "examples", "targets")
NOT_METRICS = ("event", "step", "seconds", "time_s", "monotonic_s")
"""Fields of an eval line that are not metrics."""

Settings = Mapping[str, object]
Record = dict[str, dict[str, str]]
"""What was recorded: place ("step 3", "model/model.safetensors") -> field -> exact text."""


@dataclass(frozen=True)
class Run:
    """One start of dtrain.

    Attributes:
        settings: `section.key` -> value.
        ranks: number of processes. More than one is started by torchrun.
        command: train, evaluate or predict.
        folder: name of the run folder, if it is not the run's own name. Two runs of one job may share a folder.
    """

    settings: Settings
    ranks: int = 1
    command: str = "train"
    folder: str | None = None


@dataclass(frozen=True)
class Job:
    """Runs that are started one after the other, by name. Jobs do not depend on each other.

    Attributes:
        hash_checkpoints: also record the tensors of all checkpoints.
    """

    runs: Mapping[str, Run] = field(default_factory=dict)
    hash_checkpoints: bool = False

    @property
    def ranks(self) -> int:
        """The largest number of processes at a time."""
        return max(run.ranks for run in self.runs.values())


# ----------------------------------------------------------------------------------------------------------------- jobs


def all_jobs(data: Path, outputs: Path) -> dict[str, Job]:
    """Every job by name.

    Args:
        data: the folder that `write_data` fills.
        outputs: parent of the jobs' folders. A job's run folders are in `outputs/JOB/RUN`.
    """
    return {**engine_jobs(data), **resume_jobs(data, outputs), **task_jobs(data, outputs)}


def engine_jobs(data: Path) -> dict[str, Job]:
    """The same 20 steps on different engines and numbers of ranks."""
    settings = training(data)

    def job(ranks: int, engine: str, **more: object) -> Job:
        changes = {key.replace("__", "."): value for key, value in more.items()}
        return Job({"train": Run({**settings, "engine.name": engine, **changes}, ranks)})

    return {
        "single": job(1, "single"),
        "ddp2": job(2, "ddp"),
        "ddp3": job(3, "ddp"),
        "zero0": job(2, "deepspeed", engine__zero_stage=0),
        "zero1": job(2, "deepspeed", engine__zero_stage=1),
        "zero2": job(2, "deepspeed", engine__zero_stage=2),
        # fad8855 cannot thaw ZeRO 3 in the step after an evaluation, so that this job does not evaluate after step 10.
        "zero3": job(2, "deepspeed", engine__zero_stage=3, engine__deepspeed=SHARD_ALL, train__eval_every=7),
        "local_steps": job(2, "ddp", train__local_steps=4),
        "bf16": job(1, "single", engine__precision="bf16"),
        "bf16_wire": job(2, "ddp", engine__gradient_wire="bf16"),
        "powersgd": job(2, "ddp", engine__powersgd={"rank": 2, "start_step": 4, "min_rate": 1.5}),
    }


def resume_jobs(data: Path, outputs: Path) -> dict[str, Job]:
    """Runs that stop in the middle of an epoch and go on."""
    settings = {**training(data), "checkpoint.every": 4, "checkpoint.keep": 9, "checkpoint.asynchronous": False}
    checkpoint = outputs / "resume" / "first" / "checkpoints" / "step-000012"
    sharded = {
        **settings,
        "checkpoint.asynchronous": True,
        "checkpoint.format": "sharded",
        "engine.name": "deepspeed",
        "engine.zero_stage": 3,
        "engine.deepspeed": SHARD_ALL,
        "train.eval_every": 7,
    }
    return {
        "resume": Job(
            {
                "first": Run({**settings, "train.max_steps": 9}),
                "second": Run({**settings, "train.max_steps": STEPS}, folder="first"),
                "branch": Run({**settings, "train.max_steps": STEPS, "checkpoint.resume": checkpoint}),
            },
            hash_checkpoints=True,
        ),
        "resume_sharded": Job(
            {
                "first": Run({**sharded, "train.max_steps": 9}, 2),
                "second": Run({**sharded, "train.max_steps": 13}, 2, folder="first"),
            },
            hash_checkpoints=True,
        ),
    }


def training(data: Path) -> dict[str, object]:
    """Settings of the engine and resume jobs: 20 steps of a BERT that is thawed in the middle."""
    return {
        **bert("classification", data),
        "data.path": data / "reviews",
        "freeze.modules": ["embeddings", "encoder.layer[0]"],
        "freeze.thaw": [{"epoch": 1, "modules": ["encoder.layer[0]"]}],
        "optim.name": "adamw",
        "optim.learning_rate": 1e-2,
        "optim.weight_decay": 0.1,
        "optim.max_grad_norm": 0.1,
        "schedule.name": "linear",
        "schedule.warmup_steps": 5,
        "train.epochs": 2,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.micro_batch_size": MICRO_BATCH,
        "train.eval_every": "epoch",
        "evaluation.micro_batch_size": 4,
    }


def task_jobs(data: Path, outputs: Path) -> dict[str, Job]:
    """Six steps of every task on one process, and the ways to make a model that the engine jobs do not use."""

    def run(settings: Settings, **more: object) -> Run:
        return Run({**short(), **settings, **{key.replace("__", "."): value for key, value in more.items()}})

    def job(settings: Settings, **more: object) -> Job:
        return Job({"train": run(settings, **more)})

    texts = {"data.path": data / "texts", "data.splits": {"train": "train.txt", "validation": "validation.txt"}}
    reviews = {"data.path": data / "few_reviews"}
    base = {**bert("classification", data), **reviews}
    trained = {**base, "model.from_scratch": False, "model.config": {}, "model.tokenizer": None}
    saved = {**trained, "model.name_or_path": outputs / "commands" / "train" / "model"}
    squad = {"data.max_length": 32, "task.doc_stride": 8}
    translation = {"task.max_target_length": 12, "evaluation.generate": True, "evaluation.num_beams": 2}
    return {
        "classification": job(base, task__label_smoothing=0.1, evaluation__best={"metric": "accuracy"}),
        "regression": job(bert("regression", data), data__path=data / "ratings"),
        "multiple_choice": job(bert("multiple_choice", data), data__path=data / "endings"),
        "token_classification": job(bert("token_classification", data), data__path=data / "tags"),
        "question_answering": job(bert("question_answering", data) | squad, data__path=data / "questions"),
        "masked_lm": job(bert("masked_lm", data) | texts, task__whole_word=True, data__max_length=16),
        # Without a task this is the built-in default: characters of Python's documentation.
        "quickstart": job({}, data__limit=150, schedule__warmup_steps=2),
        "causal_lm": job(
            scratch("causal_lm", GPT2) | texts,
            model__tokenizer="train-bpe",
            model__tokenizer_vocab_size=300,
            data__max_length=16,
            task__stride=8,
        ),
        "packed_documents": job(
            scratch("causal_lm", GPT2) | texts,
            model__tokenizer=data / "vocab.txt",
            data__max_length=32,
            task__packing="documents",
        ),
        "chat": job(
            scratch("chat", GPT2),
            model__tokenizer=data / "vocab.txt",
            data__path=data / "dialogues",
            data__max_length=32,
        ),
        "seq2seq": job(
            scratch("seq2seq", T5) | translation,
            model__tokenizer=data / "vocab.txt",
            data__path=data / "translations",
            optim__name="adafactor",
        ),
        "image_classification": job(
            scratch("image_classification", VIT), data__path=data / "colors", task__image_size=16
        ),
        "image_regression": job(
            scratch("image_regression", VIT),
            data__path=data / "landmarks",
            task__image_size=16,
            task__targets=["x", "y"],
        ),
        "head": job(
            base,
            model__head={"pooling": "mean", "hidden": 8, "dropout": 0.1},
            freeze__modules=["backbone"],
            freeze__method="no_grad",
        ),
        "lora": Job(
            {
                "base": run(base, train__max_steps=1),
                "adapters": run(
                    trained,
                    model__name_or_path=outputs / "lora" / "base" / "model",
                    model__lora={"r": 4, "alpha": 8, "dropout": 0.1, "targets": ["query", "value"]},
                ),
            }
        ),
        "own_model": job(
            {"task.name": "classification", "data.max_length": 32, **reviews},
            model__factory="own_code:build",
            model__factory_folder=data,
            model__tokenizer="char",
            evaluation__factory="own_code:score",
            evaluation__factory_folder=data,
        ),
        "commands": Job(
            {
                "train": run(base),
                "evaluate": Run({**saved, "evaluation.micro_batch_size": 4}, 2, "evaluate"),
                "predict": Run({**saved, "predict.file": data / "few_reviews" / "validation.csv"}, command="predict"),
            }
        ),
    }


def scratch(task: str, config: Mapping[str, object]) -> dict[str, object]:
    """Settings of a task with a new model."""
    return {"task.name": task, "model.from_scratch": True, "model.config": config}


def bert(task: str, data: Path) -> dict[str, object]:
    """Settings of a task with a new BERT."""
    return {**scratch(task, BERT), "model.tokenizer": data / "vocab.txt", "data.max_length": 32}


def short() -> dict[str, object]:
    """Settings of the loop in task jobs."""
    return {
        "optim.learning_rate": 2e-3,
        "optim.weight_decay": 0.1,
        "optim.max_grad_norm": 0.1,
        "schedule.name": "cosine",
        "schedule.warmup_steps": 2,
        "train.max_steps": TASK_STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 3,
        "train.eval_every": 3,
        "evaluation.micro_batch_size": 4,
    }


# ----------------------------------------------------------------------------------------------------------------- data


def write_data(folder: Path) -> None:
    """Writes small data for every task. The contents are always the same."""
    lines(folder / "vocab.txt", [*SPECIAL_TOKENS, *WORDS])
    lines(folder / "own_code.py", OWN_CODE.splitlines())
    sizes = (("train", TASK_ROWS), ("validation", TASK_VALIDATION_ROWS))
    for split, rows in (("train", ROWS), ("validation", VALIDATION_ROWS)):
        lines(folder / f"reviews/{split}.csv", ["text,label", *review_rows(f"reviews {split}", rows)])
    for split, rows in sizes:
        rng = random.Random(split)
        lines(folder / f"few_reviews/{split}.csv", ["text,label", *review_rows(f"few {split}", rows)])
        ratings = [f"{text(rng)},{text(rng)},{rng.uniform(0, 5):.3f}" for _ in range(rows)]
        lines(folder / f"ratings/{split}.csv", ["text,text_pair,label", *ratings])
        endings = [",".join([*(text(rng) for _ in range(6)), str(rng.randrange(4))]) for _ in range(rows)]
        lines(folder / f"endings/{split}.csv", ["sent1,sent2,ending0,ending1,ending2,ending3,label", *endings])
        lines(folder / f"tags/{split}.txt", ["\n\n".join(tagged_sentence(rng) for _ in range(rows))])
        lines(folder / f"questions/{split}.jsonl", [json.dumps(question(rng)) for _ in range(rows)])
        lines(folder / f"texts/{split}.txt", [text(rng) for _ in range(6 * rows)])
        lines(folder / f"dialogues/{split}.txt", [f"{text(rng)}\t{text(rng)}\t{text(rng)}" for _ in range(rows)])
        lines(folder / f"translations/{split}.tsv", ["source\ttarget", *(translation(rng) for _ in range(rows))])
        marks = ["file,x,y"]
        for number in range(rows):
            color = ("blue", "red")[number % 2]
            image(folder / f"colors/{split}/{color}/{number}.ppm", (60, 40, 200) if color == "blue" else (200, 40, 60))
            x, y = rng.random(), rng.random()
            image(folder / f"landmarks/images/{split}-{number}.ppm", (int(255 * x), int(255 * y), 0))
            marks.append(f"images/{split}-{number}.ppm,{x:.3f},{y:.3f}")
        lines(folder / f"landmarks/{split}.csv", marks)


def lines(path: Path, rows: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def text(rng: random.Random, longest: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, longest)))


def review_rows(seed: str, rows: int) -> Iterator[str]:
    """Texts with a label that most of their words tell."""
    rng = random.Random(seed)
    for _ in range(rows):
        is_good = rng.random() < 0.5
        weights = [4 if (number % 2 == 0) == is_good else 1 for number in range(len(WORDS))]
        words = rng.choices(WORDS, weights, k=rng.randint(3, 20))
        yield f"{' '.join(words)},{'good' if is_good else 'bad'}"


def tagged_sentence(rng: random.Random) -> str:
    return "\n".join(f"{word} {rng.choice(['O', 'O', 'B-PER', 'I-PER', 'B-LOC'])}" for word in text(rng).split())


def question(rng: random.Random) -> dict[str, Any]:
    """A row in SQuAD's format. Some contexts need more than one window."""
    context = text(rng, 40)
    answer = rng.choice(context.split())
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"question": text(rng), "context": context, "answers": answers}


def translation(rng: random.Random) -> str:
    """A sentence, and another one whose words depend on it."""
    words = text(rng, 8).split()
    return f"{' '.join(words)}\t{' '.join(WORDS[(7 * WORDS.index(word) + 3) % len(WORDS)] for word in words[::-1])}"


def image(path: Path, color: tuple[int, int, int]) -> None:
    """A picture of 20 x 16 pixels with noise around a color."""
    rng = random.Random(path.name)
    pixels = bytes(max(0, min(255, part + rng.randint(-60, 60))) for _ in range(20 * 16) for part in color)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6\n20 16\n255\n" + pixels)


# --------------------------------------------------------------------------------------------------------------- record


def record(out: Path, *, checkout: Path, only: Sequence[str], seed: int) -> int:
    """Runs the jobs and writes what they computed; gives the exit code."""
    from tests.support.script import end_descendants

    check_checkout(checkout)
    begin, broken = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="same-bits-") as place:
        data, outputs = Path(place) / "data", Path(place) / "runs"
        write_data(data)
        jobs = {name: job for name, job in all_jobs(data, outputs).items() if name in only}

        def take(name: str) -> dict[str, Record]:
            nonlocal broken
            started = time.monotonic()
            records, problem = run_job(name, jobs[name], outputs=outputs, checkout=checkout, seed=seed)
            broken += problem is not None
            print(f"{name:22s} {time.monotonic() - started:5.1f} s  {problem or 'recorded'}", flush=True)
            return records

        # Jobs with several ranks keep all cores busy by themselves.
        together = [name for name, job in jobs.items() if job.ranks == 1]
        records_of = {name: take(name) for name in jobs if name not in together}
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            try:
                records_of |= dict(zip(together, pool.map(take, together), strict=True))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                end_descendants()  # the pool's threads wait for them
                raise
    content = {"seed": seed, "jobs": {name: records_of[name] for name in jobs}}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{len(jobs)} jobs in {time.monotonic() - begin:.0f} s, {broken} failed: {out}")
    return 1 if broken else 0


def check_checkout(checkout: Path) -> None:
    """Ends the script if `dtrain/main.py` would import dtrain from another place, such as an editable install."""
    command = [sys.executable, "-v", "dtrain/main.py", "--help"]
    done = subprocess.run(
        command, cwd=checkout, env=environment(checkout, checkout), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode != 0 or str(checkout / "dtrain" / "__init__.py") not in done.stderr:
        sys.exit(f"{checkout}: `{' '.join(command)}` exits with {done.returncode} and does not import dtrain from here")


def run_job(name: str, job: Job, *, outputs: Path, checkout: Path, seed: int) -> tuple[dict[str, Record], str | None]:
    """Runs one job.

    Returns:
        The record of each run, and what is wrong with the job (None: nothing).
    """
    records: dict[str, Record] = {}
    for run_name, run in job.runs.items():
        folder = outputs / name / (run.folder or run_name)
        log = outputs / name / f"{run_name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        seen = len(events(folder))
        code = execute(command_of(run, folder, seed=seed), cwd=checkout, home=outputs / name, log=log)
        result: Record = {"exit": {"code": code}}
        records[run_name] = result
        if code != "0":
            printed = log.read_text(encoding="utf-8", errors="replace")
            return records, f"FAILED: run {run_name}: exit code {code}\n{printed[-3000:]}"
        result.update(outcome(folder, skip_events=seen, hash_checkpoints=job.hash_checkpoints))
        missing = [part for part in expected(run) if not any(place.startswith(part) for place in result)]
        if missing:
            return records, f"FAILED: run {run_name}: nothing recorded of {', '.join(missing)}; found {list(result)}"
    return records, None


def expected(run: Run) -> tuple[str, ...]:
    """What a record must have, so that two empty records never look identical."""
    match run.command:
        case "train":
            return ("step 1", "evaluation", "summary", "model/", "predictions/")
        case "evaluate":
            return ("summary", "predictions/")
        case _:
            return ("predictions/",)


def command_of(run: Run, folder: Path, *, seed: int) -> list[str]:
    """The command line of a run."""
    launcher = [sys.executable]
    if run.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks)]
    settings = {
        "run.output_dir": folder.parent,
        "run.name": folder.name,
        "run.seed": seed,
        "train.log_every": 1,
        "tracking.tensorboard": False,
        "data.cache_dir": folder.parent / "cache",
        **run.settings,
    }
    return [
        *launcher,
        "dtrain/main.py",
        run.command,
        *(f"{key}={value_text(value)}" for key, value in settings.items()),
    ]


def value_text(value: object) -> str:
    """A setting's value as YAML. JSON is YAML, and paths and names need no quotes."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def environment(checkout: Path, home: Path) -> dict[str, str]:
    """Variables of a job: one thread, no accelerator, no network, and caches of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FROM_OUTSIDE)}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **kept,
        **threads,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hub"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(checkout),
    }


def execute(command: Sequence[str], *, cwd: Path, home: Path, log: Path) -> str:
    """Runs a command with a time limit; gives its exit code or "timeout"."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(cwd, home),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return str(process.wait(TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its group if it still runs. torchrun ends its ranks, and ranks end when torchrun is gone."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sent)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue


def outcome(folder: Path, *, skip_events: int, hash_checkpoints: bool) -> Record:
    """What a run left in its folder, in the order in which it came about.

    Args:
        skip_events: lines of metrics.jsonl that an earlier run in the same folder wrote.
    """
    record_of_run: Record = {}
    for event in events(folder)[skip_events:]:
        if event["event"] == "train":
            fields = {name: exact(event.get(name, "missing")) for name in TRAIN_FIELDS}
            add(record_of_run, f"step {event['step']}", fields)
        elif event["event"] == "eval":
            fields = {name: exact(value) for name, value in event.items() if name not in NOT_METRICS}
            add(record_of_run, f"evaluation at step {event['step']}", fields)
    if (folder / "summary.json").exists():
        summary = parse((folder / "summary.json").read_text(encoding="utf-8"))
        fields = {f"eval.{name}": exact(value) for name, value in summary["eval"].items()}
        add(record_of_run, "summary", {"step": exact(summary.get("step")), **fields})
    files = sorted((folder / "model").glob("*.safetensors"))
    if hash_checkpoints:
        files += sorted((folder / "checkpoints").rglob("*.safetensors"))
    for file in files:
        add(record_of_run, str(file.relative_to(folder)), tensors(file))
    for file in sorted((folder / "predictions").glob("*.jsonl")):
        add(record_of_run, str(file.relative_to(folder)), {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    return record_of_run


def add(record_of_run: Record, place: str, fields: dict[str, str]) -> None:
    """Adds an entry. A step that is taken again gets another name."""
    while place in record_of_run:
        place += ", again"
    record_of_run[place] = fields


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return [parse(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def parse(content: str) -> Any:
    """JSON with every number as its exact text."""
    return json.loads(content, parse_float=str, parse_int=str, parse_constant=str)


def exact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def tensors(file: Path) -> dict[str, str]:
    """Dtype, shape and hash of each tensor in a safetensors file.

    The format is a header length (8 bytes, little-endian), a JSON header, and the raw bytes of all tensors.
    """
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    hashes = {}
    for name in sorted(header.keys() - {"__metadata__"}):
        first, last = header[name]["data_offsets"]
        digest = hashlib.sha256(content[begin + first : begin + last]).hexdigest()
        hashes[name] = f"{header[name]['dtype']} {header[name]['shape']} sha256 {digest}"
    return hashes


# -------------------------------------------------------------------------------------------------------------- compare


def compare(before: Path, after: Path, *, only: Sequence[str] | None) -> int:
    """Prints a line for each job; gives the exit code."""
    old, new = (json.loads(file.read_text(encoding="utf-8"))["jobs"] for file in (before, after))
    names = [*old, *(name for name in new if name not in old)] if only is None else only
    differing = 0
    for name in names:
        difference = first_difference(old.get(name), new.get(name))
        differing += difference is not None
        print(f"{name}: {difference or 'identical'}")
    print(f"{len(names) - differing} of {len(names)} jobs are identical")
    return 0 if names and not differing else 1


def first_difference(old: dict[str, Record] | None, new: dict[str, Record] | None) -> str | None:
    """Describes the first difference of two records of one job; None if there is none and every run ended with 0."""
    if not old or not new:
        return f"missing in the record {'before' if not old else 'after'}"
    before, after = flat(old), flat(new)
    for key in [*before, *(key for key in after if key not in before)]:
        run, place, name = key
        values = before.get(key, "missing"), after.get(key, "missing")
        where = f"run {run}, {place}, {name}"
        if values[0] != values[1]:
            return f"DIFFERS: {where}: {values[0]} before, {values[1]} after"
        if place == "exit" and values[0] != "0":
            return f"FAILED both times: {where}: {values[0]}"
    return None


def flat(records: dict[str, Record]) -> dict[tuple[str, str, str], str]:
    """Run, place and field -> value, in recorded order."""
    return {
        (run, place, name): value
        for run, record_of_run in records.items()
        for place, fields in record_of_run.items()
        for name, value in fields.items()
    }


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    names = list(all_jobs(Path(), Path()))
    recording = commands.add_parser("record", help="run the jobs and write a record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--checkout", type=Path, default=ROOT, help="the code to run; default: this checkout")
    recording.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    recording.add_argument("--seed", type=int, default=7, help="run.seed of all jobs")
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="compare these jobs only")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return compare(arguments.before, arguments.after, only=arguments.only)
    return record(arguments.out, checkout=arguments.checkout.resolve(), only=arguments.only, seed=arguments.seed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.support.script import run_script

    run_script(main)

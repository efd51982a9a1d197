"""Every task and its shipped config, on one process and on two ranks: losses of all steps, and the metrics at the end.

    .venv/bin/python tests/benchmarks/every_task.py
    .venv/bin/python tests/benchmarks/every_task.py --only swag squad

The configs are used as they are, but for a tiny random model and made-up data in each task's own format, so that it
needs no network. Prints a table; exit 1 where a loss is off by more than 1e-5 relative, or a generated text differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.config.option_parser import OptionParser  # noqa: E402
from dtrain.data.glue import TASKS, GlueTask  # noqa: E402
from dtrain.runs.jsonl import read_metrics  # noqa: E402
from tests.support import pictures, tiny, tiny_seq2seq  # noqa: E402

TRAIN, DEV = 45, 21
"""Rows: two ranks do not divide either of them into equal micro-batches."""

ENCODER = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
DECODER = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128}
TRANSLATOR = {"model_type": "t5", "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}


@dataclass(frozen=True)
class Case:
    """A shipped config with what stands in for its model and its data.

    make: writes the data into a folder and gives further settings. model: settings of the new model.
    """

    config: str
    make: Callable[[Path], Mapping[str, Any]]
    model: Mapping[str, Any] = field(default_factory=lambda: ENCODER)
    settings: Mapping[str, Any] = field(default_factory=dict)


def text(rng: random.Random, words: int = 12) -> str:
    return " ".join(rng.choices(tiny.WORDS, k=rng.randint(3, words)))


def lines(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def glue(name: str) -> Callable[[Path], Mapping[str, Any]]:
    """Writes a GLUE task's files as they are laid out."""
    task: GlueTask = TASKS[name]

    def make(folder: Path) -> Mapping[str, Any]:
        rng = random.Random(name)
        columns = task.columns or ("index", *task.texts, task.label)
        for split, file in task.files.items():
            rows = [] if task.columns else ["\t".join(columns)]
            for index in range(TRAIN if split == "train" else DEV):
                label = rng.choice(list(task.labels)) if task.labels else f"{rng.uniform(0, 5):.3f}"
                row = {"index": str(index), "source": "made", "mark": "", task.label: label}
                rows.append("\t".join(text(rng) if column in task.texts else row[column] for column in columns))
            lines(folder / file, rows)
        return {"data.path": folder}

    return make


def swag(folder: Path) -> Mapping[str, Any]:
    rng = random.Random(1)
    for file, count in (("train.csv", TRAIN), ("val.csv", DEV)):
        rows = [
            ",".join([text(rng), text(rng), *(text(rng) for _ in range(4)), str(rng.randrange(4))])
            for _ in range(count)
        ]
        lines(folder / file, ["sent1,sent2,ending0,ending1,ending2,ending3,label", *rows])
    return {"data.path": folder}


def squad(folder: Path) -> Mapping[str, Any]:
    rng = random.Random(2)
    for split, count in (("train", TRAIN), ("validation", DEV)):
        rows = []
        for _ in range(count):
            context = text(rng, 40)
            answer = rng.choice(context.split())
            rows.append(
                {
                    "question": text(rng),
                    "context": context,
                    "answers": {"text": [answer], "answer_start": [context.index(answer)]},
                }
            )
        lines(folder / f"{split}.jsonl", list(map(json.dumps, rows)))
    return {
        "data.name": "null",
        "data.path": folder,
        "data.splits": "{train: train.jsonl, validation: validation.jsonl}",
        "data.max_length": 32,
        "task.doc_stride": 8,
    }


def conll(folder: Path) -> Mapping[str, Any]:
    rng = random.Random(3)
    for file, count in (("train.txt", TRAIN), ("valid.txt", DEV)):
        sentences = [
            "\n".join(f"{word} {rng.choice(['O', 'O', 'B-PER', 'I-PER', 'B-LOC'])}" for word in text(rng).split())
            for _ in range(count)
        ]
        lines(folder / file, ["\n\n".join(sentences)])
    return {"data.path": folder}


def plain(folder: Path) -> Mapping[str, Any]:
    rng = random.Random(4)
    for name, count in (("train", TRAIN), ("validation", DEV)):
        lines(folder / f"{name}.txt", [text(rng) for _ in range(4 * count)])
    return {"data.path": folder, "data.splits": "{train: train.txt, validation: validation.txt}", "data.max_length": 16}


def reviews(folder: Path) -> Mapping[str, Any]:
    rng = random.Random(5)
    lines(
        folder / "reviews.csv",
        ["text,label", *(f"{text(rng)},{rng.choice(['good', 'bad'])}" for _ in range(TRAIN + DEV))],
    )
    return {"data.path": folder / "reviews.csv"}


def dialogues(folder: Path) -> Mapping[str, Any]:
    rng = random.Random(6)
    for name, count in (("toy_train", TRAIN), ("toy_valid", DEV)):
        lines(folder / f"{name}.txt", [f"{text(rng)}\t{text(rng)}" for _ in range(count)])
    return {"data.path": folder}


def pairs(folder: Path) -> Mapping[str, Any]:
    folder.mkdir(parents=True)
    tiny_seq2seq.write_tsv(folder / "train.tsv", TRAIN, seed=0)
    tiny_seq2seq.write_tsv(folder / "validation.tsv", DEV, seed=1)
    return {"data.name": "null", "data.config": "null", "data.path": folder, "data.splits": "{}", "data.num_proc": 1}


def translations(folder: Path) -> Mapping[str, Any]:
    for split, count, seed in (("train", TRAIN, 0), ("validation", DEV, 1)):
        sides = [
            {"en": tiny_seq2seq.text_of(words), "ro": tiny_seq2seq.text_of(tiny_seq2seq.translated(words))}
            for words in tiny_seq2seq.sentences(count, seed=seed)
        ]
        lines(folder / f"{split}.jsonl", [json.dumps({"translation": side}) for side in sides])
    return {**pairs_settings(folder), "task.max_target_length": 12}


def pairs_settings(folder: Path) -> dict[str, Any]:
    return {"data.name": "null", "data.config": "null", "data.path": folder, "data.splits": "{}", "data.num_proc": 1}


def images(folder: Path) -> Mapping[str, Any]:
    return {"data.path": pictures.write_class_folders(folder, train=TRAIN, validation=DEV), "task.image_size": 16}


def landmarks(folder: Path) -> Mapping[str, Any]:
    pictures.write_landmarks(folder, train=TRAIN, validation=DEV)
    return {"data.path": folder, "task.targets": "[x, y]", "task.image_size": 16}


def pretrained(folder: Path) -> Mapping[str, Any]:
    """CoLA, and a model that has been saved: adapters go on no other."""
    return {**glue("cola")(folder), "model.name_or_path": tiny.write_model(folder / "model"), "data.max_length": 64}


CASES: dict[str, Case] = {
    **{name: Case(name, glue(name)) for name in TASKS},
    "swag": Case("swag", swag),
    "squad": Case("squad", squad),
    "ner": Case("ner", conll),
    "masked_lm": Case("masked_lm", plain),
    "char_gpt": Case(
        "char_gpt",
        lambda folder: {**plain(folder), "data.validation_fraction": "null", "train.eval_every": "epoch"},
        DECODER,
    ),
    "wikitext2": Case(
        "wikitext2_from_scratch",
        lambda folder: {**plain(folder), "model.tokenizer_vocab_size": 300, "task.stride": 8},
        DECODER,
    ),
    "chat_zh": Case("chat_zh", dialogues, DECODER),
    "translation": Case("translation_from_scratch", pairs, TRANSLATOR, {"evaluation.num_beams": 2}),
    "t5_en_ro": Case("t5_en_ro", translations, TRANSLATOR, {"schedule.warmup_steps": 2}),
    "summarization": Case("summarization", lambda folder: {**pairs(folder), "task.max_target_length": 12}, TRANSLATOR),
    "images": Case("image_classification", images, pictures.VIT),
    "landmarks": Case("image_regression", landmarks, pictures.VIT),
    "frozen_backbone": Case("frozen_backbone", glue("cola")),
    "lora": Case("lora", pretrained, {}),
    "own_model": Case("own_model", reviews, {}),
}


def settings_of(case: Case, folder: Path) -> list[str]:
    """What is changed of the shipped config."""
    found: dict[str, Any] = {"train.global_batch_size": 8, "train.micro_batch_size": 2, "train.log_every": 1}
    found |= {
        "train.epochs": 2,
        "train.max_steps": "null",
        "tracking.tensorboard": "false",
        "evaluation.micro_batch_size": 4,
    }
    if case.model:
        words = folder / "words"
        tiny.tokenizer().save_pretrained(words)
        found |= {"model.name_or_path": "null", "model.from_scratch": "true", "model.config": json.dumps(case.model)}
        if case.config not in ("char_gpt", "wikitext2_from_scratch", "image_classification", "image_regression"):
            found["model.tokenizer"] = words
    found |= case.make(folder / "data")
    return [f"{key}={value}" for key, value in {**found, **case.settings}.items()]


def run(
    case: Case, name: str, world: int, folder: Path, settings: list[str]
) -> tuple[dict[str, float], list[float], list[Any]]:
    """Final metrics, the loss of every step, and what was predicted for every example."""
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*start, str(ROOT / "dtrain/main.py"), "--config", str(ROOT / f"configs/{case.config}.yaml"), *settings]
    command += [f"run.output_dir={folder}", f"run.name={name}-{world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    run_dir = folder / f"{name}-{world}"
    metrics = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["eval"]
    losses = [event["loss"] for event in read_metrics(run_dir / "metrics.jsonl") if event["event"] == "train"]
    files = sorted((run_dir / "predictions").glob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return metrics, losses, [record["prediction"] for record in records]


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    failed = False
    heads = ("task", "config", "steps", "loss, 1 against 2 ranks", "metrics on 1 process", "on 2 ranks", "predictions")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in parser.parse_args().only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as place:
            settings = settings_of(case, Path(place))
            (one, losses, written), (two, others, written_too) = (
                run(case, name, world, Path(place), settings) for world in (1, 2)
            )
        off = max(abs(a - b) / abs(a) for a, b in zip(losses, others, strict=True))
        is_generated = "bleu" in one or "rouge_l" in one
        failed |= not off <= 1e-5 or one.keys() != two.keys() or (is_generated and written != written_too)
        same = "equal" if written == written_too else "not equal"
        print(
            f"| {name} | {case.config} | {len(losses)} | {off:.1e} | {shown(one)} | {shown(two)} | {same} |", flush=True
        )
    return 1 if failed else 0


def shown(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.9g}" for name, value in metrics.items() if math.isfinite(float(value)))


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

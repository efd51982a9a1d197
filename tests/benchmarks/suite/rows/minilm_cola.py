"""The row `minilm_cola`: the whole command of a real fine-tuning, from start to summary, dtrain's and HF Trainer's."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.suite import machine, race
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import ContestantError, Lane
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.spec import DTRAIN, HF, Contestant
from tests.benchmarks.suite.workloads import MINILM, SPECIAL

EPOCHS, BATCH = 3, 32
FILES = ("train.tsv", "dev.tsv")


def minilm_cola(options: Options) -> RowResult:
    """CoLA, 3 epochs with an evaluation after each, exported at the end; seed n in round n."""
    result = RowResult(
        "minilm_cola",
        "a whole fine-tuning run on CoLA",
        f"6 layers, 384 wide (MiniLM's shape, 22M parameters); {EPOCHS} epochs in batches of {BATCH}, an evaluation after each, "
        "the model saved at the end. Time of the whole process; round n has seed n.",
        [],
        {
            "CPU s": ("cpu_s", 1.0, 0),
            "wall s": ("wall_s", 1.0, 0),
            "Matthews": ("matthews", 1.0, 3),
            "loss": ("loss", 1.0, 3),
        },
    )
    if options.quick:
        result.notes.append("nothing here is equal in every run: not part of --quick")
        return result
    contestants = options.chosen([DTRAIN, HF])
    missing = "skipped: give --data FOLDER with CoLA's train.tsv and dev.tsv"
    if options.data is None or not all((options.data / name).exists() for name in FILES):
        result.lanes = [Lane(one.name, missing) for one in contestants]
        return result
    data = _limited(options.data, options.scratch / "cola", options.rows)
    model = options.model or _new_model(data, options.scratch / "minilm")
    if options.model is None:
        result.notes.append("the weights are new: give --model FOLDER to compare Matthews of a trained MiniLM")
    if options.rows is not None:
        result.notes.append(f"only the first {options.rows} rows of each file")
    result.lanes = [Lane(one.name, one.unavailable() or "ran") for one in contestants]
    pairs = list(zip(result.lanes, contestants, strict=True))
    for turn in range(options.rounds(3)):
        for lane, one in pairs if turn % 2 == 0 else reversed(pairs):
            if lane.ran:
                try:
                    _measure(lane, one, data, model, options.scratch / "minilm_cola" / f"{one.kind}-{turn}", turn)
                except ContestantError as error:
                    lane.status = f"failed: {error}"
    return result


def _measure(lane: Lane, contestant: Contestant, data: Path, model: Path, output: Path, seed: int) -> None:
    own = contestant.kind == "dtrain"
    command = dtrain_command(data, model, output, seed) if own else hf_command(data, model, output, seed)
    home = str(output / "home")
    cpu, wall = race.run_command(command, output, {"HF_HOME": home, "XDG_CACHE_HOME": home})
    path = output / "cola" / "summary.json" if own else output / "result.json"
    found = json.loads(path.read_text(encoding="utf-8"))["eval"]
    lane.add(cpu_s=cpu, wall_s=wall, matthews=found["matthews_correlation"], loss=found["loss"])


def dtrain_command(data: Path, model: Path, output: Path, seed: int) -> list[str]:
    """Returns dtrain's command line."""
    settings = {
        "run.name": "cola",
        "run.output_dir": output,
        "run.seed": seed,
        "task.name": "classification",
        "model.name_or_path": model,
        "data.name": "cola",
        "data.path": data,
        "data.cache_dir": output / "cache",
        "train.epochs": EPOCHS,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": BATCH,
        "checkpoint.every": "null",
        "tracking.tensorboard": "false",
    }
    main = str(machine.ROOT / "dtrain" / "main.py")
    return [sys.executable, main, *(f"{key}={value}" for key, value in settings.items())]


def hf_command(data: Path, model: Path, output: Path, seed: int) -> list[str]:
    """Returns the command line of HF's side."""
    script = "tests.benchmarks.suite.contestants.hf_cola"
    return [sys.executable, "-m", script, str(data), str(model), str(output), str(seed), str(EPOCHS), str(BATCH)]


def _limited(data: Path, folder: Path, rows: int | None) -> Path:
    """Returns the data's folder, or one with the first rows of each file."""
    if rows is None:
        return data.resolve()
    folder.mkdir(parents=True)
    for name in FILES:
        lines = (data / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:rows]), encoding="utf-8")
    return folder


def _new_model(data: Path, folder: Path) -> Path:
    """Writes a model of MiniLM's shape with new weights and a WordPiece tokenizer learned from the data."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = BertWordPieceTokenizer(lowercase=True)
    sentences = _sentences(data / FILES[0])
    words.train_from_iterator(sentences, vocab_size=MINILM.vocab, special_tokens=list(SPECIAL), show_progress=False)
    BertTokenizerFast(vocab=words.get_vocab()).save_pretrained(folder)
    config = BertConfig(
        vocab_size=MINILM.vocab,
        hidden_size=MINILM.hidden,
        num_hidden_layers=MINILM.layers,
        num_attention_heads=MINILM.heads,
        intermediate_size=MINILM.ffn,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _sentences(path: Path) -> Sequence[str]:
    return [line.split("\t")[-1] for line in path.read_text(encoding="utf-8").splitlines()]

"""A tiny T5 and a made-up translation: each word has one translation, and the order is reversed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from dtrain.config.schema import Config
from dtrain.config.task import Seq2Seq
from dtrain.tasks.seq2seq import Seq2SeqTask
from tests.support import tiny
from tests.support.tiny import Table

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
FIRST = len(tiny.SPECIAL)


def translated(words: list[int]) -> list[int]:
    """Word i becomes 7i + 3 modulo the number of words."""
    return [(7 * word + 3) % len(tiny.WORDS) for word in reversed(words)]


def ids_of(words: list[int]) -> list[int]:
    return [BEGIN, *(FIRST + word for word in words), END]


def text_of(words: list[int]) -> str:
    return " ".join(tiny.WORDS[word] for word in words)


def sentences(rows: int, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(len(tiny.WORDS)), k=rng.randint(1, 9)) for _ in range(rows)]


def table(rows: int, *, seed: int = 0) -> Table:
    """Tokenised as the task tokenises: sources, targets, and the targets' texts."""
    words = sentences(rows, seed=seed)
    return Table(
        {
            "input_ids": [ids_of(source) for source in words],
            "labels": [ids_of(translated(source)) for source in words],
            "reference": [text_of(translated(source)) for source in words],
        }
    )


def config(*, evaluation: dict[str, Any] | None = None, **settings: Any) -> Config:
    """generate is on; `settings` of the task."""
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "task": {"name": "seq2seq", "max_target_length": 12, **settings},
            "evaluation": {"generate": True, **(evaluation or {})},
        }
    )


def task(rows: int, *, seed: int = 5, evaluation: dict[str, Any] | None = None, **settings: Any) -> Seq2SeqTask:
    """21 pairs to learn from and `rows` to measure on."""
    made = config(evaluation=evaluation, **settings)
    assert isinstance(made.task, Seq2Seq)
    splits = {"train": table(21), "validation": table(rows, seed=seed)}
    return Seq2SeqTask(splits, tiny.tokenizer(), made.task, made.evaluation, max_length=16)


def t5(*, dropout: float = 0.0, seed: int = 0, loud: float = 4.0) -> Any:
    """A random T5 of 2 layers, 32 wide. loud: times the usual size of its weights, so that it writes different texts."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = T5Config(
            vocab_size=FIRST + len(tiny.WORDS),
            d_model=32,
            d_kv=8,
            num_heads=4,
            d_ff=64,
            num_layers=2,
            dropout_rate=dropout,
            initializer_factor=loud,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
        )
        return T5ForConditionalGeneration(made)


def write_tsv(path: Path, rows: int, *, seed: int) -> Path:
    lines = [f"{text_of(words)}\t{text_of(translated(words))}" for words in sentences(rows, seed=seed)]
    path.write_text("\n".join(["source\ttarget", *lines]) + "\n", encoding="utf-8")
    return path

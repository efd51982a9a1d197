"""Small models, tokenizers and data made on the spot, equal in every process that asks for them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.data.seeding import DataPosition

HERE = DataPosition(0, ())
"""For tasks that draw nothing at random."""

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "likes",
    "big",
    "small",
    "red",
    "quick",
    "old",
    "with",
    "near",
    "under",
    "never",
    "always",
    "runs",
    "sleeps",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Table:
    """Columns in memory, read as a `datasets.Dataset` is."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, indices: list[int]) -> dict[str, list[Any]]:
        return {name: [values[index] for index in indices] for name, values in self._columns.items()}


def sentences(rows: int, *, seed: int = 0) -> Table:
    """Token ids of 3 to 20 words, and label 1 where the first word is in the first half of the list."""
    rng = random.Random(seed)
    ids, labels = [], []
    for _ in range(rows):
        words = rng.choices(range(len(WORDS)), k=rng.randint(3, 20))
        ids.append([2, *(len(SPECIAL) + word for word in words), 3])
        labels.append(int(words[0] < len(WORDS) // 2))
    return Table({"input_ids": ids, "label": labels})


def arrow_sentences(rows: int, *, seed: int = 0) -> Any:
    """The same rows as an Arrow table, as prepared data are: their lengths are known."""
    from datasets import Dataset

    return Dataset.from_dict(sentences(rows, seed=seed)[[*range(rows)]])


def tokenizer() -> Any:
    """A word tokenizer over WORDS."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={token: number for number, token in enumerate([*SPECIAL, *WORDS])})


def bert(*, dropout: float = 0.1, seed: int = 0, layers: int = 2) -> Any:
    """A random BERT for two labels, 32 wide."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=2,
        )
        return BertForSequenceClassification(config)


def write_cola(folder: Path, *, train: int, dev: int, seed: int = 0) -> Path:
    """A folder in CoLA's format."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count in (("train", train), ("dev", dev)):
        lines = []
        for _ in range(count):
            words = rng.choices(WORDS, k=rng.randint(3, 20))
            label = int(WORDS.index(words[0]) < len(WORDS) // 2)
            lines.append(f"made\t{label}\t{'*' if label == 0 else ''}\t{' '.join(words)}\n")
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def write_model(folder: Path, *, dropout: float = 0.1, seed: int = 0, layers: int = 2) -> Path:
    """That BERT and tokenizer as a Hugging Face folder."""
    tokenizer().save_pretrained(folder)
    bert(dropout=dropout, seed=seed, layers=layers).save_pretrained(folder)
    return folder

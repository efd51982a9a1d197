"""The models and data that every contestant gets: made on the spot, from fixed seeds.

A workload's folder holds `model/` (weights and tokenizer), `train.csv` and `validation.csv` with columns text and label.
Each word of a text is one token, so a row's length in tokens is known.
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHORTEST, LONGEST = 5, 128
MEDIAN, SIGMA = 24, 0.55


@dataclass(frozen=True)
class ModelShape:
    """A BERT classifier.

    Attributes:
        ffn: width of the feed-forward layers.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int


T0 = ModelShape(1000, 128, 2, 2, 512)
T1 = ModelShape(8192, 256, 4, 4, 1024)
T2 = ModelShape(30522, 768, 6, 12, 3072)
MINILM = ModelShape(30522, 384, 6, 12, 1536)
COUNTED = ModelShape(200, 16, 2, 2, 16)
"""For figures that do not depend on the model's size: tokens, collectives, imports, agreement of losses."""


@dataclass(frozen=True)
class Workload:
    """A model, its data and the batch.

    Attributes:
        rows: of the training split.
        batch: examples per step of one rank.
        validation: rows of the validation split.
        length: tokens of every training row, special ones included; None: lengths of D_glue, as in validation.
        dropout: of the model; 0 where losses are compared.
    """

    shape: ModelShape
    rows: int
    batch: int
    validation: int = 64
    length: int | None = None
    dropout: float = 0.1

    def counted(self) -> Workload:
        """Returns the same data for a model that costs nothing."""
        return replace(self, shape=COUNTED, dropout=0.0)

    def lengths(self, split: str) -> np.ndarray:
        """Returns the number of tokens of each row."""
        if split != "train":
            return glue_lengths(self.validation, seed=1)
        if self.length is not None:
            return np.full(self.rows, self.length)
        return glue_lengths(self.rows, seed=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        return cls(**{**data, "shape": ModelShape(**data["shape"])})


def glue_lengths(rows: int, *, seed: int) -> np.ndarray:
    """Returns D_glue: round(lognormal(ln 24, 0.55)), clipped to 5..128. Much like the sentence tasks of GLUE."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, rows)
    return np.clip(np.round(drawn), SHORTEST, LONGEST).astype(int)


def write(workload: Workload, folder: Path) -> Path:
    """Writes the folder of a workload, unless it is there; returns it."""
    done = folder / "workload.json"
    if done.exists() and Workload.from_json(json.loads(done.read_text(encoding="utf-8"))) == workload:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_model(workload, folder / "model")
    words = workload.shape.vocab - len(SPECIAL)
    for split in ("train", "validation"):
        write_csv(folder / f"{split}.csv", workload.lengths(split), words, seed=2 if split == "train" else 3)
    done.write_text(json.dumps(workload.to_json()), encoding="utf-8")
    return folder


def write_csv(path: Path, lengths: np.ndarray, words: int, *, seed: int) -> None:
    """Writes random sentences of these lengths in tokens. The label says whether the first word is in the first half."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for length in lengths:
            drawn = rng.integers(0, words, length - 2)  # [CLS] and [SEP] are the other two
            writer.writerow([" ".join(f"w{word}" for word in drawn), int(drawn[0] < words // 2)])


def _write_model(workload: Workload, folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
    from transformers.utils import logging

    shape = workload.shape
    vocab = [*SPECIAL, *(f"w{word}" for word in range(shape.vocab - len(SPECIAL)))]
    BertTokenizerFast(vocab={token: index for index, token in enumerate(vocab)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=512,
        hidden_dropout_prob=workload.dropout,
        attention_probs_dropout_prob=workload.dropout,
        num_labels=2,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)


def read_csv(path: Path) -> tuple[list[str], list[int]]:
    """Returns texts and labels."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [int(row["label"]) for row in rows]

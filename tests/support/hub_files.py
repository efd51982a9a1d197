"""A model and a data set as they lie in repositories of a hub."""

from __future__ import annotations

from pathlib import Path

import datasets
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]


def write_model(folder: Path) -> Path:
    """A tiny BERT and its tokenizer."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """One configuration, as push_to_hub lays it out: Parquet below data/, class names in the card."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    (folder / "data").mkdir()
    for split, rows in (("train", [("the cat", 1), ("a mat", 0), ("on", 1)]), ("validation", [("the mat", 0)])):
        columns = {"sentence": [text for text, _ in rows], "label": [label for _, label in rows]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder

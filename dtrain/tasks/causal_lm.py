"""The next token of a text.

A split is one stream of tokens, cut into blocks of `data.max_length` inputs that overlap by one token, so that every
token but the very first is a target exactly once and none is dropped. The last block is shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from dtrain.data.rows import TEXT
from dtrain.data.sources import Source
from dtrain.errors import DataError
from dtrain.models.tokenizer import has_characters_only
from dtrain.schema import Config
from dtrain.seeding import Place
from dtrain.task_settings import CausalLm, Head
from dtrain.tasks.preparing import Meta, Recipe, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, Scored, Split, Targets
from dtrain.tasks.tensors import full_precision
from dtrain.topology import Topology


class CausalLmTask:
    """Cross entropy of each next token; perplexity, and bits per character where a token is a character."""

    name = "causal_lm"
    head: Head = "causal_lm"
    needs_padding = False

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, *, max_length: int, is_char: bool) -> None:
        """
        Args:
            splits: rows with `input_ids`, at most max_length + 1 of them.
            is_char: every token is one character.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {}
        self.metric_names: Sequence[str] = ("perplexity", "bits_per_character") if is_char else ("perplexity",)
        self._is_char = is_char

    def collate(self, rows: Mapping[str, Sequence[Any]], place: Place) -> Batch:
        blocks = [torch.tensor(ids, dtype=torch.int64) for ids in rows["input_ids"]]
        longest = max(len(block) for block in blocks) - 1
        inputs = torch.full((len(blocks), longest), self.tokenizer.pad_token_id or 0)
        labels = torch.full((len(blocks), longest), IGNORED)
        for row, block in enumerate(blocks):
            inputs[row, : len(block) - 1] = block[:-1]
            labels[row, : len(block) - 1] = block[1:]
        if (labels != IGNORED).all():  # full blocks need no mask, and attention is faster without one
            return {"input_ids": inputs, "labels": labels}
        return {"input_ids": inputs, "attention_mask": (labels != IGNORED).long(), "labels": labels}

    def targets(self, batch: Batch) -> Targets:
        count = int((batch["labels"] != IGNORED).sum())
        return Targets(float(count), count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = _logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        logits, labels = _logits(module, batch)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return Scored(losses.double().sum(dim=1), (labels != IGNORED).sum(dim=1), None)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        found = {"perplexity": math.inf if loss > 700 else math.exp(loss)}
        return {**found, "bits_per_character": loss / math.log(2)} if self._is_char else found

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [{"prediction": None, "reference": None} for _ in range(len(self.splits[split]))]


def prepare_causal_lm(config: Config, settings: CausalLm, topology: Topology) -> CausalLmTask:
    """Collective. Tokenises each split into blocks, once per node."""

    def stream(source: Source) -> str:
        texts: Iterable[str] = source.rows["text"]
        return settings.joiner.join(texts)

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        return _blocks(_ids(stream(source), tokenizer), config.max_length, origin=source.origin)

    recipe = Recipe(
        "causal_lm",
        TEXT,
        texts=lambda source: [stream(source)],
        encode=encode,
        options={"joiner": settings.joiner},
        needs_padding=False,
    )
    examples = prepare_examples(recipe, config, topology)
    tokenizer = examples.tokenizer
    return CausalLmTask(
        examples.splits, tokenizer, max_length=config.max_length, is_char=has_characters_only(tokenizer)
    )


def _ids(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def block_starts(num_tokens: int, max_length: int) -> range:
    """Where each block of max_length inputs begins; its targets are the same tokens one place on."""
    return range(0, num_tokens - 1, max_length)


def _blocks(ids: Sequence[int], max_length: int, *, origin: str) -> Dataset:
    if len(ids) < 2:
        raise DataError(f"{origin} holds {len(ids)} token(s): a next token needs at least two. Give a longer text.")
    return Dataset.from_dict(
        {"input_ids": [ids[start : start + max_length + 1] for start in block_starts(len(ids), max_length)]}
    )


def _logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return full_precision(model(**inputs, use_cache=False).logits), batch["labels"]

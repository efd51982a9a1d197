"""Which of several endings goes on a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Head, MultipleChoice
from dtrain.data.choices import CHOICES
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.tasks.prepare import Meta, Recipe, columns_of, map_rows, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, Scored, Split, Targets
from dtrain.tasks.tensors import counted, label_tensor, logits_of, padded


class MultipleChoiceTask:
    """Cross entropy over the choices of each example, one target an example; accuracy."""

    name = "multiple_choice"
    head: Head = "multiple_choice"
    needs_padding = True
    metric_names: Sequence[str] = ("accuracy",)

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, *, max_length: int) -> None:
        """
        Args:
            splits: rows with `input_ids` and `token_type_ids`, a list for each choice, and `label`, the right one's
                number. All rows of a split have the same number of choices.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {}

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        """Inputs (batch, choices, length), labels (batch,)."""
        examples, choices = len(rows["input_ids"]), len(rows["input_ids"][0])
        inputs = {key: list(chain.from_iterable(rows[key])) for key in rows if key in ("input_ids", "token_type_ids")}
        flat = padded(self.tokenizer, inputs)
        labels = label_tensor(rows.get("label") or [None] * examples)
        return {**{key: value.reshape(examples, choices, -1) for key, value in flat.items()}, "labels": labels}

    def targets(self, batch: Batch) -> Targets:
        return counted(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = logits_of(model, batch), batch["labels"]
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        logits, labels = logits_of(module, batch), batch["labels"]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return Scored(loss.double(), (labels != IGNORED).long(), logits.argmax(dim=-1))

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        pairs = zip(self._truth(split), predictions, strict=True)
        judged = [(label, int(found)) for label, found in pairs if label is not None]
        if not judged:
            return {}
        truth, found = zip(*judged, strict=True)
        return {"accuracy": float(accuracy_score(truth, found))}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [
            {"prediction": int(found), "reference": label}
            for found, label in zip(predictions, self._truth(split), strict=True)
        ]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        best = logits_of(module, batch).softmax(dim=-1).max(dim=-1)
        return [
            {"prediction": index, "probability": probability}
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _truth(self, split: str) -> Sequence[int | None]:
        """The right choices of a split in data order; None for an example without a label."""
        return columns_of(self.splits[split], "label")["label"]


def prepare_multiple_choice(config: Config, settings: MultipleChoice, context: RankContext) -> MultipleChoiceTask:
    """Collective. Tokenises each split once per node: for each ending the pair (sent1, sent2 + ending)."""

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        def tokenise(rows: Mapping[str, Any]) -> dict[str, Any]:
            choices = [len(endings) for endings in rows["endings"]]
            encoded = tokenizer(
                [sent1 for sent1, number in zip(rows["sent1"], choices, strict=True) for _ in range(number)],
                [_joined(sent2, e) for sent2, ends in zip(rows["sent2"], rows["endings"], strict=True) for e in ends],
                truncation=True,
                max_length=config.max_length,
                return_attention_mask=False,
            )
            flat = {key: iter(values) for key, values in encoded.items()}
            return {
                **{key: [[next(values) for _ in range(number)] for number in choices] for key, values in flat.items()},
                "label": rows.get("label") or [None] * len(choices),
            }

        return map_rows(source, tokenise, config)

    recipe = Recipe("multiple_choice", CHOICES, texts=_texts, encode=encode)
    examples = prepare_examples(recipe, config, context)
    return MultipleChoiceTask(examples.splits, examples.tokenizer, max_length=config.max_length)


def _joined(sent2: str, ending: str) -> str:
    return f"{sent2} {ending}" if sent2 else ending


def _texts(source: Source) -> Iterator[str]:
    for row in source.rows:
        yield row["sent1"]
        for ending in row["endings"]:
            yield _joined(row["sent2"], ending)

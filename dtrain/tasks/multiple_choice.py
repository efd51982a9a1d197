"""The ending, out of several, that continues a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModelForMultipleChoice

from dtrain.config.schema import Config
from dtrain.config.task import MultipleChoice
from dtrain.data.choices import CHOICES
from dtrain.data.columns import flat_rows
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.models.heads import Head
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, Recipe, encode_texts, map_rows, prepare_examples, read_columns
from dtrain.tasks.protocol import IGNORED, Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.tensors import compute_logits, count_targets, label_tensor, pad_rows
from dtrain.tasks.truncation import FULL_LENGTH

HEAD = Head("multiple_choice", AutoModelForMultipleChoice, logits="choice")


def info(settings: MultipleChoice) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_multiple_choice(config, settings, context),
        head=HEAD,
        example_row={
            "sent1": "She opens the door.",
            "sent2": "She",
            "ending0": "goes in.",
            "ending1": "is a door.",
        },
        text_columns=(),
        format_prediction=_format_prediction,
        pipeline_tag="multiple-choice",
    )


def _format_prediction(choice: int, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    name = f"ending{choice}"
    return f"{name}: {row[columns.get(name, name)]}"


class MultipleChoiceTask:
    """Cross entropy over the choices of each example, with one target per example. Metric: accuracy."""

    name = "multiple_choice"
    head = HEAD
    needs_padding = True
    padding = Padding()
    metric_names: Sequence[str] = ("accuracy",)

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, *, max_length: int) -> None:
        """
        Args:
            splits: Rows with `input_ids` and `token_type_ids`, a list for each choice, and `label`, the index of the
                correct choice. All rows of a split have the same number of choices.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {}

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        """Returns inputs (batch, choices, length) and labels (batch,)."""
        examples, choices = len(rows["input_ids"]), len(rows["input_ids"][0])
        inputs = {key: flat_rows(rows[key]) for key in rows if key in ("input_ids", "token_type_ids")}
        flat = pad_rows(self.tokenizer, inputs, self.padding)
        labels = label_tensor(rows.get("label") or [None] * examples)
        return {**{key: value.reshape(examples, choices, -1) for key, value in flat.items()}, "labels": labels}

    def targets(self, batch: Batch) -> Targets:
        return count_targets(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = compute_logits(model, batch), batch["labels"]
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        logits, labels = compute_logits(module, batch), batch["labels"]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return ScoredBatch(loss.double(), (labels != IGNORED).long(), logits.argmax(dim=-1))

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        examples = zip(self._references(split), predictions, strict=True)
        pairs = [(label, int(choice)) for label, choice in examples if label is not None]
        if not pairs:
            return {}
        expected, predicted = zip(*pairs, strict=True)
        return {"accuracy": float(accuracy_score(expected, predicted))}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [
            {"prediction": int(choice), "reference": label}
            for choice, label in zip(predictions, self._references(split), strict=True)
        ]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        best = compute_logits(module, batch).softmax(dim=-1).max(dim=-1)
        return [
            {"prediction": index, "probability": probability}
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _references(self, split: str) -> Sequence[int | None]:
        """Returns the correct choices of a split in data order. None for an example without a label."""
        return read_columns(self.splits[split], "label")["label"]


def prepare_multiple_choice(config: Config, settings: MultipleChoice, context: RankContext) -> MultipleChoiceTask:
    """Collective. Tokenizes each split once per node: the pair (sent1, sent2 + ending) for each ending."""

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        def tokenize(rows: Mapping[str, Any]) -> dict[str, Any]:
            choices = [len(endings) for endings in rows["endings"]]
            texts = {
                "text": [sent1 for sent1, number in zip(rows["sent1"], choices, strict=True) for _ in range(number)],
                "text_pair": [
                    _join(sent2, e) for sent2, ends in zip(rows["sent2"], rows["endings"], strict=True) for e in ends
                ],
            }
            encoded = encode_texts(texts, tokenizer, max_length=config.max_length)
            lengths = iter(encoded[FULL_LENGTH])
            flat = {key: iter(values) for key, values in encoded.items() if key != FULL_LENGTH}
            return {
                **{key: [[next(values) for _ in range(number)] for number in choices] for key, values in flat.items()},
                "label": rows.get("label") or [None] * len(choices),
                FULL_LENGTH: [max(next(lengths) for _ in range(number)) for number in choices],
            }

        return map_rows(source, tokenize, config)

    recipe = Recipe("multiple_choice", CHOICES, texts=_texts, encode=encode)
    examples = prepare_examples(recipe, config, context)
    return MultipleChoiceTask(examples.splits, examples.tokenizer, max_length=config.max_length)


def _join(sent2: str, ending: str) -> str:
    return f"{sent2} {ending}" if sent2 else ending


def _texts(source: Source) -> Iterator[str]:
    for row in source.rows:
        yield row["sent1"]
        for ending in row["endings"]:
            yield _join(row["sent2"], ending)

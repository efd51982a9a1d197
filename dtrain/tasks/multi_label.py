"""Any number of labels for a text or a pair of texts.

Each label of a row is one yes-or-no target: binary cross entropy of its own output. The loss per target is therefore that of
transformers' `problem_type="multi_label_classification"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification

from dtrain.config.schema import Config
from dtrain.config.task import MultiLabel
from dtrain.data.label_lists import label_lists
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from dtrain.models.heads import Head
from dtrain.tasks.classification import choose_label_order
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import (
    Meta,
    Recipe,
    all_texts,
    encode_texts,
    label_config,
    map_rows,
    prepare_examples,
    pretrained_labels,
    read_columns,
)
from dtrain.tasks.protocol import Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.tensors import compute_logits, pad_rows

HEAD = Head(
    "multi_label",
    AutoModelForSequenceClassification,
    has_label_names=True,
    problem_type="multi_label_classification",
)


def info(settings: MultiLabel) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_multi_label(config, settings, context),
        head=HEAD,
        example_row={"text": "A cat sleeps."},
        text_columns=("text", "text_pair"),
        format_prediction=lambda names, _row, _columns: ", ".join(names) or "no label",
        pipeline_tag="text-classification",
    )


class MultiLabelTask:
    """Binary cross entropy of every label of a row. Metrics: F1, precision, recall and subset accuracy from scikit-learn."""

    name = "multi_label"
    head = HEAD
    needs_padding = True
    padding = Padding()
    metric_names: Sequence[str] = ("f1_micro", "f1_macro", "precision_micro", "recall_micro", "subset_accuracy")

    def __init__(
        self,
        splits: Mapping[str, Split],
        tokenizer: Any,
        labels: Sequence[str],
        settings: MultiLabel,
        *,
        max_length: int,
    ) -> None:
        """
        Args:
            splits: Rows with `input_ids`, further model inputs, and `label`, a list of indices into `labels`, or None.
            labels: Label names in the order of the model's outputs.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.max_length = max_length
        self.head_config: dict[str, Any] = label_config(labels)
        self._threshold = settings.threshold

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        """Returns inputs and labels (batch, labels) float32: 1 for a label of the row, 0 for others; nan without a list."""
        inputs = {key: rows[key] for key in rows if key in ("input_ids", "token_type_ids")}
        labels = torch.zeros(len(rows["label"]), len(self.labels))
        for row, indices in enumerate(rows["label"]):
            if indices is None:
                labels[row] = math.nan
            else:
                labels[row, indices] = 1.0
        return {**pad_rows(self.tokenizer, inputs, self.padding), "labels": labels}

    def targets(self, batch: Batch) -> Targets:
        count = int((~batch["labels"].isnan()).sum())
        return Targets(float(count), count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return _losses(compute_logits(model, batch), batch["labels"]).sum()

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        """Returns as prediction (batch, labels) 1 for each label whose probability reaches the threshold."""
        logits, labels = compute_logits(module, batch), batch["labels"]
        targets = (~labels.isnan()).sum(dim=1)
        predicted = (logits.sigmoid() >= self._threshold).long()
        return ScoredBatch(_losses(logits, labels).double().sum(dim=1), targets, predicted)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

        pairs = [
            (self._indicators(indices), np.asarray(predicted))
            for indices, predicted in zip(self._references(split), predictions, strict=True)
            if indices is not None
        ]
        if not pairs:
            return {}
        expected, found = (np.stack(side) for side in zip(*pairs, strict=True))
        return {
            "f1_micro": float(f1_score(expected, found, average="micro", zero_division=0.0)),
            "f1_macro": float(f1_score(expected, found, average="macro", zero_division=0.0)),
            "precision_micro": float(precision_score(expected, found, average="micro", zero_division=0.0)),
            "recall_micro": float(recall_score(expected, found, average="micro", zero_division=0.0)),
            "subset_accuracy": float(accuracy_score(expected, found)),
        }

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [
            {
                "prediction": [name for name, chosen in zip(self.labels, predicted, strict=True) if chosen],
                "reference": None if indices is None else [self.labels[index] for index in sorted(indices)],
            }
            for predicted, indices in zip(predictions, self._references(split), strict=True)
        ]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        """Returns the predicted labels with their probabilities; that of the likeliest label if none is predicted."""
        answers: list[Mapping[str, Any]] = []
        for probabilities in compute_logits(module, batch).sigmoid().tolist():
            predicted = [index for index, value in enumerate(probabilities) if value >= self._threshold]
            shown = predicted or [max(range(len(probabilities)), key=probabilities.__getitem__)]
            answers.append(
                {
                    "prediction": [self.labels[index] for index in predicted],
                    **{f"probability of {self.labels[index]}": probabilities[index] for index in shown},
                }
            )
        return answers

    def _references(self, split: str) -> Sequence[Sequence[int] | None]:
        """Returns the labels of each example in data order. None for an example without a list."""
        return read_columns(self.splits[split], "label")["label"]

    def _indicators(self, indices: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        row = np.zeros(len(self.labels), dtype=np.int64)
        row[list(indices)] = 1
        return row


def prepare_multi_label(config: Config, settings: MultiLabel, context: RankContext) -> MultiLabelTask:
    """Collective. Tokenizes each split once per node and fixes the order of the labels."""
    known = pretrained_labels(config, context)

    def describe(sources: Mapping[str, Source], _tokenizer: Any) -> dict[str, list[str]]:
        labels = choose_label_order(sources, known, config.model.name_or_path)
        _refuse_single_label(labels)
        return {"labels": labels}

    def encode(source: Source, tokenizer: Any, meta: Meta) -> Dataset:
        identity = {name: index for index, name in enumerate(meta["labels"])}

        def tokenize(rows: Mapping[str, Any]) -> dict[str, Any]:
            lists = rows.get("label") or [None] * len(rows["text"])
            return {
                **encode_texts(rows, tokenizer, max_length=config.max_length),
                "label": [None if names is None else [identity[name] for name in names] for names in lists],
            }

        return map_rows(source, tokenize, config)

    recipe = Recipe(
        "multi_label",
        label_lists(settings.separator),
        texts=all_texts,
        encode=encode,
        describe=describe,
        options={"labels": None if known is None else list(known)},
    )
    examples = prepare_examples(recipe, config, context)
    labels = [str(name) for name in examples.meta["labels"]]
    return MultiLabelTask(examples.splits, examples.tokenizer, labels, settings, max_length=config.max_length)


def _refuse_single_label(labels: Sequence[str]) -> None:
    """Raises DataError for fewer than two labels: scikit-learn would read the table as one binary label."""
    if len(labels) < 2:
        raise DataError(
            f"the training rows have {len(labels)} different label{'' if len(labels) == 1 else 's'} ({', '.join(labels)}): this "
            "task needs at least two. For one yes-or-no label use task.name=classification, with a label for each row"
        )


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns (batch, labels) binary cross entropies, 0 for a row without a list."""
    has_list = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num().to(logits.dtype), reduction="none")
    return losses.where(has_list, 0.0)

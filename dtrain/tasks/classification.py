"""One label for a sentence or a pair of sentences."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification

from dtrain.config.schema import Config
from dtrain.config.task import Classification, ImageClassification
from dtrain.data.label_names import label_text
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source, check_labels, distinct_labels, label_names
from dtrain.data.tables import LABELED
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.heads import Head
from dtrain.models.host_copy import copy_to
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
from dtrain.tasks.protocol import IGNORED, Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.tensors import compute_logits, count_targets, label_tensor, pad_rows

HEAD = Head(
    "sequence_classification",
    AutoModelForSequenceClassification,
    has_label_names=True,
    problem_type="single_label_classification",
)


def info(settings: Classification) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_classification(config, settings, context),
        head=HEAD,
        example_row={"text": "A cat sleeps."},
        text_columns=("text", "text_pair"),
        pipeline_tag="text-classification",
    )


class ClassificationTask:
    """Cross entropy over the labels. Metrics: accuracy, F1, precision, recall and Matthews from scikit-learn."""

    name = "classification"
    head = HEAD
    needs_padding = True
    padding = Padding()
    metric_names: Sequence[str] = ("accuracy", "f1", "precision", "recall", "matthews_correlation")

    def __init__(
        self,
        splits: Mapping[str, Split],
        tokenizer: Any,
        labels: Sequence[str],
        settings: Classification | ImageClassification,
        *,
        max_length: int,
    ) -> None:
        """
        Args:
            splits: Rows with `input_ids`, further model inputs, and `label`, an index into `labels`.
            tokenizer: None for a subclass whose examples are not texts.
            labels: Label names in the order of the model's outputs.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.max_length = max_length
        self.head_config: dict[str, Any] = label_config(labels)
        self._smoothing = settings.label_smoothing
        self._weights = self._class_weights(settings)

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        inputs = {key: rows[key] for key in rows if key in ("input_ids", "token_type_ids")}
        return {**pad_rows(self.tokenizer, inputs, self.padding), "labels": label_tensor(rows["label"])}

    def targets(self, batch: Batch) -> Targets:
        if self._weights is None:
            return count_targets(batch["labels"])
        labels = batch["labels"][batch["labels"] != IGNORED]
        return Targets(float(self._weights[labels].double().sum()), len(labels))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = compute_logits(model, batch), batch["labels"]
        weights = None if self._weights is None else copy_to(self._weights, logits.device).to(logits)
        return F.cross_entropy(
            logits, labels, weight=weights, ignore_index=IGNORED, label_smoothing=self._smoothing, reduction="sum"
        )

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        logits, labels = compute_logits(module, batch), batch["labels"]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return ScoredBatch(loss.double(), (labels != IGNORED).long(), logits.argmax(dim=-1))

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score, recall_score

        pairs = [
            (label, int(prediction))
            for label, prediction in zip(self._references(split), predictions, strict=True)
            if label is not None
        ]
        if not pairs:
            return {}
        expected, predicted = zip(*pairs, strict=True)
        if len(self.labels) == 2:
            average: dict[str, Any] = {"average": "binary", "pos_label": 1}
        else:
            average = {"average": "macro"}  # over the labels that occur, as in scikit-learn
        with warnings.catch_warnings():
            # Matthews of a single class is 0 by definition. Every rank would print scikit-learn's warning.
            warnings.filterwarnings("ignore", message="A single label was found in", category=UserWarning)
            matthews = float(matthews_corrcoef(expected, predicted))
        return {
            "accuracy": float(accuracy_score(expected, predicted)),
            "f1": float(f1_score(expected, predicted, zero_division=0.0, **average)),
            "precision": float(precision_score(expected, predicted, zero_division=0.0, **average)),
            "recall": float(recall_score(expected, predicted, zero_division=0.0, **average)),
            "matthews_correlation": matthews,
        }

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [
            {"prediction": self.labels[int(prediction)], "reference": None if label is None else self.labels[label]}
            for prediction, label in zip(predictions, self._references(split), strict=True)
        ]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        probabilities = compute_logits(module, batch).softmax(dim=-1)
        best = probabilities.max(dim=-1)
        return [
            {"prediction": self.labels[index], "probability": probability}
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _references(self, split: str) -> Sequence[int | None]:
        """Returns the labels of a split in data order. None for an example without a label."""
        return read_columns(self.splits[split], "label")["label"]

    def _class_weights(self, settings: Classification | ImageClassification) -> torch.Tensor | None:
        if settings.class_weights is None:
            return None
        if settings.class_weights == "balanced" and "train" not in self.splits:
            return None  # there is no training here, and evaluation is unweighted
        if settings.class_weights == "balanced":
            rows = self.splits["train"]
            counts = Counter(self._references("train"))
            return torch.tensor(
                [len(rows) / (len(self.labels) * max(counts[index], 1)) for index in range(len(self.labels))]
            )
        if set(settings.class_weights) != set(self.labels):
            raise ConfigError(
                f"task.class_weights names {sorted(settings.class_weights)}, but the labels are {sorted(self.labels)}: "
                "set one weight for each label."
            )
        return torch.tensor([settings.class_weights[label] for label in self.labels])


def prepare_classification(config: Config, settings: Classification, context: RankContext) -> ClassificationTask:
    """Collective. Tokenizes each split once per node and fixes the order of the labels."""
    if config.data.name == "stsb":
        raise ConfigError("The labels of data.name=stsb are scores from 0 to 5, not classes: set task.name=regression.")
    order = pretrained_labels(config, context)

    def describe(sources: Mapping[str, Source], _tokenizer: Any) -> dict[str, list[str]]:
        return {"labels": choose_label_order(sources, order, config.model.name_or_path)}

    def encode(source: Source, tokenizer: Any, meta: Meta) -> Dataset:
        identity = {name: index for index, name in enumerate(meta["labels"])}

        def tokenize(rows: Mapping[str, Any]) -> dict[str, Any]:
            labels = rows.get("label") or [None] * len(rows["text"])
            return {
                **encode_texts(rows, tokenizer, max_length=config.max_length),
                "label": [None if label is None else identity[label] for label in labels],
            }

        return map_rows(source, tokenize, config)

    recipe = Recipe(
        "classification",
        LABELED,
        texts=all_texts,
        encode=encode,
        describe=describe,
        options={"labels": None if order is None else list(order)},
    )
    examples = prepare_examples(recipe, config, context)
    labels = [str(name) for name in examples.meta["labels"]]
    return ClassificationTask(examples.splits, examples.tokenizer, labels, settings, max_length=config.max_length)


def choose_label_order(sources: Mapping[str, Source], known: tuple[str, ...] | None, name: str | None) -> list[str]:
    """Returns the labels in the order of the model's outputs: the model's own labels if the data has the same.

    Args:
        known: Label names of the pretrained model. None: it has none.
        name: Name of the model, for the message.

    Raises:
        ConfigError: neither the data nor the model has label names.
        DataError: a label is not one of the model's.
    """
    known = _as_written(known, sources)
    if "train" not in sources and known is not None:
        check_labels(sources, names := known)  # an evaluation: the labels are the model's
    elif "train" not in sources and all(source.label_names is None for source in sources.values()):
        raise ConfigError(
            f"No label names found: there is no train split, and model.name_or_path={name} has no id2label in its "
            "config.json. Use a trained classifier, or name a train split in data.splits."
        )
    else:
        names = label_names(sources)
    if known is not None and set(known) == set(names):
        names = known  # so that the model's outputs keep their meaning
    return list(names)


def _as_written(known: tuple[str, ...] | None, sources: Mapping[str, Source]) -> tuple[str, ...] | None:
    """Returns the model's labels as the data writes them: a model may call a class 1.0 that is now read as 1."""
    if known is None or all(source.label_names is not None for source in sources.values()):
        return known
    names = tuple(label_text(name, "the model") or name for name in known)
    used = {
        label
        for source in sources.values()
        if "label" in source.rows.column_names
        for label in distinct_labels(source.rows)
    }
    return names if len(set(names)) == len(names) and used - set(known) and used <= set(names) else known

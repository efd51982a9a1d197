"""One number for a sentence or a pair of sentences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification

from dtrain.config.schema import Config
from dtrain.config.task import Regression
from dtrain.data.glue import TASKS
from dtrain.data.scores import SCORED
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.heads import Head
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, Recipe, all_texts, encode_texts, map_rows, prepare_examples, read_columns
from dtrain.tasks.protocol import Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.tensors import full_precision, pad_rows

HEAD = Head("regression", AutoModelForSequenceClassification, problem_type="regression")


def info(settings: Regression) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_regression(config, context),
        head=HEAD,
        example_row={"text": "A cat sleeps."},
        text_columns=("text", "text_pair"),
        pipeline_tag="text-classification",
    )


class RegressionTask:
    """Squared error of each number, so that the loss per target is the mean squared error. Metrics: Pearson and Spearman."""

    name = "regression"
    head = HEAD
    needs_padding = True
    padding = Padding()
    metric_names: Sequence[str] = ("pearson", "spearman")

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, *, max_length: int) -> None:
        """
        Args:
            splits: Rows with `input_ids`, further model inputs, and `label`, a number or None.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {"num_labels": 1}

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        inputs = {key: rows[key] for key in rows if key in ("input_ids", "token_type_ids")}
        labels = [math.nan if label is None else label for label in rows["label"]]  # nan: no target
        return {**pad_rows(self.tokenizer, inputs, self.padding), "labels": torch.tensor(labels, dtype=torch.float64)}

    def targets(self, batch: Batch) -> Targets:
        count = int((~batch["labels"].isnan()).sum())
        return Targets(float(count), count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return _squared_errors(_values(model, batch), batch["labels"]).sum()

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        values, labels = _values(module, batch), batch["labels"]
        return ScoredBatch(_squared_errors(values, labels).double(), (~labels.isnan()).long(), values.double())

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        labels = read_columns(self.splits[split], "label")["label"]
        pairs = [(label, value) for label, value in zip(labels, predictions, strict=True) if label is not None]
        return correlations(*zip(*pairs, strict=True)) if pairs else {}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        labels = read_columns(self.splits[split], "label")["label"]
        return [{"prediction": value, "reference": label} for value, label in zip(predictions, labels, strict=True)]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        return [{"prediction": value} for value in _values(module, batch).tolist()]


def correlations(expected: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Returns scipy's Pearson and Spearman: nan if a side is constant, has a single value or a value that is not finite."""
    from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr

    if len(expected) < 2 or not all(map(math.isfinite, (*expected, *predicted))):
        return {"pearson": math.nan, "spearman": math.nan}  # scipy raises an error, or warns and returns the same
    with warnings.catch_warnings():
        # nan is clear enough, and predictions are often nearly constant at the beginning of training.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        return {
            "pearson": float(pearsonr(expected, predicted)[0]),
            "spearman": float(spearmanr(expected, predicted)[0]),
        }


def prepare_regression(config: Config, context: RankContext) -> RegressionTask:
    """Collective. Tokenizes each split once per node."""
    glue = TASKS.get(config.data.name or "")
    if glue is not None and glue.labels:
        raise ConfigError(
            f"The labels of data.name={config.data.name} are {', '.join(glue.labels.values())}, not numbers: set "
            "task.name=classification."
        )

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        def tokenize(rows: Mapping[str, Any]) -> dict[str, Any]:
            labels = rows.get("label") or [None] * len(rows["text"])
            return {**encode_texts(rows, tokenizer, max_length=config.max_length), "label": labels}

        return map_rows(source, tokenize, config)

    recipe = Recipe("regression", SCORED, texts=all_texts, encode=encode)
    examples = prepare_examples(recipe, config, context)
    return RegressionTask(examples.splits, examples.tokenizer, max_length=config.max_length)


def _values(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the model's outputs, (batch,)."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # Not squeeze(), which makes a scalar of a batch of one.
    return full_precision(model(**inputs).logits)[:, 0]


def _squared_errors(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns (batch,) squared errors, 0 for an example without a label."""
    differences = torch.where(labels.isnan(), 0.0, values - labels.to(values.dtype))
    return differences.square()

"""One number for a sentence or a pair of sentences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Head
from dtrain.data.glue import TASKS
from dtrain.data.scores import SCORED
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.tasks.prepare import Meta, Recipe, all_texts, columns_of, encode_texts, map_rows, prepare_examples
from dtrain.tasks.protocol import Batch, Scored, Split, Targets
from dtrain.tasks.tensors import full_precision, padded


class RegressionTask:
    """Squared error of each number, so that the loss is their mean; Pearson and Spearman correlation by scipy."""

    name = "regression"
    head: Head = "regression"
    needs_padding = True
    metric_names: Sequence[str] = ("pearson", "spearman")

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, *, max_length: int) -> None:
        """
        Args:
            splits: rows with `input_ids`, further model inputs, and `label`, a number or None.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {"num_labels": 1}

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        inputs = {key: rows[key] for key in rows if key in ("input_ids", "token_type_ids")}
        labels = [math.nan if label is None else label for label in rows["label"]]  # nan: no target
        return {**padded(self.tokenizer, inputs), "labels": torch.tensor(labels, dtype=torch.float64)}

    def targets(self, batch: Batch) -> Targets:
        count = int((~batch["labels"].isnan()).sum())
        return Targets(float(count), count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return _squared_errors(_values(model, batch), batch["labels"]).sum()

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        values, labels = _values(module, batch), batch["labels"]
        return Scored(_squared_errors(values, labels).double(), (~labels.isnan()).long(), values.double())

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        truth = columns_of(self.splits[split], "label")["label"]
        judged = [(label, found) for label, found in zip(truth, predictions, strict=True) if label is not None]
        return correlations(*zip(*judged, strict=True)) if judged else {}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        truth = columns_of(self.splits[split], "label")["label"]
        return [{"prediction": found, "reference": label} for found, label in zip(predictions, truth, strict=True)]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        return [{"prediction": value} for value in _values(module, batch).tolist()]


def correlations(truth: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman, as scipy has them: nan where a side is constant, holds one value only, or one not finite."""
    from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr

    if len(truth) < 2 or not all(map(math.isfinite, (*truth, *found))):
        return {"pearson": math.nan, "spearman": math.nan}  # scipy raises, or warns on its way to the same
    with warnings.catch_warnings():
        # nan says it already, and at the first step of a training the predictions often are nearly constant.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        return {"pearson": float(pearsonr(truth, found)[0]), "spearman": float(spearmanr(truth, found)[0])}


def prepare_regression(config: Config, context: RankContext) -> RegressionTask:
    """Collective. Tokenises each split once per node."""
    glue = TASKS.get(config.data.name or "")
    if glue is not None and glue.labels:
        raise ConfigError(
            f"data.name={config.data.name} has the labels {', '.join(glue.labels.values())}, no numbers: set "
            "task.name=classification."
        )

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        def tokenise(rows: Mapping[str, Any]) -> dict[str, Any]:
            labels = rows.get("label") or [None] * len(rows["text"])
            return {**encode_texts(rows, tokenizer, max_length=config.max_length), "label": labels}

        return map_rows(source, tokenise, config)

    recipe = Recipe("regression", SCORED, texts=all_texts, encode=encode)
    examples = prepare_examples(recipe, config, context)
    return RegressionTask(examples.splits, examples.tokenizer, max_length=config.max_length)


def _values(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(batch,) The column by number: a squeeze would make a scalar of a batch of one."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return full_precision(model(**inputs).logits)[:, 0]


def _squared_errors(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(batch,) 0 where there is no label."""
    differences = torch.where(labels.isnan(), 0.0, values - labels.to(values.dtype))
    return differences.square()

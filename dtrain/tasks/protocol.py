"""The interface of a task: splits, batches, a loss, predictions and metrics.

A new task is one file in this folder, one option class in config/task.py and one `case` in build.py.
docs/new-task.md explains it step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from dtrain.data.lengths import RowLengths
from dtrain.data.seeding import DataPosition
from dtrain.models.heads import Head

Batch = dict[str, torch.Tensor]
"""The model's inputs and the labels. The first dimension of every tensor is the example, or a window of an example."""

IGNORED = -100
"""The label of a position that is not a target, such as padding."""


@dataclass(frozen=True)
class Targets:
    """Weight and number of the targets in a batch, known from its labels before any forward pass.

    Attributes:
        weight: Summed weight of the batch's targets. The summed loss of a step is divided by the summed weight.
        count: Number of targets.
    """

    weight: float
    count: int


@dataclass(frozen=True)
class Padding:
    """Where padding goes, and how long rows become.

    Attributes:
        side: The right, so that a row's tokens have the same positions in every batch. The left for models that read the
            last position of a row.
        length: Length of every batch. None: that of the batch's longest row.
        target_length: Length of the targets of a decoder in every batch. None: that of the batch's longest target.
    """

    side: Literal["right", "left"] = "right"
    length: int | None = None
    target_length: int | None = None


@dataclass(frozen=True)
class ScoredBatch:
    """Results of an evaluation batch for each example, without class weights or label smoothing.

    Attributes:
        loss: (batch,) float64, summed over the example's targets, in nats.
        targets: (batch,) int64, number of targets.
        prediction: (batch, ...) the value that the metrics judge, e.g. the predicted label. None for a task that has only
            a loss.
    """

    loss: torch.Tensor
    targets: torch.Tensor
    prediction: torch.Tensor | None


class Split(Protocol):
    """Examples by index, each a mapping of columns. A `datasets.Dataset` is a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> Mapping[str, Sequence[Any]]:
        """Returns the columns of these rows, in this order."""
        ...


class Task(Protocol):
    """Splits, batches, loss and metrics of one kind of learning. No method is a collective."""

    name: str
    head: Head
    """The output layers that the task needs on top of a model."""
    head_config: dict[str, Any]
    """Values that the task sets in the model's config, such as the number of labels and their names."""
    needs_padding: bool
    """Whether batches hold examples of different lengths, so that the tokenizer needs a pad token."""
    max_length: int
    """Maximum number of tokens in one sequence of model inputs."""
    tokenizer: Any
    """A Hugging Face tokenizer. None for a task without text."""
    metric_names: Sequence[str]
    """Names that `metrics` returns, without `loss`. A misspelled name in the config is refused before training starts."""
    splits: Mapping[str, Split]
    """Encoded splits: train, validation, and further ones to evaluate."""

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        """Converts columns of some examples to padded tensors on the host.

        Pure. Random numbers are drawn from the position only, with `dtrain.data.seeding.derive_seed` (law 5).
        """
        ...

    def targets(self, batch: Batch) -> Targets:
        """Returns the summed weight and the number of the targets, from the labels."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Computes the training loss from logits, with class weights and label smoothing.

        Returns:
            () float32 (float64 for a float64 model): the sum over the batch's targets, in nats. Never a mean: `targets`
            gives the weight of this sum.
        """
        ...

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        """Computes the plain loss and the prediction of each example.

        Args:
            lock_step: Every forward pass is a collective (ZeRO 3), so that all ranks must run the same number of them,
                also while they generate text.
        """
        ...

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics of a split besides `loss`. Called once, on gathered predictions in data order.

        Args:
            loss: Per target, in nats.
        """
        ...

    def records(self, split: str, predictions: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """Returns a mapping for each example in data order, with `prediction` and `reference`. Called once, on rank 0.

        They become the lines of predictions/<split>.jsonl.
        """
        ...


@runtime_checkable
class PadsRows(Task, Protocol):
    """An optional part of a task: it pads rows as told, so that a model that reads padding can be trained (trial.py)."""

    padding: Padding


@runtime_checkable
class HasRowLengths(Protocol):
    """An optional part of a task: how many tokens its rows have, where that is not the number of `input_ids`."""

    def row_lengths(self, split: str) -> RowLengths | None:
        """Returns the lengths of a split's rows as its batches have them; None if they are not known."""
        ...


@runtime_checkable
class HasAnswers(Protocol):
    """An optional part of a task: an answer to `predict.text` with more than the prediction of a record."""

    def answers(self, module: nn.Module, batch: Batch) -> Sequence[Mapping[str, Any]]:
        """Returns a mapping for each example: `prediction`, then further values by name, e.g. its `probability`.

        Collective if the model is sharded (ZeRO 3): every rank calls it with the same batch.
        """
        ...

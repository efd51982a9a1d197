"""What makes one task different from another, and nothing else.

A new task is one file beside this one, one option class in task_settings.py and one `case` in build.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dtrain.config.task import Head
from dtrain.data.seeding import DataPosition

Batch = dict[str, torch.Tensor]
"""What the model takes, plus labels; every tensor's first dimension is the example, or a window of one."""

IGNORED = -100
"""A label that is not a target (padding)."""


@dataclass(frozen=True)
class Targets:
    """What a batch contributes to a step, known from its labels alone, before any forward pass.

    weight: summed weight of its targets, what the step's summed loss is divided by. count: their number.
    """

    weight: float
    count: int


@dataclass(frozen=True)
class Scored:
    """Plain per-example results of an evaluation batch, unweighted, unsmoothed; first dimension: example.

    loss: (batch,) float64, summed over the example's targets, in nats.
    targets: (batch,) int64, number of targets.
    prediction: (batch, ...) what is judged, e.g. the predicted label; None where loss is all there is.
    """

    loss: torch.Tensor
    targets: torch.Tensor
    prediction: torch.Tensor | None


class Split(Protocol):
    """Examples by index, each a mapping of columns (a `datasets.Dataset` is one)."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> Mapping[str, Sequence[Any]]:
        """The columns of those rows, in that order."""
        ...


class Task(Protocol):
    """Splits, batches, loss and metrics of one kind of learning. Nothing here is a collective."""

    name: str
    head: Head
    """Which AutoModel class carries it."""
    head_config: dict[str, Any]
    """What the head's config must say: number of labels and their names."""
    needs_padding: bool
    """Batches hold examples of different lengths, so that the tokenizer needs a pad token."""
    max_length: int
    """Longest sequence of tokens that the model is given."""
    tokenizer: Any
    """A Hugging Face tokenizer."""
    metric_names: Sequence[str]
    """What `metrics` gives, `loss` apart: known before the first evaluation, so that a mistyped one is refused at once."""
    splits: Mapping[str, Split]
    """Tokenised: train, validation, and further ones to evaluate."""

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        """Columns of some examples into padded tensors on the host.

        Pure: what it draws at random, it draws from the place (law 5), with `dtrain.data.seeding.derive_seed`.
        """
        ...

    def targets(self, batch: Batch) -> Targets:
        """Summed weight and number of targets, from the labels."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The training loss, from logits, with class weights and smoothing: () in float32 (float64 for a float64 model).

        Summed over the batch's targets, in nats, never a mean; `targets` gives the weight of that sum.
        """
        ...

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        """The plain loss and the prediction of each example.

        lock_step: every forward is a collective (ZeRO 3), so that generation has to run in step with the other ranks.
        """
        ...

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        """The metrics of a split beside `loss` (per target, in nats), computed once, on gathered data in data order."""
        ...

    def records(self, split: str, predictions: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """One mapping per example in data order with `prediction` and `reference`, for predictions/<split>.jsonl."""
        ...


@runtime_checkable
class Answers(Protocol):
    """What a task may have besides: an answer to `predict.text` that tells more than the prediction of a record."""

    def answers(self, module: nn.Module, batch: Batch) -> Sequence[Mapping[str, Any]]:
        """One mapping per example: `prediction`, then by name what tells more of it, e.g. its `probability`.

        Collective where the model is sharded (ZeRO 3): every rank asks for the same batch.
        """
        ...

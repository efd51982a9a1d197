"""Small rules that tasks share: rows to padded tensors, targets from labels, logits in full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtrain.tasks.protocol import IGNORED, Batch, Targets


def padded(tokenizer: Any, columns: Mapping[str, Sequence[Any]], *, side: str | None = None) -> Batch:
    """Columns of token lists as (rows, longest) tensors, with `attention_mask`.

    side: where the padding goes; None: where the tokenizer puts it.
    """
    # The tokenizer advises calling it once for text and padding; here the text was tokenised long before.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return dict(tokenizer.pad(columns, padding=True, padding_side=side, return_tensors="pt"))


def label_tensor(labels: Sequence[int | None]) -> torch.Tensor:
    """(rows,) int64, IGNORED for a row without a label."""
    return torch.tensor([IGNORED if label is None else label for label in labels], dtype=torch.int64)


def counted(labels: torch.Tensor) -> Targets:
    """Every label but IGNORED is a target of weight 1."""
    count = int((labels != IGNORED).sum())
    return Targets(float(count), count)


def logits_of(model: nn.Module, batch: Batch, **options: Any) -> torch.Tensor:
    """What the model gives for all of the batch but its labels, in full precision."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return full_precision(model(**inputs, **options).logits)


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, where losses are summed (law 4); float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def perplexity(loss: float) -> float:
    """Of a loss in nats per target; infinite where no float holds it."""
    return math.inf if loss > 700 else math.exp(loss)

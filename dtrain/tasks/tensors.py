"""Small functions that tasks share: padded tensors from rows, targets from labels, logits in full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtrain.tasks.protocol import IGNORED, Batch, Padding, Targets


def pad_rows(tokenizer: Any, columns: Mapping[str, Sequence[Any]], padding: Padding) -> Batch:
    """Returns columns of token lists as (rows, length) tensors, with `attention_mask`.

    The tokenizer's own `padding_side` is meant for generating. Most models number positions from the first column of a
    batch, so with padding on the left a row's answer would depend on the rows beside it.
    """
    # A fast tokenizer warns that one call for text and padding is faster. Here the text was encoded long before.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return dict(
        tokenizer.pad(
            columns,
            padding=True if padding.length is None else "max_length",
            max_length=padding.length,
            padding_side=padding.side,
            return_attention_mask=True,
            return_tensors="pt",
        )
    )


def label_tensor(labels: Sequence[int | None]) -> torch.Tensor:
    """Returns (rows,) int64 labels, IGNORED for a row without a label."""
    return torch.tensor([IGNORED if label is None else label for label in labels], dtype=torch.int64)


def count_targets(labels: torch.Tensor) -> Targets:
    """Returns the targets of labels of which each one but IGNORED has weight 1."""
    count = int((labels != IGNORED).sum())
    return Targets(float(count), count)


def compute_logits(model: nn.Module, batch: Batch, **options: Any) -> torch.Tensor:
    """Returns the model's logits for everything in the batch but its labels, in full precision."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return full_precision(model(**inputs, **options).logits)


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Returns logits in float32, in which losses are summed (law 4). float64 is kept."""
    return logits if logits.dtype == torch.float64 else logits.float()


def perplexity(loss: float) -> float:
    """Returns the perplexity of a loss in nats per target, infinity if it exceeds a float."""
    return math.inf if loss > 700 else math.exp(loss)

"""Small functions that tasks share: padded tensors from rows, targets from labels, logits in full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dtrain.data.columns import Array, ListColumn
from dtrain.models.host_copy import host_copy
from dtrain.tasks.protocol import IGNORED, Batch, Padding, Targets


def pad_rows(tokenizer: Any, columns: Mapping[str, Sequence[Any]], padding: Padding) -> Batch:
    """Returns columns of token lists as (rows, length) tensors, with `attention_mask`.

    The tokenizer's own `padding_side` is meant for generating. Most models number positions from the first column of a
    batch, so with padding on the left a row's answer would depend on the rows beside it.
    """
    batch = _pad_arrays(tokenizer, columns, padding)
    return batch if batch is not None else _pad_by_tokenizer(tokenizer, columns, padding)


def _pad_by_tokenizer(tokenizer: Any, columns: Mapping[str, Sequence[Any]], padding: Padding) -> Batch:
    # A fast tokenizer warns that one call for text and padding is faster. Here the text was encoded long before.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return dict(
        tokenizer.pad(
            {name: list(column) for name, column in columns.items()},
            padding=True if padding.length is None else "max_length",
            max_length=padding.length,
            padding_side=padding.side,
            return_attention_mask=True,
            return_tensors="pt",
        )
    )


def _pad_arrays(tokenizer: Any, columns: Mapping[str, Sequence[Any]], padding: Padding) -> Batch | None:
    """Returns what the tokenizer would, from a split's own columns; None where the tokenizer has to do it, or to refuse."""
    kind, ids = type(tokenizer), tokenizer.model_input_names[0]
    if kind.pad is not PreTrainedTokenizerBase.pad or kind._pad is not PreTrainedTokenizerBase._pad:
        return None
    column = columns.get(ids)
    if not isinstance(column, ListColumn) or not all(isinstance(part, np.ndarray) for part in column.parts):
        return None
    lengths = [len(part) for part in column.parts]
    longest = max(lengths, default=0)
    length = longest if padding.length is None else padding.length
    pad_token = tokenizer.pad_token_id
    if not longest or longest > length or pad_token is None or pad_token < 0:
        return None
    fills = {
        ids: pad_token,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
        "special_tokens_mask": 1,
    }
    batch: Batch = {}
    for name, values in columns.items():
        if name not in fills or not isinstance(values, ListColumn):
            return None
        if (
            not all(isinstance(part, np.ndarray) for part in values.parts)
            or [len(part) for part in values.parts] != lengths
        ):
            return None
        batch[name] = pad_arrays(values.parts, length, fill=fills[name], side=padding.side)
    if "attention_mask" not in batch:
        steps, used = np.arange(length), np.array(lengths)[:, None]
        mask = steps < used if padding.side == "right" else steps >= length - used
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    return batch


def pad_arrays(rows: Sequence[Array], length: int, *, fill: int, side: str = "right") -> torch.Tensor:
    """Returns (rows, length) int64, with `fill` behind the rows, or before them for the left side."""
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        if side == "right":
            target[: len(row)] = row
        else:
            target[length - len(row) :] = row
    return torch.from_numpy(padded)


def label_tensor(labels: Sequence[int | None]) -> torch.Tensor:
    """Returns (rows,) int64 labels, IGNORED for a row without a label."""
    return torch.tensor([IGNORED if label is None else label for label in labels], dtype=torch.int64)


def count_targets(labels: torch.Tensor) -> Targets:
    """Returns the targets of labels of which each one but IGNORED has weight 1."""
    known = labels if labels.device.type == "cpu" else host_copy(labels)
    if known is not None:  # numpy is three times as fast as torch on the few labels of a batch
        count = int(np.count_nonzero(known.numpy() != IGNORED))
    else:
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

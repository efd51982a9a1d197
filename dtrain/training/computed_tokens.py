"""How many tokens the layers of a model compute in a batch: less than the batch has, where padding is dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dtrain.data.order import StepPlan
from dtrain.models.unpadding_layout import layout_of_mask
from dtrain.tasks.protocol import Task
from dtrain.training.build import PreparedModel
from dtrain.training.frozen_rows import collated


def token_counts(tensors: Mapping[str, torch.Tensor], *, has_decoder: bool) -> tuple[int, int]:
    """Returns the tokens without and with padding of a collated batch on the host; (0, 0) without `input_ids`.

    Args:
        has_decoder: whether `labels` are the inputs of a decoder, which count as well.
    """
    ids = tensors.get("input_ids")
    if ids is None:
        return 0, 0
    mask = tensors.get("attention_mask", tensors.get("document_ids"))
    padded = ids.numel()
    tokens = padded if mask is None or mask.shape != ids.shape else _nonzero(mask)
    labels = tensors.get("labels") if has_decoder else None
    if labels is not None:
        padded += labels.numel()
        tokens += _nonzero(labels >= 0)
    return tokens, padded


def computed_tokens(prepared: PreparedModel, tensors: Mapping[str, torch.Tensor], *, tokens: int, padded: int) -> int:
    """Returns the tokens that the model's layers compute of a batch in its present state; 0 if none of them runs.

    Args:
        tokens: of the batch, without padding.
        padded: with padding.
    """
    if prepared.frozen_cache.replaces_layers:
        return 0
    hooks, mask = prepared.unpadding.hooks, tensors.get("attention_mask")
    if hooks is None or not hooks.is_on or mask is None or mask.dim() < 2 or tokens == padded:
        return padded
    rows = mask.flatten(0, -2)
    # Right padding of encoders, the usual case, is known by the first column. For the rest the rule itself is asked.
    is_usual = not hooks.is_causal and rows.numpy()[:, 0].all()
    return tokens if is_usual or layout_of_mask(rows, is_causal=hooks.is_causal) is not None else padded


def describe_padding(prepared: PreparedModel, task: Task, plan: StepPlan, steps: Sequence[int]) -> str | None:
    """Returns the padding of the batches of some steps, and whether it is computed; None for a task without tokens."""
    total = np.zeros(3, dtype=np.int64)
    for step in steps:
        for indices in plan.micro_batches(step):
            batch = collated(task, "train", indices, epoch=plan.epoch_of(step))
            tokens, padded = token_counts(batch, has_decoder=task.head.has_decoder)
            total += tokens, padded, computed_tokens(prepared, batch, tokens=tokens, padded=padded)
    tokens, padded, computed = total.tolist()
    if not padded:
        return None
    order = "sorted by length within each step" if plan.sort_by_length and plan.lengths is not None else "unsorted"
    of_batches = f"{1 - tokens / padded:.0%} of the tokens in the batches ({order})"
    if not computed:
        return f"{of_batches}; no layer computes a token (freeze.cache)"
    return f"{of_batches}, {max(1 - tokens / computed, 0):.0%} of the computed tokens"


def _nonzero(tensor: torch.Tensor) -> int:
    # Three times as fast as torch's own on the few hundred values of a batch.
    return int(np.count_nonzero(tensor.numpy()))

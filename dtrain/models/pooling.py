"""Pools the states of an example's tokens, or of an image's positions, into one vector."""

from __future__ import annotations

from typing import Literal

import torch


def pool(states: torch.Tensor, mask: torch.Tensor | None, method: Literal["cls", "mean", "last"]) -> torch.Tensor:
    """Returns the first token's state, the mean, or the last token's state. Padding on either side is ignored.

    Args:
        states: (batch, length, width), or (batch, width, height, width) for images, which are always averaged.
        mask: (batch, length), 1 for a token and 0 for padding; None: all are tokens.
        method: how to pool.
    Returns:
        (batch, width).
    """
    if states.dim() == 4:
        return states.mean(dim=(2, 3))
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    match method:
        case "mean":
            weights = mask.to(states.dtype)[:, :, None]
            return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        case "cls":
            position = (mask != 0).int().argmax(dim=1)  # argmax returns the first of equal values
        case "last":
            position = mask.shape[1] - 1 - (mask != 0).int().flip(1).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), position]

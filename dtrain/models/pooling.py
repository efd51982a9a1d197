"""One vector for a whole example, from the states of its tokens or of the places of an image."""

from __future__ import annotations

from typing import Literal

import torch


def pool(states: torch.Tensor, mask: torch.Tensor | None, how: Literal["cls", "mean", "last"]) -> torch.Tensor:
    """The first token's state, the mean, or the last token's; padding, on whichever side, does not count.

    Args:
        states: (batch, length, width), or (batch, width, height, width) of an image, whose mean it is.
        mask: (batch, length), 1 for a token and 0 for padding; None: all are tokens.

    Returns:
        (batch, width).
    """
    if states.dim() == 4:
        return states.mean(dim=(2, 3))
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    match how:
        case "mean":
            weights = mask.to(states.dtype)[:, :, None]
            return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        case "cls":
            place = (mask != 0).int().argmax(dim=1)  # the first of the largest
        case "last":
            place = mask.shape[1] - 1 - (mask != 0).int().flip(1).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), place]

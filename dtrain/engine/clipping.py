"""The gradient's norm, and clipping to it, on gradients that this rank holds completely."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

CLEARLY_BELOW = 0.999
"""Share of the limit below which torch's clipping would multiply every gradient by exactly 1."""

TORCH_EPS = 1e-6
"""What torch's clipping adds to the norm."""


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Clips gradients to a global L2 norm, in place; returns the norm before. The same bits as torch's clip_grad_norm_.

    Most steps of a fine-tuning need no clipping. torch multiplies by 1 then, which reads and writes every gradient.

    Args:
        limit: maximum norm; None to measure only.
    """
    having, total = _measure(parameters)
    norm = float(total)
    if limit is not None and not norm + TORCH_EPS < CLEARLY_BELOW * limit:  # also where it is not a number
        nn.utils.clip_grads_with_norm_(having, limit, total)
    return norm


def clip_on_device(parameters: Iterable[nn.Parameter], limit: float | None) -> torch.Tensor:
    """Clips as `clip` does, to the same bits, without fetching the norm; returns it as a () tensor.

    Args:
        limit: maximum norm; None to measure only.
    """
    having, total = _measure(parameters)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(having, limit, total)
    return total


def _measure(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], torch.Tensor]:
    """Returns the parameters that have a gradient, and the norm of all; on the host if there are none."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    return having, nn.utils.get_total_norm([parameter.grad for parameter in having if parameter.grad is not None])

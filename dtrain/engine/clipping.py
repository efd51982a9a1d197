"""The gradient's norm, and clipping to it, on gradients that this rank holds completely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

CLEARLY_BELOW = 0.999
"""Share of the limit below which torch's clipping would multiply every gradient by exactly 1."""

TORCH_EPS = 1e-6
"""What torch's clipping adds to the norm."""

LARGE = 2**16
"""Numbers of a gradient above which torch's norm on the CPU is no longer exact."""

ROW = 2**12
"""Numbers that are summed in one piece there."""


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Clips gradients to a global L2 norm, in place; returns the norm before.

    Most steps of a fine-tuning need no clipping. torch multiplies by 1 then, which reads and writes every gradient.

    Args:
        limit: maximum norm; None to measure only.
    """
    having, total = _measure(parameters)
    norm = float(total)
    if limit is not None and not is_clearly_below(norm, limit):
        nn.utils.clip_grads_with_norm_(having, limit, total)
    return norm


def is_clearly_below(norm: float, limit: float) -> bool:
    """Returns whether clipping would multiply every gradient by exactly 1; False for a norm that is not a number."""
    return norm + TORCH_EPS < CLEARLY_BELOW * limit


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
    return having, total_norm([parameter.grad for parameter in having if parameter.grad is not None])


@torch.no_grad()
def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the L2 norm of all gradients together, a tensor without dimensions.

    The same bits as `torch.nn.utils.get_total_norm`, except for large gradients on the CPU. There torch adds up the squares of a
    tensor one after another in float32: the norm of 23 million numbers (an embedding) is wrong by 1e-3, and all the ranks
    that hold a part of it get another one. Rows of 4,096 numbers, and the norm of their norms, are exact to 1e-7 in the
    same time (torch 2.13).
    """
    if not all(gradient.device.type == "cpu" and gradient.layout == torch.strided for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    small = [gradient for gradient in gradients if gradient.numel() <= LARGE]
    norms = list(torch._foreach_norm(small)) if small else []
    norms += [_norm_of_large(gradient) for gradient in gradients if gradient.numel() > LARGE]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)


def _norm_of_large(gradient: torch.Tensor) -> torch.Tensor:
    numbers = gradient.reshape(-1)
    whole = len(numbers) // ROW * ROW
    norms = torch.linalg.vector_norm(numbers[:whole].view(-1, ROW), dim=1)
    rest = torch.linalg.vector_norm(numbers[whole:])
    total: torch.Tensor = torch.linalg.vector_norm(torch.cat([norms, rest[None]]), dtype=torch.float64)
    return total.to(gradient.dtype)

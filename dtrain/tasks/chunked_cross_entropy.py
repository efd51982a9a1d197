"""Cross entropy over a vocabulary without keeping its logits, for training (target_loss.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dtrain.models.fast_linear import fast_linear, fast_product
from dtrain.tasks.tensors import full_precision

PART_OF_PRODUCT = 2**20
"""Numbers of a matrix product that are computed before they are added: 4 MiB in float32."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Linear layer and cross entropy over chunks of rows. Forward computes the gradients, so that no logits are kept.

    The idea is that of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989, section 3.2). The multiplications are as many as
    without chunks, because the gradient of a sum of losses needs only one factor from backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        label_smoothing: float,
        chunk: int,
        is_fast: bool,
    ) -> torch.Tensor:
        linear, multiply = (fast_linear, fast_product) if is_fast else (F.linear, torch.mm)
        device = rows.device.type
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        exact = torch.promote_types(weight.dtype, torch.float32)
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # backward multiplies by the loss scale of fp16, without which small gradients would become 0.
        rows_type = exact if rows.dtype == torch.float16 else rows.dtype
        grad_rows = torch.empty_like(rows, dtype=rows_type) if needs_rows else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if needs_bias and bias is not None else None
        total = torch.zeros((), dtype=exact, device=rows.device)
        with torch.autocast(device, enabled=False):
            factor, offset = weight.to(lower), None if bias is None else bias.to(lower)
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk].to(lower)
                logits = full_precision(linear(part, factor, offset)).requires_grad_()
                with torch.enable_grad():
                    loss = F.cross_entropy(
                        logits, labels[start : start + chunk], label_smoothing=label_smoothing, reduction="sum"
                    )
                grad = torch.autograd.grad(loss, logits)[0].to(lower)
                total += loss.detach()
                if grad_rows is not None:
                    grad_rows[start : start + chunk] = multiply(grad, factor)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), part, multiply)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0, dtype=exact)
        ctx.gradients = (grad_rows, grad_weight, grad_bias)
        ctx.types = (rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (scale,) = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None  # a second backward pass must fail
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.types, strict=True)
        ]
        return *scaled, None, None, None, None


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, multiply: Callable[..., torch.Tensor]
) -> None:
    """Adds a matrix product in place."""
    if multiply is not torch.mm:  # in parts that stay in the processor's cache until they are added
        size = max(1, PART_OF_PRODUCT // right.shape[1])
        for start in range(0, len(total), size):
            total[start : start + size] += multiply(left[start : start + size], right)
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right

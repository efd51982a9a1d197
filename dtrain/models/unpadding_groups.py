"""Attention inside the sequences of a packed row by a few calls of scaled_dot_product_attention, each for like lengths.

A call's padding exists in attention only, and never reaches a token: a mask hides it, or, in a decoder, it comes after every
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dtrain.models.unpadding_calls import Call
from dtrain.models.unpadding_layout import PackedLayout


def attend_by_groups(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: PackedLayout,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Returns attention inside each sequence, (tokens, heads, width). For the arguments see unpadding_kernels.attend."""
    plan = layout.calls
    shared = states[0].shape[1] != states[1].shape[1]
    parts: Sequence[torch.Tensor] = states
    if plan.source is not None:
        parts = [_Spread.apply(part, plan.source, plan.target) for part in states]  # type: ignore[no-untyped-call]
    sizes = [call.sequences * call.length for call in plan.calls]
    results = []
    for call, pieces in zip(plan.calls, zip(*(torch.split(part, sizes) for part in parts), strict=True), strict=True):
        # (sequences, heads, length, width)
        q, k, v = (piece.unflatten(0, (call.sequences, call.length)).transpose(1, 2) for piece in pieces)
        mask = _mask(call, window, q.device, is_causal=layout.is_causal)
        result = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=layout.is_causal and mask is None and call.length > 1,
            enable_gqa=shared,
        )
        results.append(result.transpose(1, 2).flatten(0, 1))
    attended = results[0] if len(results) == 1 else torch.cat(results)
    if plan.source is None:
        return attended
    collected: torch.Tensor = _Collect.apply(attended, plan.source, plan.target)  # type: ignore[no-untyped-call]
    return collected


def _mask(call: Call, window: int | None, device: torch.device, *, is_causal: bool) -> torch.Tensor | None:
    """Returns what the tokens of a call see; None if `is_causal` says it, or all see all."""
    is_token = None if is_causal else call.is_token
    if window is None or call.length <= window:
        return is_token
    near = torch.ones(call.length, call.length, dtype=torch.bool, device=device)
    near = near.tril(0 if is_causal else window - 1).triu(1 - window)
    if is_token is None:
        return near
    # Padding far from every token sees itself: the softmax of nothing is nan, and its gradient reaches the tokens.
    return near & is_token | torch.eye(call.length, dtype=torch.bool, device=device)


class _Spread(torch.autograd.Function):
    """Takes (tokens, ...) to the positions of all calls. Backward takes the gradients of tokens only, and adds none up."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(target)
        return packed.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (target,) = ctx.saved_tensors
        return gradient.index_select(0, target), None, None


class _Collect(torch.autograd.Function):
    """Takes the positions of all calls to (tokens, ...). What padding computed is dropped, and its gradient is 0."""

    @staticmethod
    def forward(ctx: Any, attended: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(target)
        ctx.positions = len(source)
        return attended.index_select(0, target)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (target,) = ctx.saved_tensors
        spread = gradient.new_zeros(ctx.positions, *gradient.shape[1:])
        return spread.index_copy_(0, target, gradient), None, None

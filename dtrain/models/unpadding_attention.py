"""Attention over a packed row: each sequence sees itself only.

The layout comes as a keyword argument of the call, from the hooks (unpadding_hooks.py) through the layers. It is not kept
anywhere, so a forward pass cannot use that of another batch, and a layer that is computed again in the backward pass
(activation checkpointing) gets its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dtrain.models.unpadding_kernels import attend
from dtrain.models.unpadding_layout import NAME, PackedLayout

LAYOUT = "dtrain_layout"
"""Keyword argument with the layout of a packed row."""


def register() -> None:
    """Makes the attention known to transformers."""
    AttentionInterface.register(NAME, unpadded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def no_mask(device: torch.device) -> torch.Tensor:
    """Returns a mask that transformers passes on unchanged, and that no attention but this one can use."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def unpadded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention inside each sequence of a packed row. Without a layout it is transformers' `sdpa`.

    Args:
        query: (1, heads, tokens, width). Those of key and value may be fewer heads.
        sliding_window: distance from which on tokens do not see each other. Causal: number of tokens that a token sees,
            itself included.

    Returns:
        (1, tokens, heads, width), and None for the weights.
    """
    layout: PackedLayout | None = options.pop(LAYOUT, None)
    if layout is None:
        assert attention_mask is None or attention_mask.numel(), "a layer did not pass the layout on"
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return attended, None
    assert query.shape[0] == 1, "a layout for a padded batch"
    assert query.shape[2] == key.shape[2] == layout.tokens, "a layout of another batch"
    states = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attend(states, layout, dropout=dropout, scaling=scaling, window=sliding_window)[None], None

"""Small tensor rules that every task shares."""

from __future__ import annotations

import torch


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, where losses are summed (law 4); float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()

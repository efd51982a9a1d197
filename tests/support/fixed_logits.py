"""A model that a test puts the answers into."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Says(nn.Module):
    """A model that answers with these logits, whatever it is given."""

    def __init__(self, logits: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=dtype)

    def forward(self, **_inputs: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits)

"""A user's module for configs/own_model.yaml: a linear layer on the mean of the token embeddings.

dtrain calls `build` with the values of model.config, and with num_labels, vocab_size, tokenizer and head if it has
parameters of these names. The module gets the batch by name (input_ids, attention_mask, ...) and returns logits.
"""

from __future__ import annotations

import torch
from torch import nn


class BagOfEmbeddings(nn.Module):
    """Classifies by which words occur, regardless of their order."""

    def __init__(self, vocab_size: int, num_labels: int, *, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.out = nn.Linear(width, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Returns logits: (batch, num_labels). Both inputs are (batch, length); padding is ignored."""
        weights = attention_mask[:, :, None].float()
        mean = (self.embed(input_ids) * weights).sum(dim=1) / weights.sum(dim=1)
        logits: torch.Tensor = self.out(mean)
        return logits


def build(*, num_labels: int, vocab_size: int, width: int = 64) -> nn.Module:
    """Builds the module for `model.factory: own_model:build`."""
    return BagOfEmbeddings(vocab_size, num_labels, width=width)

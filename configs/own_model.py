"""A module of one's own, for configs/own_model.yaml: the mean of the tokens' embeddings, and a linear layer on it.

dtrain calls `build` with those of num_labels, vocab_size, tokenizer and head that it names, and with what the config
says under model.config. It gets the batch by name (input_ids, attention_mask, ...) and gives logits.
"""

from __future__ import annotations

import torch
from torch import nn


class BagOfEmbeddings(nn.Module):
    """Which words are there, in no order."""

    def __init__(self, vocab_size: int, num_labels: int, *, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.out = nn.Linear(width, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, length) twice; logits (batch, num_labels). Padding does not count."""
        weights = attention_mask[:, :, None].float()
        mean = (self.embed(input_ids) * weights).sum(dim=1) / weights.sum(dim=1)
        logits: torch.Tensor = self.out(mean)
        return logits


def build(*, num_labels: int, vocab_size: int, width: int = 64) -> nn.Module:
    """What `model.factory: own_model:build` names."""
    return BagOfEmbeddings(vocab_size, num_labels, width=width)

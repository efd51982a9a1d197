"""Dropout that does not wait for its random numbers (model.fast_dropout).

torch draws dropout's numbers one by one on a CPU: 5 ns for each value of a batch, 4 to 6 % of a training step of BERT. Here one
64-bit number of torch's generator decides on four values, so the draws depend on the same things as torch's own (law 5), and
activation checkpointing repeats them. They are other numbers than torch's.
"""

from __future__ import annotations

import torch
from torch import nn

from dtrain.models.layer_classes import replace_layers

STEPS = 2**16
"""The probability is rounded to one of so many steps, and results are scaled by the rounded one."""


class FastDropout(nn.Dropout):
    """`nn.Dropout`, with numbers of its own for a float tensor on the CPU in training. Everything else is torch's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name in torch
        if not self.training or self.inplace or input.device.type != "cpu" or not input.is_floating_point():
            return super().forward(input)
        if torch._C._functorch.peek_interpreter_stack() is not None:  # inside vmap, which forbids draws in place
            return super().forward(input)
        return fast_dropout(input, self.p)


def fast_dropout(values: torch.Tensor, probability: float) -> torch.Tensor:
    """Returns the values with each set to 0 with this probability, and the others divided by its complement."""
    dropped = round(probability * STEPS)
    if dropped in (0, STEPS):
        return values if dropped == 0 else values * 0.0
    count = values.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    factors = (bits >= dropped - STEPS // 2).to(values.dtype).mul_(STEPS / (STEPS - dropped))
    return values * factors.view(values.shape)


def set_fast_dropout(module: nn.Module, *, on: bool) -> None:
    """Replaces the dropout of a model in place, or restores torch's. Only `nn.Dropout` itself: a subclass may do more."""
    replace_layers(module, {nn.Dropout: FastDropout}, on=on)

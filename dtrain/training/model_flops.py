"""Estimates the arithmetic of a training step, and what share of a GPU's peak it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 matrix peaks in FLOP/s, from NVIDIA's data sheets, by a part of the device's name. A longer name comes first."""


def peak_flops(device_name: str) -> float | None:
    """Returns the dense bf16 peak of a GPU in FLOP/s; None if it is not in the table."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_FLOPS.items():
        parts = name.split()
        if any(words[start : start + len(parts)] == parts for start in range(len(words))):
            return peak
    return None


def flops_per_token(module: nn.Module, numel: Callable[[nn.Parameter], int] = nn.Parameter.numel) -> float:
    """Returns the estimated FLOP per token of forward and backward: 6 per parameter if all of them learn.

    A parameter costs 2 in the forward pass, 2 more if it learns, and 2 more if the gradient passes it on its way to a
    parameter that learns. Embedding tables are looked up and cost nothing, unless an output layer shares them. Attention
    scores are not counted, nor is recomputation. All experts of a mixture count, so that one is overestimated.

    Args:
        numel: returns the number of values of a parameter, which an engine may have sharded.
    """
    flops, learns_below = 0.0, False
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            learns_below = learns_below or parameter.requires_grad
            if isinstance(part, nn.Embedding):
                continue
            flops += numel(parameter) * (2.0 + 2.0 * parameter.requires_grad + 2.0 * learns_below)
    return flops

"""The device that a model computes on."""

from __future__ import annotations

import torch
from torch import nn

DEVICE_ATTRIBUTE = "_dtrain_device"
"""Attribute of every module of a model whose weights an engine keeps elsewhere: the device that they are copied to."""


def compute_device(module: nn.Module) -> torch.device:
    """Returns the device for a module's inputs: that of its weights, unless an engine keeps them on the host (offload)."""
    device: torch.device | None = module.__dict__.get(DEVICE_ATTRIBUTE)
    return next(module.parameters()).device if device is None else device

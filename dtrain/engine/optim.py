"""Optimizers. Their learning rates are in schedules.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtrain.config import schema
from dtrain.engine.fused_adamw import FusedAdamW

FUSED_DEVICES = ("cpu", "cuda")
"""Devices whose fused AdamW is tested here. torch refuses it on the meta device."""


def build_optimizer(
    groups: list[dict[str, Any]], settings: schema.Optim, *, only_torchs: bool = False
) -> torch.optim.Optimizer:
    """Returns the optimizer of `optim.name` over those groups.

    Args:
        only_torchs: whether it must be of one of torch's own classes: see Engine.needs_torchs_optimizer.
    """
    match settings.name:
        case "adamw":
            parameters = [parameter for group in groups for parameter in group["params"]]
            is_fused = all(map(_can_fuse, parameters))
            if (
                is_fused
                and not only_torchs
                and {(p.device.type, p.dtype) for p in parameters} == {("cpu", torch.float32)}
            ):
                return FusedAdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
            return torch.optim.AdamW(
                groups,
                lr=settings.learning_rate,
                betas=settings.betas,
                eps=settings.eps,
                fused=True if is_fused else None,  # None: torch chooses; False would also rule out its foreach kernels
            )
        case "sgd":
            return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=settings.learning_rate)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the optimizer's attribute `found_inf`, a tensor, makes a step leave weights, moments and counts alone.

    Only torch's fused kernels read it.
    """
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))


def _can_fuse(parameter: nn.Parameter) -> bool:
    """Returns whether torch's fused AdamW updates a parameter correctly.

    The CPU kernel walks through memory and ignores strides. It silently pairs the wrong elements if the gradient or a
    moment is laid out differently, which is so for a part of a larger tensor: their strides cannot follow the parameter's.
    """
    follows_layout = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return parameter.is_floating_point() and parameter.device.type in FUSED_DEVICES and follows_layout


def slots_per_value(settings: schema.Optim) -> int:
    """Returns how many numbers the optimizer keeps for each trainable value; Adafactor keeps rows and columns only."""
    match settings.name:
        case "adamw":
            return 2
        case "sgd":
            return 1 if settings.momentum else 0
        case "adafactor":
            return 0

"""Parameter groups, optimizers, and the learning rate as a function of the number of updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dtrain.config import schema


def parameter_groups(
    model: nn.Module, *, weight_decay: float, stages: Sequence[Sequence[str]] = ()
) -> list[dict[str, Any]]:
    """Returns the trainable parameters in groups with and without weight decay; biases and norm layers have none.

    Args:
        weight_decay: weight decay of the first group of each stage.
        stages: names of parameters that began to learn later, one list per thaw. Each stage gets separate groups, since
            ZeRO counts Adam's steps per group and these have taken fewer.

    Returns:
        Groups in a fixed order, none empty (ZeRO cannot take an empty one).
    """
    stage_of = {name: number for number, names in enumerate(stages, start=1) for name in names}
    plain = _without_decay(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((stage_of.get(name, 0), name in plain), []).append(parameter)
    return [
        {"params": members, "weight_decay": 0.0 if is_plain else weight_decay}
        for (_, is_plain), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def _without_decay(model: nn.Module) -> set[str]:
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    prefixes = tuple(f"{name}." for name in norms)
    return {name for name, _ in model.named_parameters() if name.endswith("bias") or name.startswith(prefixes)}


def build_optimizer(groups: list[dict[str, Any]], settings: schema.Optim) -> torch.optim.Optimizer:
    """Returns the optimizer of `optim.name` over those groups."""
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
        case "sgd":
            return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=settings.learning_rate)


def slots_per_value(settings: schema.Optim) -> int:
    """Returns how many numbers the optimizer keeps for each trainable value; Adafactor keeps rows and columns only."""
    match settings.name:
        case "adamw":
            return 2
        case "sgd":
            return 1 if settings.momentum else 0
        case "adafactor":
            return 0


def learning_rate(optim: schema.Optim, settings: schema.Schedule, *, total_steps: int) -> Callable[[int], float]:
    """Returns the learning rate as a function of the updates already applied; the first step uses the value for 0.

    Hugging Face's schedules give the shape. They are read as a pure function of the step, so there is no state to save.
    """
    from transformers.optimization import get_scheduler

    warmup = (
        settings.warmup_steps
        if settings.warmup_steps is not None
        else math.ceil((settings.warmup_ratio or 0.0) * total_steps)
    )
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=optim.learning_rate)
    scheduler = get_scheduler(settings.name, carrier, num_warmup_steps=warmup, num_training_steps=total_steps)
    shape: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda updates: optim.learning_rate * float(shape(updates))

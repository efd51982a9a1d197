"""What learns and how fast: parameter groups, optimizers, and the learning rate as a function of the update count."""

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
    """The trainable parameters in groups with and without weight decay; biases and norm layers have none.

    Args:
        weight_decay: of the first group of each stage.
        stages: names of parameters that began to learn later, stage by stage. Each stage has groups of its own, since
            ZeRO counts Adam's steps per group and these are behind the others.

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
    """The optimizer of `optim.name` over those groups."""
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
        case "sgd":
            return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=settings.learning_rate)


def learning_rate(optim: schema.Optim, settings: schema.Schedule, *, total_steps: int) -> Callable[[int], float]:
    """The learning rate by number of updates already applied; the first step runs at the schedule's value for 0.

    Hugging Face's own schedules give the shape, read as a pure function of the step: nothing of it is state.
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

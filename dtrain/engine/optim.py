"""Optimizers, and the learning rate as a function of the number of updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dtrain.config import schema
from dtrain.errors import ConfigError

DEFAULT_DECAY_RATIO = 0.1
"""Share of the steps in which warmup_stable_decay lowers the learning rate, if neither steps nor share are set."""


FUSED_DEVICES = ("cpu", "cuda")
"""Devices whose fused AdamW is tested here. torch refuses it on the meta device."""


def build_optimizer(groups: list[dict[str, Any]], settings: schema.Optim) -> torch.optim.Optimizer:
    """Returns the optimizer of `optim.name` over those groups."""
    match settings.name:
        case "adamw":
            is_fused = all(_can_fuse(parameter) for group in groups for parameter in group["params"])
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


def learning_rate(optim: schema.Optim, settings: schema.Schedule, *, total_steps: int) -> Callable[[int], float]:
    """Returns the learning rate as a function of the updates already applied; the first step uses the value for 0.

    Hugging Face's schedules give the shape. They are read as a pure function of the step, so there is no state to save.
    """
    from transformers.optimization import get_scheduler

    name, options = _shape(optim, settings, total_steps=total_steps)
    scheduler = get_scheduler(
        name,
        torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=optim.learning_rate),
        num_warmup_steps=_steps(settings.warmup_steps, settings.warmup_ratio or 0.0, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=options,
    )
    shape: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda updates: optim.learning_rate * float(shape(updates))


def _shape(optim: schema.Optim, settings: schema.Schedule, *, total_steps: int) -> tuple[str, dict[str, Any]]:
    """Returns Hugging Face's name and options of a schedule."""
    floor = settings.min_ratio
    match settings.name:
        case "cosine" if floor is not None:
            return "cosine_with_min_lr", {"min_lr_rate": floor}
        case "cosine_with_restarts":
            return settings.name, {"num_cycles": settings.cycles or 1}
        case "polynomial":
            end = {} if floor is None else {"lr_end": floor * optim.learning_rate}
            return settings.name, {"power": settings.power or 1.0, **end}
        case "inverse_sqrt":
            return settings.name, {"timescale": settings.timescale}
        case "warmup_stable_decay":
            decay_ratio = DEFAULT_DECAY_RATIO if settings.decay_ratio is None else settings.decay_ratio
            decay_steps = _steps(settings.decay_steps, decay_ratio, total_steps)
            warmup = _steps(settings.warmup_steps, settings.warmup_ratio or 0.0, total_steps)
            if warmup + decay_steps > total_steps:
                raise ConfigError(
                    f"schedule.name=warmup_stable_decay: {warmup} steps of warm-up and {decay_steps} of decay are more than the "
                    f"{total_steps} steps of this run. Lower schedule.warmup_steps or schedule.decay_steps, or set the shares "
                    "schedule.warmup_ratio and schedule.decay_ratio."
                )
            options = {
                "num_decay_steps": decay_steps,
                "decay_type": settings.decay_shape or "linear",
                "min_lr_ratio": floor or 0.0,
            }
            return settings.name, options
        case _:
            return settings.name, {}


def _steps(steps: int | None, ratio: float, total_steps: int) -> int:
    return steps if steps is not None else math.ceil(ratio * total_steps)

"""Where a model's weights are, for code that runs a model before or beside its engine.

An engine that keeps weights elsewhere than where the model computes says so by attributes of every module of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

DEVICE_ATTRIBUTE = "_dtrain_device"
"""The device that the weights are copied to, if the engine keeps them on the host (offload)."""

GATHER_ATTRIBUTE = "_dtrain_gather"
"""A function that returns `gathered`'s context, if the engine has sharded the model."""

PASSED_BY_ATTRIBUTE = "_dtrain_passed_by"
"""Whether a trial of the model did not call this entry of a list of layers; the model may use its weights all the same."""


def compute_device(module: nn.Module) -> torch.device:
    """Returns the device for a module's inputs."""
    device: torch.device | None = module.__dict__.get(DEVICE_ATTRIBUTE)
    return next(module.parameters()).device if device is None else device


def needs_every_rank(module: nn.Module) -> bool:
    """Returns whether every call of the module is a collective, so that no rank's clock may decide about one."""
    return GATHER_ATTRIBUTE in module.__dict__


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """Collective. Surrounds calls of a part of a model that are not calls of the model itself, e.g. of an encoder alone."""
    gather: Callable[[], AbstractContextManager[None]] = module.__dict__.get(GATHER_ATTRIBUTE, nullcontext)
    return gather()

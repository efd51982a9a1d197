"""A model that only runs forward passes, for evaluation without training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.models.placement import compute_device

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Forward(Protocol):
    """The part of an engine that evaluation uses; every Engine is one."""

    @property
    def context(self) -> RankContext: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def lock_step(self) -> bool: ...
    def autocast(self) -> AbstractContextManager[None]: ...


class ForwardOnly:
    """A complete model on every rank."""

    lock_step = False

    def __init__(self, module: nn.Module, config: Config, context: RankContext) -> None:
        self.module = module
        self.context = context
        self._precision = config.engine.precision

    def autocast(self) -> AbstractContextManager[None]:
        return autocast(self._precision, compute_device(self.module).type)


def autocast(precision: str, device_type: str) -> AbstractContextManager[None]:
    """Returns the context of `engine.precision`: weights stay in fp32, forward runs in the lower type where that is safe."""
    dtype = AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)

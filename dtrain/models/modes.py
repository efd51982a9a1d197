"""Training and evaluation mode of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Gives every module its mode back after the block: frozen parts may be in eval mode while others train."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode

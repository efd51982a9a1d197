"""Logs the gradient's size in each part of the model, every k steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dtrain.models.freezing import layer_group
from dtrain.training.monitors.protocol import Decision, StepEnd, StepRecord


class LogGradients:
    """Writes the norms by layer (`bert.encoder.layer.3`) or part (`classifier`), at the steps that measure them."""

    def __init__(self, write: Callable[[int, Mapping[str, float]], None]) -> None:
        """
        Args:
            write: takes a step and its norms.
        """
        self._write = write

    def needs_at_once(self, end: StepEnd) -> bool:
        return False  # the loop reads the steps that measure them at once

    def after_step(self, record: StepRecord) -> Decision:
        if record.gradient_norms is not None:
            self._write(record.step, by_group(record.gradient_norms))
        return Decision.CONTINUE


def by_group(norms: Mapping[str, float]) -> dict[str, float]:
    """Returns the L2 norms of parts of the model, from those of single parameters. Their squares add up to the step's."""
    squares: dict[str, list[float]] = {}
    for name, norm in norms.items():
        squares.setdefault(layer_group(name), []).append(norm * norm)
    return {name: math.sqrt(math.fsum(parts)) for name, parts in squares.items()}

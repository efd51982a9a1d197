"""Figures that are equal in every run: tokens that the layers computed, collectives and their bytes, modules imported."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.benchmarks.suite import machine

HEAVY = ("deepspeed", "peft", "torch._dynamo", "torch.distributed.tensor", "tensorboard", "sklearn", "pandas")
"""Packages that take a good part of the import time. A run that does not need them should not import them."""

LAYER = "BertLayer"

ITEM_BYTES = {
    "double": 8,
    "long int": 8,
    "float": 4,
    "int": 4,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "unsigned char": 1,
    "signed char": 1,
    "bool": 1,
}
"""Size of an element by the name that the profiler gives its type."""


class TokenCounter:
    """Counts the tokens that go through the model's layers, padding included, by a hook on all modules.

    The hook costs time on every module call, so a counted run is never a timed one.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._tokens: Counter[bool] = Counter()
        self._started: Counter[bool] = Counter()

    @contextmanager
    def watch(self) -> Iterator[None]:
        from torch.nn.modules.module import register_module_forward_pre_hook

        handle = register_module_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if type(module).__name__ == LAYER and arguments:
            self._tokens[module.training] += arguments[0].shape[:-1].numel()

    def begin(self) -> None:
        """Marks the end of the first step: before it, a trainer may run a batch to look at the model."""
        self._started = self._tokens.copy()

    def figures(self) -> dict[str, float]:
        """Returns tokens per layer, of training and of evaluation (or of frozen layers, which are in eval mode)."""
        return {
            "tokens_in_training": self._tokens[True] / self._layers,
            "tokens_in_evaluation": self._tokens[False] / self._layers,
            "tokens_after_first_step": (self._tokens[True] - self._started[True]) / self._layers,
        }


def imported() -> dict[str, Any]:
    """Returns how many modules this process has imported, and which heavy packages are among them."""
    return {"modules": len(sys.modules), "heavy_imports": [name for name in HEAVY if name in sys.modules]}


def at_first_step() -> dict[str, Any]:
    """Returns when the first step ended, by the monotonic clock, what it had cost until then, and what was imported."""
    found = imported()
    return {
        "first_step_s": time.monotonic(),
        "first_step_cpu_s": machine.tree_cpu_seconds(),
        "modules_at_first_step": found["modules"],
        "heavy_at_first_step": found["heavy_imports"],
    }


class Laps:
    """Counts of the steps between two marks: this rank's collectives, C++ included, their bytes, and tokens."""

    def __init__(self, counter: TokenCounter, *, marks: int, collectives: bool) -> None:
        """
        Args:
            marks: how often `mark` will be called.
            collectives: whether collectives count: then torch's profiler runs during the laps.
        """
        self._marks_left = marks
        self._counter, self._collectives = counter, collectives
        self._before: dict[str, float] | None = None
        self._profile: Any = None
        self.counts: list[dict[str, float]] = []

    def mark(self) -> None:
        """Ends a lap, if one has begun, and begins the next."""
        tokens = self._counter.figures()
        if (before := self._before) is not None:
            lap = {name: tokens[name] - before[name] for name in tokens}
            self.counts.append({**lap, **self._end_profile()})
        self._before = tokens
        self._marks_left -= 1
        if self._collectives and self._marks_left > 0:  # a profiler that runs at exit crashes the process
            import torch

            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.start()

    def _end_profile(self) -> dict[str, float]:
        if self._profile is None:
            return {"collectives": 0, "collective_bytes": 0}
        self._profile.stop()
        events = self._profile.events()
        return {
            "collectives": sum(event.name.startswith("c10d::") for event in events),
            "collective_bytes": sum(_payload(event) for event in events if event.name.startswith("gloo:")),
        }


def _payload(event: Any) -> int:
    """Returns the bytes of the tensors that this rank hands to a collective."""
    pairs = zip(event.input_shapes, event.input_dtypes, strict=True)
    return sum(math.prod(shape) * ITEM_BYTES[kind] for shape, kind in pairs if shape)

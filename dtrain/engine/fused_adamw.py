"""torch's fused AdamW on the CPU, with less work around its kernel.

A step of a small model spends more time in Python than in the kernel: torch looks up every parameter's state, groups tensors by
device and type, counts each parameter's steps in a tensor of its own, and opens a profiler range. Here the kernel gets
lists, and one operation counts the steps of a whole group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from dtrain.engine.state import STEP


@dataclass(frozen=True)
class _Counts:
    """The steps of a group of parameters that all have a state.

    Attributes:
        counts: (parameters,) float32, the steps of each.
        views: one element of `counts` for each parameter; its state has it as `step`.
    """

    counts: torch.Tensor
    views: list[torch.Tensor]


class FusedAdamW(torch.optim.AdamW):
    """AdamW for parameters on the CPU, all of one type. Same state, same bits as torch's with `fused=True`."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, fused=True, **options)
        # It keeps no moments: clearing the state must free them.
        self._counts: list[_Counts] | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step on the gradients that are there. A GradScaler's steps, and those without some gradient, are torch's."""
        if closure is not None or self._is_observed():
            return _observed_step(self, closure)
        gradients = [[parameter.grad for parameter in group["params"]] for group in self.param_groups]
        is_scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        if is_scaled or any(one is None for of_group in gradients for one in of_group):
            return super().step()
        states = [[self.state.get(parameter, {}) for parameter in group["params"]] for group in self.param_groups]
        if not all(state for of_group in states for state in of_group):  # before their first step
            return super().step()
        with torch.no_grad():
            self._step(gradients, states)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it into a profiler range

    def _step(self, gradients: list[list[torch.Tensor]], states: list[list[dict[str, Any]]]) -> None:
        if self._counts is None or not _are_current(self._counts, states):
            self._counts = [_gather_counts(of_group) for of_group in states]
        for group, counts, of_group, with_state in zip(self.param_groups, self._counts, gradients, states, strict=True):
            if not of_group:
                continue
            counts.counts.add_(1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                group["params"],
                of_group,
                [state["exp_avg"] for state in with_state],
                [state["exp_avg_sq"] for state in with_state],
                [],
                counts.views,
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _is_observed(self) -> bool:
        """Returns whether somebody has registered a hook for the steps of optimizers."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )


def _observed_step(optimizer: torch.optim.AdamW, closure: Callable[[], Any] | None) -> Any:
    """Takes torch's step, with the hooks. torch adds them to a class when its first optimizer is made."""
    step: Any = torch.optim.AdamW.step
    if not getattr(step, "hooked", False):
        step = torch.optim.Optimizer.profile_hook_step(step)
    return step(optimizer, closure)


def _are_current(counts: list[_Counts], states: list[list[dict[str, Any]]]) -> bool:
    """Returns whether the states still have the counts that were gathered."""
    return len(counts) == len(states) and all(
        len(known.views) == len(of_group) and all(map(is_, [state[STEP] for state in of_group], known.views))
        for known, of_group in zip(counts, states, strict=True)
    )


def _gather_counts(states: list[dict[str, Any]]) -> _Counts:
    """Puts the counts of a group's states into one tensor, of which each state gets an element."""
    counts = torch.tensor([float(state[STEP]) for state in states], dtype=torch.float32)
    views = list(counts.unbind())
    for state, view in zip(states, views, strict=True):
        state[STEP] = view
    return _Counts(counts, views)

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

from dtrain.engine.state import STEP


@dataclass(frozen=True)
class _Group:
    """A group of parameters that all have a state.

    Attributes:
        states: the optimizer's state of each parameter.
        counts: (parameters,) float32, the steps of each.
        views: one element of `counts` for each parameter; its state has it as `step`.
    """

    states: list[dict[str, Any]]
    counts: torch.Tensor
    views: list[torch.Tensor]


class FusedAdamW(torch.optim.AdamW):
    """AdamW for parameters on the CPU, all of one type. Same state, same bits as torch's with `fused=True`.

    Hooks that are registered with `register_step_pre_hook` and `register_step_post_hook` are not called.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, fused=True, **options)
        self._prepared: list[_Group] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step on the gradients that are there. A GradScaler's steps, and those without some gradient, are torch's."""
        gradients = [[parameter.grad for parameter in group["params"]] for group in self.param_groups]
        is_scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        if closure is not None or is_scaled or any(one is None for of_group in gradients for one in of_group):
            return super().step(closure)
        if self._prepared is None or not self._is_current(self._prepared):
            self._prepared = self._prepare()
            if self._prepared is None:
                return super().step()
        for group, prepared, of_group in zip(self.param_groups, self._prepared, gradients, strict=True):
            if not of_group:
                continue
            prepared.counts.add_(1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                group["params"],
                of_group,
                [state["exp_avg"] for state in prepared.states],
                [state["exp_avg_sq"] for state in prepared.states],
                [],
                prepared.views,
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return None

    step.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it into a profiler range

    def _is_current(self, prepared: list[_Group]) -> bool:
        """Returns whether the states, and the counts in them, are still those that were prepared."""
        return len(prepared) == len(self.param_groups) and all(
            len(group["params"]) == len(of_group.states)
            and all(map(is_, map(self.state.get, group["params"]), of_group.states))
            and all(map(is_, [state.get(STEP) for state in of_group.states], of_group.views))
            for group, of_group in zip(self.param_groups, prepared, strict=True)
        )

    def _prepare(self) -> list[_Group] | None:
        """Gathers the states of all parameters; None if one has no state yet, as before its first step."""
        prepared = []
        for group in self.param_groups:
            states = [self.state[parameter] for parameter in group["params"] if parameter in self.state]
            if len(states) != len(group["params"]) or not all(states):
                return None
            counts = torch.tensor([float(state[STEP]) for state in states], dtype=torch.float32)
            views = list(counts.unbind())
            for state, view in zip(states, views, strict=True):
                state[STEP] = view
            prepared.append(_Group(states, counts, views))
        return prepared

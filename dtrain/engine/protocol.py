"""What the loop knows of a back end, and nothing more.

One file per engine beside this one implements it; adding an engine is adding one file and one `case` in build.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from dtrain.distributed.rank_context import RankContext


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step.

    grad_norm: L2 norm of the gradient of the whole step, over all ranks, before clipping.
    applied: False where the weights were left alone: on demand, or because a gradient was not finite.
    """

    grad_norm: float
    applied: bool


class ParameterState(NamedTuple):
    """One parameter or buffer by name, whole, where the engine has it, until the next one is asked for: copy what stays.

    value: the fp32 (or float64) tensor, None on ranks that did not ask.
    slots: the optimizer's tensors and counts for it (exp_avg, exp_avg_sq, step, momentum_buffer, ...); empty for
        buffers, frozen parameters, and before the first step.
    """

    name: str
    value: torch.Tensor | None
    slots: Mapping[str, torch.Tensor]


class Shard(NamedTuple):
    """A piece of a tensor, on the rank that keeps it.

    slot: the optimizer's name for it, or None for a parameter's or buffer's own values. start: the piece's first element
    in the flattened tensor; None for a tensor that is whole here and in no other rank's part. tensor: flat, unless whole.
    """

    name: str
    slot: str | None
    start: int | None
    tensor: torch.Tensor


ReadSlots = Callable[[str, torch.Size], Mapping[str, torch.Tensor]]


class Apart(Protocol):
    """What the loop needs of an engine whose ranks step on their own share and average weights later (train.local_steps)."""

    every: int
    """Steps between averages."""

    def own_norm(self) -> float:
        """L2 norm of this rank's gradient, before clipping. Between the last backward and `step`."""
        ...

    def took(self, own_weight: float, weight: float) -> None:
        """A step was applied: this rank's summed weight in it, and all ranks'."""
        ...

    def average(self) -> None:
        """Collective. Weights and moments become their mean over ranks, by the weights of the steps since the last time."""
        ...


class Engine(Protocol):
    """A model that learns on every rank alike. Every method is a collective.

    Gradients are sums: `backward` takes a loss already scaled by world_size / summed weight of the whole step, and the
    engine averages over ranks, so that the result is the gradient of (sum of losses / sum of weights). With `local` the
    loss is scaled by 1 / this rank's own weight.
    """

    name: str
    context: RankContext
    model: nn.Module
    """Call it for the forward pass in training."""
    module: nn.Module
    """The bare model: evaluation, generation, export."""
    local: Apart | None
    """Where ranks take steps of their own; None where gradients cross ranks in every step."""
    lock_step: bool
    """Forward or backward of one micro-batch is a collective (ZeRO 2 and 3): all ranks need equal numbers of them."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; the loop writes "lr" here."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch. Gradients cross ranks in the last one only."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """The arithmetic of `engine.precision`, for forward passes on `module`."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, already scaled by world_size / summed weight of the step."""
        ...

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        """Once before the first step of an engine: what its very first backward pass would do otherwise than later ones.

        Leaves weights, moments and gradients as they are.

        Args:
            loss: of any micro-batch, which counts for nothing. step: of the data, 0-based, that comes next.
        """
        ...

    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of each parameter's gradient of the whole step, all ranks together, before clipping, by name.

        Between the last backward and `step`. A parameter that got no gradient is left out.
        """
        ...

    def step(self, *, discard: bool = False) -> StepResult:
        """Clips, updates, and clears the gradients. `discard` clears them only: weights and moments stay."""
        ...

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter by name, one at a time, gathered whole to rank 0's host in fp32 (float64 stays); elsewhere None."""
        ...

    def named_state(self, *, here: bool) -> Iterator[ParameterState]:
        """Every parameter and buffer with its optimizer slots, one at a time, to its end on every rank.

        Args:
            here: whether this rank wants the values; others only take part.
        """
        ...

    def load_named_slots(self, read: ReadSlots) -> None:
        """Sets the optimizer's slots.

        Weights are loaded into the model before the engine is built.

        Args:
            read: collective; from a parameter's name and whole shape to its slots on every rank's host.
        """
        ...

    def local_state(self) -> Iterator[Shard]:
        """This rank's part of every parameter, buffer and slot, without gathering any; all ranks' parts make the whole.

        With engine.powersgd the ranks average what they remember first, so that it is a collective there, too.
        As with `named_state`, a tensor is there until the next one is asked for.
        """
        ...

    def scalars(self) -> dict[str, float]:
        """What else a step depends on, as JSON: the loss scale, and the steps since it last changed."""
        ...

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Takes what `scalars` gave."""
        ...

    def release(self) -> nn.Module:
        """Ends the engine and gives the bare model back, whole on every rank, to be frozen anew and wrapped again."""
        ...

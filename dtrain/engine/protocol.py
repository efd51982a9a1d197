"""What the rest of dtrain knows of a back end, and nothing more.

One file beside this one implements one engine. Adding an engine is adding its file, its name in config/engine.py and one
`case` in build.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext


class BytesPerNumber(NamedTuple):
    """Memory of one rank, in bytes, without activations.

    Attributes:
        weights: per parameter value.
        gradients: per trainable value.
        optimizer: per trainable value.
        exchange: per trainable value, at most, while gradients cross ranks.
    """

    weights: float
    gradients: float
    optimizer: float
    exchange: float = 0.0


@dataclass(frozen=True)
class EngineTraits:
    """What an engine would be under a config, before it is built: for the plan that is printed, and for loading.

    Attributes:
        memory: what a parameter costs.
        detail: more than the name for the banner, for example "ZeRO 2"; empty for none.
        is_sharded: parameters are spread over the ranks. The engine takes the module from the host and places it itself,
            and a forward pass needs every rank.
        lock_step: forward or backward of a micro-batch is a collective, so that all ranks need equal numbers of them.
        other_rounding: why results differ by rounding from fp32 on one process, apart from `engine.precision`.
        other_algorithm: why results differ by more than rounding; empty if they do not.
        evaluation_note: what the exactness of an evaluation is, where it is not every digit.
        notes: warnings and notes for the plan, one line each.
    """

    memory: BytesPerNumber
    detail: str = ""
    is_sharded: bool = False
    lock_step: bool = False
    other_rounding: tuple[str, ...] = ()
    other_algorithm: str = ""
    evaluation_note: str = ""
    notes: tuple[str, ...] = ()


class StepWeight(NamedTuple):
    """Summed weight of a step's targets.

    Attributes:
        total: on all ranks.
        local: on this rank.
    """

    total: float
    local: float


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step.

    Attributes:
        grad_norm: L2 norm of the gradient of the whole step, over all ranks, before clipping.
        applied: False where the weights were left alone: on request, or because a gradient was not finite.
    """

    grad_norm: float
    applied: bool


class ParameterState(NamedTuple):
    """One whole parameter or buffer, valid until the next one is requested: copy what must stay.

    Attributes:
        name: the parameter's or buffer's.
        value: the fp32 (or float64) tensor, None on ranks that did not request it.
        slots: the optimizer's tensors and counts for it (exp_avg, exp_avg_sq, step, momentum_buffer, ...); empty for
            buffers, frozen parameters, and before the first step.
    """

    name: str
    value: torch.Tensor | None
    slots: Mapping[str, torch.Tensor]


class Shard(NamedTuple):
    """A part of a tensor, on the rank that keeps it.

    Attributes:
        name: the parameter's or buffer's.
        slot: the optimizer's name for it, or None for a parameter's or buffer's own values.
        start: the part's first element in the flattened tensor; None for a tensor that is complete here and in no other
            rank's part.
        tensor: flat, unless it is complete.
    """

    name: str
    slot: str | None
    start: int | None
    tensor: torch.Tensor


ReadSlots = Callable[[str, torch.Size], Mapping[str, torch.Tensor]]
"""From a parameter's name and full shape to its optimizer slots."""


class Engine(Protocol):
    """A model that learns, with the same result on every rank.

    Call every method on all ranks, in the same order. Methods marked "Not a collective" are exempt.

    Gradients are sums: `backward` takes a loss that is already scaled by `loss_scale`, so that the result is the gradient
    of (sum of losses / sum of weights) of the whole step.
    """

    name: str
    """Equal to `engine.name`; for messages and manifests only. Nothing may branch on it."""
    context: RankContext
    model: nn.Module
    """Call it for the forward pass in training."""
    module: nn.Module
    """The bare model: evaluation, generation, export."""
    lock_step: bool
    """See EngineTraits."""
    extra_slots: int
    """Numbers that the engine keeps for each trainable value, apart from the optimizer's."""

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        """Returns what the engine would be, before it is built. Not a collective.

        Args:
            total_steps: of the run; None where no step is taken.
        """
        ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; the loop writes "lr" here."""
        ...

    def numel(self, parameter: nn.Parameter) -> int:
        """Returns the number of values of a parameter of `module` on all ranks together. Not a collective."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch. Gradients cross ranks in the last one only."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Sets the arithmetic of `engine.precision`, for forward passes on `module`."""
        ...

    def loss_scale(self, weight: StepWeight) -> float:
        """Returns what turns a loss sum into what `backward` takes; 0 without a target. Not a collective.

        Usually inherited from `AveragesEveryStep`, below. The loss scale of fp16 is another number: see `scalars`.
        """
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, already scaled by `loss_scale`."""
        ...

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        """Does, before the first step, what the very first backward pass does differently from later ones.

        Leaves weights, moments and gradients as they are.

        Args:
            loss: of any micro-batch; it does not count.
            step: the next one of the data, 0-based.
        """
        ...

    def weighted_sq_norm(self, weight: StepWeight) -> float | None:
        """Returns the local weight times the squared norm of the local gradient, before clipping. Not a collective.

        None where gradients are averaged in every step, so that `step` knows the norm by itself.
        """
        ...

    def gradient_norms(self) -> dict[str, float]:
        """Returns the L2 norm of each parameter's gradient of the whole step, over all ranks, before clipping, by name.

        Between the last backward and `step`. A parameter without a gradient is left out.
        """
        ...

    def step(self, weight: StepWeight, *, weighted_sq_norm: float = 0.0, discard: bool = False) -> StepResult:
        """Clips, updates, and clears the gradients.

        Args:
            weight: of the step.
            weighted_sq_norm: the sum over ranks of what `weighted_sq_norm` returned.
            discard: clears the gradients only; weights and moments stay.
        """
        ...

    def synchronize(self, step: int, *, force: bool) -> bool:
        """Makes all ranks hold the same weights, if that is due after `step` steps, or forced; returns whether they do."""
        ...

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yields every complete parameter on rank 0's host, in fp32 (float64 stays), one at a time; None on other ranks."""
        ...

    def named_state(self, *, here: bool) -> Iterator[ParameterState]:
        """Yields every parameter and buffer with its optimizer slots, one at a time. Every rank must exhaust it.

        Args:
            here: whether this rank wants the values; others only take part.
        """
        ...

    def load_named_slots(self, read: ReadSlots) -> None:
        """Sets the optimizer's slots.

        Weights are loaded into the model before the engine is built.

        Args:
            read: collective; returns a parameter's slots on every rank's host.
        """
        ...

    def local_state(self) -> Iterator[Shard]:
        """Yields this rank's part of every parameter, buffer and slot, without gathering; all ranks' parts are the state.

        With engine.powersgd the ranks average their error-feedback state first, so that it is a collective there, too.
        As with `named_state`, a tensor is valid until the next one is requested.
        """
        ...

    def scalars(self) -> dict[str, float]:
        """Returns what else a step depends on, as JSON: the loss scale of fp16, and the steps since it last changed."""
        ...

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Restores what `scalars` returned."""
        ...

    def release(self) -> nn.Module:
        """Ends the engine and returns the bare model, complete on every rank, to be frozen and wrapped again."""
        ...


class AveragesEveryStep:
    """Defaults of an engine that averages gradients over ranks in every step. LocalSgdEngine replaces them."""

    context: RankContext
    extra_slots = 0

    def loss_scale(self, weight: StepWeight) -> float:
        # The engine averages gradients over ranks; this turns the average into (sum of losses) / (sum of weights).
        return self.context.world_size / weight.total if weight.total else 0.0

    def weighted_sq_norm(self, weight: StepWeight) -> float | None:
        return None

    def synchronize(self, step: int, *, force: bool) -> bool:
        return True

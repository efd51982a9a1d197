"""The interface between the engines and the rest of dtrain.

Each engine is one file in this folder. A new engine needs its file, its name in config/engine.py and one `case` in
build.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext


class BytesPerNumber(NamedTuple):
    """Memory of one rank in bytes per number, without activations.

    Attributes:
        weights: bytes per parameter value.
        gradients: bytes per trainable value.
        optimizer: bytes per trainable value.
        exchange: maximum bytes per trainable value while gradients are sent between ranks.
    """

    weights: float
    gradients: float
    optimizer: float
    exchange: float = 0.0


@dataclass(frozen=True)
class EngineTraits:
    """Properties of an engine for a config, known before it is built. The printed plan and model loading use them.

    Attributes:
        memory: memory for each parameter.
        detail: addition to the name in the banner, for example "ZeRO 2"; may be empty.
        is_sharded: whether parameters are spread over the ranks, so that a forward pass needs every rank.
        lock_step: whether forward or backward of a micro-batch is a collective, so that all ranks must run equally many.
        contiguous: whether each rank's micro-batches are neighbors in the step's list, in its order.
        other_rounding: why results differ by rounding from fp32 on one process, apart from `engine.precision`.
        other_algorithm: why results differ by more than rounding; empty if they do not.
        stronger_promise: what is equal to every bit, and when; empty if nothing is promised.
        evaluation_note: exactness of an evaluation; empty if it is exact to every digit.
        notes: warnings and notes for the plan, one line each.
    """

    memory: BytesPerNumber
    detail: str = ""
    is_sharded: bool = False
    lock_step: bool = False
    contiguous: bool = False
    other_rounding: tuple[str, ...] = ()
    other_algorithm: str = ""
    stronger_promise: str = ""
    evaluation_note: str = ""
    notes: tuple[str, ...] = ()


class StepWeight(NamedTuple):
    """Summed weight of a step's targets.

    Attributes:
        total: weight on all ranks.
        local: weight on this rank.
    """

    total: float
    local: float


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step.

    Attributes:
        grad_norm: L2 norm of the gradient of the complete step, over all ranks, before clipping.
        applied: False if the weights did not change: on request, or because a gradient was not finite.
    """

    grad_norm: float
    applied: bool


class ParameterState(NamedTuple):
    """One complete parameter or buffer. Its tensors are valid until the next one is requested; copy them to keep them.

    Attributes:
        name: the parameter's or buffer's.
        value: the fp32 (or float64) tensor; None on ranks that did not request it.
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
        tensor: the values; flat, unless the tensor is complete.
    """

    name: str
    slot: str | None
    start: int | None
    tensor: torch.Tensor


ReadSlots = Callable[[str, torch.Size], Mapping[str, torch.Tensor]]
"""A function that takes a parameter's name and full shape, and returns its optimizer slots."""


class Engine(Protocol):
    """Trains a model, with the same result on every rank.

    Call every method on all ranks, in the same order. Methods marked "Not a collective" are exempt.

    Gradients are sums: `backward` takes a loss that is already scaled by `loss_scale`, so that the result is the gradient
    of (sum of losses / sum of weights) of the complete step.
    """

    name: str
    """Equal to `engine.name`; for messages and manifests only. Nothing may branch on it."""
    context: RankContext
    model: nn.Module
    """The model to call for the forward pass in training."""
    module: nn.Module
    """The bare model, for evaluation, generation and export."""
    lock_step: bool
    """See EngineTraits."""
    contiguous: bool
    """See EngineTraits."""
    extra_slots: int
    """Numbers that the engine keeps for each trainable value, apart from the optimizer's."""
    needs_torchs_optimizer: bool
    """Whether the optimizer must be of one of torch's own classes, not of one that extends it."""

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        """Returns the properties of the engine, before it is built. Not a collective.

        Args:
            total_steps: number of steps of the run; None if no step is taken.
        """
        ...

    @classmethod
    def place(cls, module: nn.Module, config: Config, context: RankContext) -> nn.Module:
        """Collective. Returns the module where the engine wants it before it is built: on this rank's device, or sharded.

        Leaves a module alone that is in its place already.
        """
        ...

    @staticmethod
    def updated_part(parameter: nn.Parameter) -> nn.Parameter:
        """Returns what the optimizer updates for a parameter of a placed module. Not a collective."""
        ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; the loop writes "lr" here."""
        ...

    def numel(self, parameter: nn.Parameter) -> int:
        """Returns the number of values of a parameter of `module` on all ranks together. Not a collective."""
        ...

    def begin_step(self, shares: Sequence[int]) -> None:
        """Called before a step's first micro-batch. Not a collective.

        Args:
            shares: the rank of each micro-batch of the step, by index, if `contiguous`; else empty.
        """
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch. Gradients are sent between ranks in the last one only."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Sets the arithmetic of `engine.precision`, for forward passes on `module`."""
        ...

    def loss_scale(self, weight: StepWeight) -> float:
        """Returns the factor for a loss sum before `backward`; 0 without a target. Not a collective.

        Usually inherited from `AveragesEveryStep`, below. The loss scale of fp16 is another number: see `scalars`.
        """
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, already scaled by `loss_scale`."""
        ...

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        """Runs a backward pass before the first step, if the engine sets itself up in its first backward pass.

        Leaves weights, moments and gradients as they are.

        Args:
            loss: computes the loss of any micro-batch; it does not count.
            step: the next step of the data, 0-based.
        """
        ...

    def weighted_sq_norm(self, weight: StepWeight) -> float | None:
        """Returns what `step` needs the sum of over all ranks, for the norm of the gradient before clipping. Not a collective.

        It crosses ranks with the loop's one small all-reduce: with local steps the local weight times the squared norm of the
        local gradient, with sharded gradients the squared norm of this rank's part. None if `step` computes the norm itself.
        """
        ...

    @property
    def lacks_gradients(self) -> bool:
        """Whether none of this rank's micro-batches gave some gradient that other ranks may have. Not a collective."""
        ...

    def settle_missing_gradients(self, ranks: int) -> None:
        """Leaves parameters that no micro-batch of any rank used without a gradient, so that the optimizer skips them.

        Call it after the last backward.

        Args:
            ranks: number of ranks where `lacks_gradients` is true; at least 1.

        Raises:
            ConfigError: the engine cannot do that.
        """
        ...

    def gradient_norms(self) -> dict[str, float]:
        """Returns by name the L2 norm of each parameter's gradient of the complete step, over all ranks, before clipping.

        Call it between the last backward and `step`. A parameter without a gradient is left out.
        """
        ...

    def step(self, weight: StepWeight, *, weighted_sq_norm: float = 0.0, discard: bool = False) -> StepResult:
        """Clips, updates, and clears the gradients.

        Args:
            weight: weight of the step.
            weighted_sq_norm: the sum over ranks of the results of `weighted_sq_norm`.
            discard: whether to clear the gradients only, and keep weights and moments.
        """
        ...

    @property
    def decides_on_device(self) -> bool:
        """Whether `step_on_device` may be called instead of `step`. Equal on every rank. Not a collective."""
        ...

    def step_on_device(self, skip: torch.Tensor) -> torch.Tensor:
        """Does what `step` does, without waiting for the device: it decides by itself whether the weights change.

        Args:
            skip: whether to keep weights and moments: () bool, on the device, equal on every rank.

        Returns:
            The norm that `step` reports: () on the device. Where it is not finite, weights and moments are kept.
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
            here: whether this rank needs the values; other ranks only take part.
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
        As in `named_state`, a tensor is valid until the next one is requested.
        """
        ...

    def scalars(self) -> dict[str, float]:
        """Returns the other values that a step depends on, as JSON: the loss scale of fp16, and the steps since it last changed."""
        ...

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Restores what `scalars` returned."""
        ...

    def release(self) -> nn.Module:
        """Ends the engine and returns the bare model in its place (see `place`), to be frozen and wrapped again."""
        ...


class AveragesEveryStep:
    """Defaults of an engine that averages gradients over ranks in every step. LocalSgdEngine replaces them."""

    context: RankContext
    extra_slots = 0
    contiguous = False
    decides_on_device = False
    needs_torchs_optimizer = False

    @classmethod
    def place(cls, module: nn.Module, config: Config, context: RankContext) -> nn.Module:
        return module.to(device_of(context.topology))

    @staticmethod
    def updated_part(parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def begin_step(self, shares: Sequence[int]) -> None:
        """Does nothing: no matter which rank runs a micro-batch."""

    def step_on_device(self, skip: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"{type(self).__name__} decides on the host")

    @property
    def lacks_gradients(self) -> bool:
        return False

    def settle_missing_gradients(self, ranks: int) -> None:
        """Does nothing: a parameter without a gradient has None."""

    def loss_scale(self, weight: StepWeight) -> float:
        # The engine averages gradients over ranks; this turns the average into (sum of losses) / (sum of weights).
        return self.context.world_size / weight.total if weight.total else 0.0

    def weighted_sq_norm(self, weight: StepWeight) -> float | None:
        return None

    def synchronize(self, step: int, *, force: bool) -> bool:
        return True

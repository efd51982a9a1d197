"""Gradients as low-rank factors with error feedback, by torch's powerSGD_hook; and what it remembers, made durable.

What the factors leave out of a gradient is remembered on each rank and added to the next gradient. Only the average of
these memories over ranks ever reaches the weights, since all that is done with them is linear: so the average is what a
checkpoint keeps, and what any number of ranks goes on from. Where it is taken each rank goes on with it as well, which
changes rounding only: so a run that goes on has every bit of one that was not stopped and saved at the same steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks

from dtrain.config.schema import Config
from dtrain.data.seeding import derive_seed
from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.comm_hooks import Bucket, Exchange
from dtrain.engine.state import EXCHANGE
from dtrain.errors import ConfigError

ERROR, FACTOR = f"{EXCHANGE}error", f"{EXCHANGE}factor"
"""Names of what is remembered of a parameter: what was left out so far, and the right factor, from which the next begins."""

EVERYTHING_MB = 2.0**20

BUCKET = 0
"""The index of the only one."""

VANISHED = 1e-8
"""A column of a factor that is shorter has no direction, and is not made one long."""


class Squeezed(NamedTuple):
    """A parameter that crosses as factors. rows, columns: of its matrix. rank: of the factors."""

    name: str
    rows: int
    columns: int
    rank: int


class PowerSgdExchange(Exchange):
    """The exchange of `engine.powersgd`."""

    warms_up = True

    def __init__(self, config: Config, context: RankContext, module: nn.Module) -> None:
        super().__init__(config, context)
        settings = config.engine.powersgd
        assert settings is not None
        # One bucket: the hook waits for collectives inside the answer to another one, in threads of gloo of which there are
        # two, so that several buckets would wait for each other, and would begin them in another order on another rank
        # (pytorch issue 48478).
        self.bucket_mb = EVERYTHING_MB
        self._context, self._settings, self._seed = context, settings, config.run.seed
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        _refuse_numbers(module)
        logging.getLogger(hooks.__name__).setLevel(logging.WARNING)
        self._state = hooks.PowerSGDState(
            None,
            matrix_approximation_rank=settings.rank,
            start_powerSGD_iter=2,  # the steps before it are counted here
            min_compression_rate=settings.min_rate,
            # For ranks 1 and 2, which are made orthogonal column by column: a gradient of zeros, or with one row alone (of
            # an embedding), would divide zero by zero.
            orthogonalization_epsilon=VANISHED,
        )
        self._state.iter = self._state.start_powerSGD_iter
        self._step: int | None = None
        self._is_shared = False
        self._members: list[tuple[str, torch.Size]] = []
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}

    def average(self, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
        step = self._step
        self._step = None if step is None else step + 1
        if step is None or step < self._settings.start_step:
            return super().average(bucket)
        self._is_shared = False
        state, whole = self._state, bucket.buffer()
        assert bucket.is_last(), "one bucket holds all gradients"
        self._members = [(self._names[id(parameter)], parameter.shape) for parameter in bucket.parameters()]
        self._recall(whole)
        # Drawn by the place in the data alone.
        state.rng = np.random.RandomState(derive_seed(self._seed, "powersgd", step) % 2**32)
        if BUCKET in state.p_memory_dict:
            self._draw_vanished(state.rng)
        before = state.total_numel_after_compression
        averaged: torch.futures.Future[torch.Tensor] = hooks.powerSGD_hook(state, bucket)
        # The two factors of what it squeezes, and in one piece all that it does not.
        sent = state.total_numel_after_compression - before
        self._traffic.add(sent * whole.element_size(), collectives=3)
        return averaged

    def _squeezed(self) -> list[Squeezed]:
        """What crosses as factors, in the order in which the hook lays the factors out: matrices of one shape together."""
        by_shape: dict[tuple[int, int], list[Squeezed]] = {}
        for name, shape in self._members:
            rows, columns = shape[0], shape.numel() // shape[0]
            rank = min(rows, columns, self._settings.rank)
            if hooks._should_compress(rows, columns, rank, self._settings.min_rate)[0]:  # type: ignore[no-untyped-call]
                by_shape.setdefault((rows, columns), []).append(Squeezed(name, rows, columns, rank))
        return [one for group in by_shape.values() for one in group]

    def _draw_vanished(self, rng: np.random.RandomState) -> None:
        """New directions for those of the last step that came to nothing: by themselves they would stay nothing for ever.

        Nor would any gradient pass through them. The same on every rank, whose factors are the same.
        """
        factors = self._factors()
        if self._settings.rank > 2 or not factors:  # from 3 on the hook completes them itself, by QR
            return
        lengths = torch.stack([factor.norm(dim=0) for _, factor in factors]).tolist()
        for (one, factor), own in zip(factors, lengths, strict=True):
            for column, length in enumerate(own):
                if length < VANISHED:
                    factor[:, column] = torch.from_numpy(rng.standard_normal(one.columns)).to(factor)

    def _factors(self) -> list[tuple[Squeezed, torch.Tensor]]:
        """The right factor of each parameter that has one, as it lies in the hook's memory."""
        squeezed = self._squeezed()
        flat = torch.split(self._state.q_memory_dict[BUCKET], [one.columns * one.rank for one in squeezed])
        return [(one, part.view(one.columns, one.rank)) for one, part in zip(squeezed, flat, strict=True)]

    def memory(self) -> dict[str, dict[str, torch.Tensor]]:
        if self._loaded:  # nothing has happened since
            return {name: dict(slots) for name, slots in self._loaded.items()}
        error = self._state.error_dict.get(BUCKET)
        if error is None:
            return {}
        if not self._is_shared:  # else a second time would add up to other digits
            error = self._state.error_dict[BUCKET] = all_reduce_sum(error / self._world_size, self._context)
            self._is_shared = True
        parts = torch.split(error, [shape.numel() for _, shape in self._members])
        found = {name: {ERROR: part.view(shape)} for (name, shape), part in zip(self._members, parts, strict=True)}
        for one, factor in self._factors():
            found[one.name][FACTOR] = factor
        return found

    def load_memory(self, name: str, slots: Mapping[str, torch.Tensor]) -> None:
        own = {key: value for key, value in slots.items() if key in (ERROR, FACTOR)}
        if own:
            self._loaded[name] = own

    def _recall(self, like: torch.Tensor) -> None:
        """Puts what was loaded where the hook looks for it. Without all of the factors new ones are drawn."""
        if not self._loaded:
            return
        loaded, self._loaded = self._loaded, {}
        errors = [
            loaded.get(name, {}).get(ERROR, torch.zeros(shape)).reshape(-1).to(like) for name, shape in self._members
        ]
        self._state.error_dict[BUCKET] = torch.cat(errors)
        squeezed = self._squeezed()
        factors = [loaded.get(one.name, {}).get(FACTOR) for one in squeezed]
        if all(
            factor is not None and factor.shape == (one.columns, one.rank)
            for factor, one in zip(factors, squeezed, strict=True)
        ):
            flat: list[Any] = [factor.reshape(-1).to(like) for factor in factors if factor is not None]
            self._state.q_memory_dict[BUCKET] = torch.cat(flat) if flat else like.new_empty(0)
            self._state.p_memory_dict[BUCKET] = like.new_empty(sum(one.rows * one.rank for one in squeezed))

    def forget(self) -> None:
        self._loaded.clear()
        self._state.error_dict.clear()
        self._state.p_memory_dict.clear()
        self._state.q_memory_dict.clear()

    def begin(self, step: int) -> None:
        self._step = step


def _refuse_numbers(module: nn.Module) -> None:
    """
    Raises:
        ConfigError: a parameter without dimensions, which the hook cannot look at as a matrix.
    """
    numbers = [name for name, p in module.named_parameters() if p.requires_grad and p.dim() == 0]
    if numbers:
        raise ConfigError(
            f"engine.powersgd squeezes matrices, but {numbers[0]} of this model is a single number. Freeze it "
            "(freeze.modules), or use engine.gradient_wire=bf16 instead."
        )

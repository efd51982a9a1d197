"""Sends gradients as low-rank factors with error feedback (torch's powerSGD_hook), and saves the error-feedback state.

What the factors leave out of a gradient is kept on each rank and added to the next gradient. All operations on it are
linear, so only its average over ranks ever reaches the weights. A checkpoint therefore keeps the average, and a resume
works with any number of ranks. When a checkpoint is taken, each rank continues with the average too, which changes
rounding only: a resumed run equals, bit for bit, an uninterrupted one that saved at the same steps.
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
from dtrain.engine.comm_hooks import Bucket, CommHook
from dtrain.engine.state import FEEDBACK_PREFIX
from dtrain.errors import ConfigError

ERROR, FACTOR = f"{FEEDBACK_PREFIX}error", f"{FEEDBACK_PREFIX}factor"
"""Slot names of a parameter's error (what was left out so far) and its right factor (the start of the next one)."""

EVERYTHING_MB = 2.0**20

BUCKET = 0
"""Index of the only bucket."""

VANISHED = 1e-8
"""A column of a factor that is shorter than this has no direction and is not normalized."""


class FactoredParameter(NamedTuple):
    """A parameter whose gradient is sent as two factors.

    Attributes:
        name: name of the parameter.
        rows: rows of its matrix.
        columns: columns of its matrix.
        rank: rank of the factors.
    """

    name: str
    rows: int
    columns: int
    rank: int


class PowerSgdCommHook(CommHook):
    """The communication hook of `engine.powersgd`."""

    needs_warm_up = True
    extra_slots = 1

    def __init__(self, config: Config, context: RankContext, module: nn.Module) -> None:
        super().__init__(config, context)
        settings = config.engine.powersgd
        assert settings is not None
        # One bucket: the hook waits for a collective inside the callback of another one, in gloo's two threads. Several
        # buckets would wait for each other, and start collectives in different orders on different ranks (pytorch issue
        # 48478).
        self.bucket_mb = EVERYTHING_MB
        self._context, self._settings, self._seed = context, settings, config.run.seed
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        _refuse_scalars(module)
        logging.getLogger(hooks.__name__).setLevel(logging.WARNING)
        self._state = hooks.PowerSGDState(
            None,
            matrix_approximation_rank=settings.rank,
            start_powerSGD_iter=2,  # the smallest value that torch allows; this class counts the uncompressed steps itself
            min_compression_rate=settings.min_rate,
            # Ranks 1 and 2 are orthogonalized column by column: a gradient of zeros, or with a single nonzero row (an
            # embedding), would divide zero by zero.
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
        state, gradients = self._state, bucket.buffer()
        assert bucket.is_last(), "one bucket holds all gradients"
        self._members = [(self._names[id(parameter)], parameter.shape) for parameter in bucket.parameters()]
        self._restore(gradients)
        # Random draws depend on the position in the data alone (law 5).
        state.rng = np.random.RandomState(derive_seed(self._seed, "powersgd", step) % 2**32)
        if BUCKET in state.p_memory_dict:
            self._redraw_vanished(state.rng)
        before = state.total_numel_after_compression
        averaged: torch.futures.Future[torch.Tensor] = hooks.powerSGD_hook(state, bucket)
        # Three collectives: the two factors, and one for everything that is not factored.
        sent = state.total_numel_after_compression - before
        self._traffic.add(sent * gradients.element_size(), collectives=3)
        return averaged

    def _factored(self) -> list[FactoredParameter]:
        """Returns the parameters that are sent as factors, in the order of the hook's buffers: matrices of one shape together."""
        by_shape: dict[tuple[int, int], list[FactoredParameter]] = {}
        for name, shape in self._members:
            rows, columns = shape[0], shape.numel() // shape[0]
            rank = min(rows, columns, self._settings.rank)
            if hooks._should_compress(rows, columns, rank, self._settings.min_rate)[0]:  # type: ignore[no-untyped-call]
                by_shape.setdefault((rows, columns), []).append(FactoredParameter(name, rows, columns, rank))
        return [one for group in by_shape.values() for one in group]

    def _redraw_vanished(self, rng: np.random.RandomState) -> None:
        """Draws new directions for columns that vanished in the last step: they would stay zero and pass no gradient.

        All ranks draw the same, since their factors are the same.
        """
        factors = self._factors()
        if self._settings.rank > 2 or not factors:  # from rank 3 on the hook completes them by QR
            return
        lengths = torch.stack([factor.norm(dim=0) for _, factor in factors]).tolist()
        for (one, factor), columns in zip(factors, lengths, strict=True):
            for column, length in enumerate(columns):
                if length < VANISHED:
                    factor[:, column] = torch.from_numpy(rng.standard_normal(one.columns)).to(factor)

    def _factors(self) -> list[tuple[FactoredParameter, torch.Tensor]]:
        """Returns the right factor of each factored parameter, as views of the hook's buffer."""
        factored = self._factored()
        flat = torch.split(self._state.q_memory_dict[BUCKET], [one.columns * one.rank for one in factored])
        return [(one, part.view(one.columns, one.rank)) for one, part in zip(factored, flat, strict=True)]

    def error_feedback(self) -> dict[str, dict[str, torch.Tensor]]:
        if self._loaded:  # no step since the load
            return {name: dict(slots) for name, slots in self._loaded.items()}
        error = self._state.error_dict.get(BUCKET)
        if error is None:
            return {}
        if not self._is_shared:  # a second average would change digits
            error = self._state.error_dict[BUCKET] = all_reduce_sum(error / self._world_size, self._context)
            self._is_shared = True
        parts = torch.split(error, [shape.numel() for _, shape in self._members])
        slots = {name: {ERROR: part.view(shape)} for (name, shape), part in zip(self._members, parts, strict=True)}
        for one, factor in self._factors():
            slots[one.name][FACTOR] = factor
        return slots

    def load_error_feedback(self, name: str, slots: Mapping[str, torch.Tensor]) -> None:
        feedback = {key: value for key, value in slots.items() if key in (ERROR, FACTOR)}
        if feedback:
            self._loaded[name] = feedback

    def _restore(self, like: torch.Tensor) -> None:
        """Stores the loaded state in the hook. If a factor is missing, the hook draws new ones."""
        if not self._loaded:
            return
        loaded, self._loaded = self._loaded, {}
        errors = [
            loaded.get(name, {}).get(ERROR, torch.zeros(shape)).reshape(-1).to(like) for name, shape in self._members
        ]
        self._state.error_dict[BUCKET] = torch.cat(errors)
        factored = self._factored()
        factors = [loaded.get(one.name, {}).get(FACTOR) for one in factored]
        if all(
            factor is not None and factor.shape == (one.columns, one.rank)
            for factor, one in zip(factors, factored, strict=True)
        ):
            flat: list[Any] = [factor.reshape(-1).to(like) for factor in factors if factor is not None]
            self._state.q_memory_dict[BUCKET] = torch.cat(flat) if flat else like.new_empty(0)
            self._state.p_memory_dict[BUCKET] = like.new_empty(sum(one.rows * one.rank for one in factored))

    def reset(self) -> None:
        self._loaded.clear()
        self._state.error_dict.clear()
        self._state.p_memory_dict.clear()
        self._state.q_memory_dict.clear()

    def begin(self, step: int) -> None:
        self._step = step


def _refuse_scalars(module: nn.Module) -> None:
    """Rejects trainable parameters without dimensions, which the hook cannot view as a matrix.

    Raises:
        ConfigError: there is one.
    """
    numbers = [name for name, p in module.named_parameters() if p.requires_grad and p.dim() == 0]
    if numbers:
        raise ConfigError(
            f"engine.powersgd factors matrices, but {numbers[0]} of this model is a single number. Freeze it "
            "(freeze.modules), or use engine.gradient_wire=bf16 instead."
        )

"""Learning rate schedules as pure functions of the number of updates, with the values of Hugging Face's.

transformers.optimization has the same schedules, but importing it also imports peft and accelerate.
A multiplier is the share of the peak learning rate; `warmup` steps of a linear ramp from 0 come first in each schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from dtrain.config import schema
from dtrain.errors import ConfigError

DEFAULT_DECAY_RATIO = 0.1
"""Share of the steps in which warmup_stable_decay lowers the learning rate, if neither steps nor share are set."""

DEFAULT_POLYNOMIAL_END = 1e-7
"""The last learning rate of polynomial, if schedule.min_ratio is not set."""

DEFAULT_TIMESCALE = 10_000
"""Time scale of inverse_sqrt in steps, if neither schedule.timescale nor a warm-up is set."""


def learning_rate(optim: schema.Optim, settings: schema.Schedule, *, total_steps: int) -> Callable[[int], float]:
    """Returns the learning rate as a function of the updates already applied; the first step uses the value for 0.

    Raises:
        ConfigError: the schedule does not fit the number of steps or the peak learning rate.
    """
    multiplier = _multiplier(optim, settings, total_steps=total_steps)
    return lambda updates: optim.learning_rate * float(multiplier(updates))


def _multiplier(optim: schema.Optim, settings: schema.Schedule, *, total_steps: int) -> Callable[[int], float]:
    warmup = _steps(settings.warmup_steps, settings.warmup_ratio or 0.0, total_steps)
    floor = settings.min_ratio or 0.0
    match settings.name:
        case "constant":
            return constant
        case "constant_with_warmup":
            return partial(constant, warmup=warmup)
        case "linear":
            return partial(linear, warmup=warmup, total=total_steps)
        case "cosine":
            return partial(cosine, warmup=warmup, total=total_steps, floor=floor)
        case "cosine_with_restarts":
            return partial(cosine_with_restarts, warmup=warmup, total=total_steps, cycles=settings.cycles or 1)
        case "polynomial":
            end = DEFAULT_POLYNOMIAL_END if settings.min_ratio is None else floor * optim.learning_rate
            _check_polynomial(optim.learning_rate, end)
            power = settings.power or 1.0
            return partial(polynomial, warmup=warmup, total=total_steps, power=power, peak=optim.learning_rate, end=end)
        case "inverse_sqrt":
            timescale = settings.timescale or warmup or DEFAULT_TIMESCALE
            return partial(inverse_sqrt, warmup=warmup, timescale=timescale)
        case "warmup_stable_decay":
            decay_ratio = DEFAULT_DECAY_RATIO if settings.decay_ratio is None else settings.decay_ratio
            decay = _steps(settings.decay_steps, decay_ratio, total_steps)
            _check_phases(warmup, decay, total_steps)
            stable, shape = total_steps - warmup - decay, settings.decay_shape or "linear"
            return partial(warmup_stable_decay, warmup=warmup, stable=stable, decay=decay, shape=shape, floor=floor)


def constant(step: int, *, warmup: int = 0) -> float:
    """Returns the multiplier of `constant` and `constant_with_warmup`."""
    return _ramp(step, warmup) if step < warmup else 1.0


def linear(step: int, *, warmup: int, total: int) -> float:
    """Returns the multiplier of `linear`: down to 0 at step `total`."""
    if step < warmup:
        return _ramp(step, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Returns the multiplier of `cosine`: half a cosine down to `floor` at step `total`.

    It is the single-cycle case of SGDR (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5).
    """
    if step < warmup:
        return _ramp(step, warmup)
    return max(0.0, _half_cosine(_progress(step, warmup, total)) * (1 - floor) + floor)


def cosine_with_restarts(step: int, *, warmup: int, total: int, cycles: int) -> float:
    """Returns the multiplier of `cosine_with_restarts`: half a cosine down to 0, `cycles` times."""
    if step < warmup:
        return _ramp(step, warmup)
    progress = _progress(step, warmup, total)
    return 0.0 if progress >= 1.0 else max(0.0, _half_cosine((cycles * progress) % 1.0))


def polynomial(step: int, *, warmup: int, total: int, power: float, peak: float, end: float) -> float:
    """Returns the multiplier of `polynomial`: from the learning rate `peak` to `end` at step `total`."""
    if step < warmup:
        return _ramp(step, warmup)
    if step >= total:
        return end / peak
    remaining = 1 - (step - warmup) / (total - warmup)
    return float(((peak - end) * remaining**power + end) / peak)


def inverse_sqrt(step: int, *, warmup: int, timescale: int) -> float:
    """Returns the multiplier of `inverse_sqrt`: 1 / sqrt(1 + steps after the warm-up / timescale)."""
    if step < warmup:
        return _ramp(step, warmup)
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


def warmup_stable_decay(
    step: int, *, warmup: int, stable: int, decay: int, shape: Literal["linear", "cosine", "1-sqrt"], floor: float
) -> float:
    """Returns the multiplier of `warmup_stable_decay`: from `floor` to 1 in the warm-up, and back in the last `decay` steps."""
    if step < warmup:
        return max(0.0, _ramp(step, warmup) * (1.0 - floor) + floor)
    if step < warmup + stable:
        return 1.0
    if step >= warmup + stable + decay:
        return floor
    progress = (step - warmup - stable) / max(1, decay)
    match shape:
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = _half_cosine(progress)
        case "1-sqrt":
            factor = 1.0 - math.sqrt(progress)
    return max(0.0, factor * (1.0 - floor) + floor)


def _ramp(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _progress(step: int, warmup: int, total: int) -> float:
    """Returns the share of the steps after the warm-up that are done."""
    return (step - warmup) / max(1, total - warmup)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _check_polynomial(peak: float, end: float) -> None:
    if end >= peak:
        raise ConfigError(
            f"schedule.name=polynomial: optim.learning_rate={peak:g} is not above {end:g}, the learning rate at which the "
            "schedule ends. Set schedule.min_ratio, the end as a share of optim.learning_rate: schedule.min_ratio=0"
        )


def _check_phases(warmup: int, decay: int, total_steps: int) -> None:
    if warmup + decay > total_steps:
        raise ConfigError(
            f"schedule.name=warmup_stable_decay: {warmup} steps of warm-up and {decay} of decay are more than the "
            f"{total_steps} steps of this run. Lower schedule.warmup_steps or schedule.decay_steps, or set the shares "
            "schedule.warmup_ratio and schedule.decay_ratio."
        )


def _steps(steps: int | None, ratio: float, total_steps: int) -> int:
    return steps if steps is not None else math.ceil(ratio * total_steps)

"""Clipping: the bits of torch's own, with less work where nothing is clipped; and norms that torch computes inexactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.engine.clipping import LARGE, ROW, clip, total_norm


def parameters(*, scale: float) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2,))]
    for parameter in made[:2]:  # the last one has no gradient
        parameter.grad = torch.randn(parameter.shape, generator=draws) * scale
    return made


def gradients(members: list[nn.Parameter]) -> list[torch.Tensor]:
    return [member.grad for member in members if member.grad is not None]


NORM = float(nn.utils.get_total_norm(gradients(parameters(scale=1.0))))


@pytest.mark.parametrize("limit", [NORM * factor for factor in (0.1, 0.9999, 1.0, 1.000001, 1.0005, 1.01, 100.0)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, math.inf, math.nan])
def test_gradients_and_norm_have_the_bits_of_torchs_clipping(limit: float, scale: float) -> None:
    ours, theirs = parameters(scale=scale), parameters(scale=scale)
    limit = limit * scale if math.isfinite(scale) else limit

    norm = clip(iter(ours), limit)

    expected = float(nn.utils.clip_grad_norm_(theirs, limit))
    assert norm == expected or (math.isnan(norm) and math.isnan(expected))
    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.equal(one, other) or not math.isfinite(scale)


def test_without_a_limit_gradients_are_only_measured() -> None:
    members = parameters(scale=1.0)

    assert clip(members, None) == NORM
    for one, other in zip(gradients(members), gradients(parameters(scale=1.0)), strict=True):
        assert torch.equal(one, other)
    assert clip([members[2]], 1.0) == 0.0  # no gradient at all


class Operations(TorchDispatchMode):
    """Lists the names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("limit", "multiplies"), [(2 * NORM, False), (0.5 * NORM, True)])
def test_gradients_below_the_limit_are_read_once_and_not_written(limit: float, multiplies: bool) -> None:
    with Operations() as operations:
        clip(parameters(scale=1.0), limit)

    assert any("_foreach_mul_" in name for name in operations.names) == multiplies


@pytest.mark.parametrize("shape", [(LARGE + 1,), (30, ROW), (3_000_017,), (1500, 2000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_a_large_gradient_is_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    large = torch.randn(shape, generator=draws, dtype=dtype) * 1e-4
    others = [large, torch.ones(3, dtype=dtype) * 1e-2]
    if len(shape) == 2:
        others[0] = large.t()  # not contiguous

    found = float(total_norm(others))

    expected = math.sqrt(sum(float(one.double().square().sum()) for one in others))
    assert found == pytest.approx(expected, rel=2e-7)


def test_torchs_own_norm_of_a_large_gradient_is_not_exact() -> None:
    """Why total_norm exists. When this fails, torch has improved, and total_norm can go."""
    large = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))

    exact = float(large.double().norm())

    assert abs(float(nn.utils.get_total_norm([large])) / exact - 1) > 1e-5


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_large_gradient_that_is_not_finite_has_such_a_norm(value: float) -> None:
    large = torch.zeros(LARGE + 10)
    large[-1] = value

    assert not math.isfinite(float(total_norm([large])))

"""Optimizers and the learning rate schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config import schema
from dtrain.engine.optim import build_optimizer
from dtrain.engine.parameter_groups import parameter_groups
from dtrain.engine.state import device_slots, host_slots, slot_tensors


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = build_optimizer(
        parameter_groups(model, schema.Optim(weight_decay=0.0)), schema.Optim(name=name, learning_rate=0.05)
    )
    inputs = torch.randn(16, 4)

    losses = []
    for _ in range(20):
        loss = (model(inputs) - 1).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert losses[-1] < losses[0]


def _weights_after_steps(values: torch.Tensor, *, fused: bool | None, make: Any = nn.Parameter) -> torch.Tensor:
    """Weights after 20 steps on gradients of many sizes. `fused`: None for dtrain's choice, else torch's own AdamW."""
    parameter = make(values.clone())
    groups = [{"params": [parameter], "weight_decay": 0.01}]
    settings = schema.Optim(learning_rate=1e-3)
    optimizer = build_optimizer(groups, settings) if fused is None else torch.optim.AdamW(groups, lr=1e-3, fused=fused)
    draws = torch.Generator().manual_seed(1)
    factors = torch.randn(values.shape, generator=draws, dtype=torch.float64).to(values.dtype)
    for step in range(1, 21):
        (parameter * factors / step**4).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameter.detach()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.4e-7), (torch.float64, 4.5e-16), (torch.bfloat16, 8e-3)])
def test_fused_adamw_differs_from_torchs_plain_one_in_last_digits_only(dtype: torch.dtype, most: float) -> None:
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)

    ours = _weights_after_steps(values, fused=None)

    assert torch.equal(ours, _weights_after_steps(values, fused=True))
    assert float((ours - _weights_after_steps(values, fused=False)).abs().max()) <= most * float(values.abs().max())


def _transposed(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.t().contiguous().t())


def _part_of_a_larger_one(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([values, values], dim=1)[:, : values.shape[1]])


@pytest.mark.parametrize("make", [_transposed, _part_of_a_larger_one])
def test_a_parameter_that_is_not_contiguous_takes_the_same_steps(make: Any) -> None:
    values = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not make(values).is_contiguous()

    torch.testing.assert_close(
        _weights_after_steps(values, fused=None, make=make),
        _weights_after_steps(values, fused=False),
        rtol=0,
        atol=1e-14,
    )


def test_on_a_device_without_a_fused_kernel_adamw_still_steps() -> None:
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = build_optimizer([{"params": [parameter]}], schema.Optim())
    parameter.grad = torch.zeros(3, device="meta")

    optimizer.step()

    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("make", [nn.Parameter, _transposed, _part_of_a_larger_one])
@pytest.mark.parametrize("was_fused", [True, False])
def test_saved_moments_continue_with_the_same_steps(make: Any, was_fused: bool) -> None:
    values = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameter, whole = make(values), nn.Parameter(values.clone())
    old = torch.optim.AdamW([whole], fused=was_fused)  # an earlier version of dtrain did not fuse
    for gradient in gradients[:2]:
        whole.grad = gradient.clone()
        old.step()
    parameter.data.copy_(whole.data)
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.01}], schema.Optim(learning_rate=1e-3))

    optimizer.state[parameter] = device_slots(host_slots(slot_tensors(old.state[whole])), parameter, optimizer)
    for gradient in gradients[2:]:
        (parameter * gradient).sum().backward()
        whole.grad = gradient.clone()
        old.step()
        optimizer.step()
        optimizer.zero_grad()

    assert float(optimizer.state[parameter]["step"]) == 4
    torch.testing.assert_close(parameter.detach(), whole.detach(), rtol=0, atol=1e-14)


def test_saved_adafactor_rows_and_columns_keep_their_shapes() -> None:
    parameter = nn.Parameter(torch.ones(3, 5))
    optimizer = build_optimizer([{"params": [parameter]}], schema.Optim(name="adafactor"))
    parameter.grad = torch.ones(3, 5)
    optimizer.step()
    slots = slot_tensors(optimizer.state[parameter])

    loaded = device_slots(slots, parameter, optimizer)

    assert {name: slot.shape for name, slot in loaded.items()} == {name: slot.shape for name, slot in slots.items()}

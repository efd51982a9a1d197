"""Optimizers and the learning rate schedules."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

import pytest
import torch
from torch import nn

from dtrain.config import schema
from dtrain.engine.optim import build_optimizer, learning_rate
from dtrain.engine.parameter_groups import parameter_groups
from dtrain.engine.state import device_slots, host_slots, slot_tensors
from dtrain.errors import ConfigError


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


def test_the_first_step_runs_at_the_schedules_value_for_zero() -> None:
    rate = learning_rate(
        schema.Optim(learning_rate=1.0), schema.Schedule(name="linear", warmup_steps=2), total_steps=10
    )

    assert [rate(step) for step in range(4)] == pytest.approx([0.0, 0.5, 1.0, 0.875])
    assert rate(10) == 0.0


def test_a_warmup_ratio_is_a_share_of_all_steps() -> None:
    rate = learning_rate(
        schema.Optim(learning_rate=1.0), schema.Schedule(name="constant_with_warmup", warmup_ratio=0.4), total_steps=10
    )

    assert [rate(step) for step in range(6)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


WITH_WARMUP = [name for name in get_args(schema.Schedule.model_fields["name"].annotation) if name != "constant"]


@pytest.mark.parametrize("name", WITH_WARMUP)
def test_a_schedule_is_hugging_faces_own_at_every_step(name: str) -> None:
    from transformers import get_scheduler

    options = {"num_decay_steps": 1, "decay_type": "linear"} if name == "warmup_stable_decay" else {}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1e-6)
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=3, num_training_steps=10, scheduler_specific_kwargs=options
    )

    ours = learning_rate(
        schema.Optim(learning_rate=1e-6), schema.Schedule(name=name, warmup_ratio=0.25), total_steps=10
    )

    for step in range(10):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "cosine", "min_ratio": 0.2}, {0: 1.0, 5: 0.6, 10: 0.2}),
        (
            {"name": "cosine_with_restarts", "cycles": 2},
            {0: 1.0, 4: 0.5 + 0.5 * math.cos(0.8 * math.pi), 5: 1.0, 10: 0.0},
        ),
        ({"name": "polynomial", "power": 2.0, "min_ratio": 0.5}, {0: 1.0, 5: 0.5 + 0.5 * 0.25, 10: 0.5}),
        ({"name": "inverse_sqrt", "warmup_steps": 2, "timescale": 2}, {0: 0.0, 1: 0.5, 2: 1.0, 4: HALF, 8: 0.5}),
        (
            {"name": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 4},
            {0: 0.0, 1: 0.5, 2: 1.0, 6: 1.0, 7: 0.75, 8: 0.5, 10: 0.0},
        ),
        ({"name": "warmup_stable_decay", "decay_ratio": 0.4, "decay_shape": "1-sqrt"}, {6: 1.0, 8: 1 - HALF, 10: 0.0}),
        ({"name": "warmup_stable_decay", "min_ratio": 0.1, "decay_shape": "cosine"}, {8: 1.0, 9: 1.0, 10: 0.1}),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else None,
)
def test_a_schedules_options_give_the_values_worked_out_by_hand(
    settings: dict[str, Any], expected: dict[int, float]
) -> None:
    rate = learning_rate(schema.Optim(learning_rate=2.0), schema.Schedule(**settings), total_steps=10)

    assert {step: rate(step) for step in expected} == pytest.approx(
        {step: 2.0 * value for step, value in expected.items()}, abs=1e-12
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "linear", "min_ratio": 0.1}, "schedule.min_ratio is for schedule.name=cosine or polynomial"),
        ({"name": "cosine", "decay_steps": 3}, "schedule.decay_steps is for schedule.name=warmup_stable_decay"),
        (
            {"name": "warmup_stable_decay", "decay_steps": 3, "decay_ratio": 0.5},
            "set schedule.decay_steps or schedule.decay_ratio, not both",
        ),
    ],
)
def test_an_option_that_the_schedule_does_not_use_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        schema.Schedule(**settings)


def test_a_warm_up_and_a_decay_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 steps of warm-up and 5 of decay are more than the 10 steps of this run"):
        learning_rate(
            schema.Optim(), schema.Schedule(name="warmup_stable_decay", warmup_steps=6, decay_steps=5), total_steps=10
        )

"""Groups, optimizers and the learning rate."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from dtrain.config import schema
from dtrain.engine.optim import build_optimizer, learning_rate, parameter_groups
from tests.support import tiny


def names(model: nn.Module, group: dict) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is member for member in group["params"])}


def test_biases_and_norm_layers_are_not_decayed() -> None:
    model = tiny.bert()

    decayed, plain = parameter_groups(model, weight_decay=0.1)

    expected = {n for n, _ in model.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed) == expected
    assert names(model, plain) == {n for n, _ in model.named_parameters()} - expected


def test_only_what_learns_is_in_a_group_and_no_group_is_empty() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)

    groups = parameter_groups(model, weight_decay=0.1)

    assert [names(model, group) for group in groups] == [{"0.weight"}]


def test_what_was_thawed_has_groups_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    groups = parameter_groups(model, weight_decay=0.1, stages=[["1.weight", "1.bias"]])

    assert [names(model, group) for group in groups] == [{"0.weight"}, {"0.bias"}, {"1.weight"}, {"1.bias"}]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.0), schema.Optim(name=name, learning_rate=0.05))
    inputs = torch.randn(16, 4)

    losses = []
    for _ in range(20):
        loss = (model(inputs) - 1).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert losses[-1] < losses[0]


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

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1e-6)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)

    ours = learning_rate(
        schema.Optim(learning_rate=1e-6), schema.Schedule(name=name, warmup_ratio=0.25), total_steps=10
    )

    for step in range(10):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()

"""FusedAdamW takes torch's own fused steps, to the last bit, and keeps torch's state."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtrain.engine.fused_adamw import FusedAdamW

STEPS = 12
Optimizer = torch.optim.AdamW


def _optimizer(make: Callable[..., Optimizer], **options: object) -> Optimizer:
    draws = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=draws)) for shape in ((5, 7), (300,), (), (2, 3, 4))]
    groups = [
        {"params": parameters[:2], "weight_decay": 0.1},
        {"params": parameters[2:], "weight_decay": 0.0},
        {"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0},
    ]
    return make(groups, lr=1e-2, **options)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _set_gradients(optimizer: Optimizer, step: int, *, without: int | None = None) -> None:
    draws = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(_parameters(optimizer)):
        gradient = torch.randn(parameter.shape, generator=draws) / (step + 1) ** 3
        parameter.grad = None if index == without else gradient
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (step + 1)


def _step(step: int, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        _set_gradients(optimizer, step)
        optimizer.step()


def _assert_equal(ours: Optimizer, torchs: Optimizer) -> None:
    for one, other in zip(_parameters(ours), _parameters(torchs), strict=True):
        assert torch.equal(one, other)
        assert ours.state[one].keys() == torchs.state[other].keys()
        for name, slot in ours.state[one].items():
            assert torch.equal(slot, torchs.state[other][name]), name


def _pair() -> tuple[Optimizer, Optimizer]:
    return _optimizer(FusedAdamW), _optimizer(torch.optim.AdamW, fused=True)


@pytest.mark.parametrize("without", [None, 0, 2])
def test_the_steps_have_torchs_bits_also_where_a_gradient_is_missing(without: int | None) -> None:
    ours, torchs = _pair()

    for step in range(STEPS):
        for optimizer in (ours, torchs):
            _set_gradients(optimizer, step, without=without if step in (0, 5, 6) else None)
            optimizer.step()

    _assert_equal(ours, torchs)
    counts = {float(ours.state[parameter]["step"]) for parameter in _parameters(ours)}
    assert counts == ({STEPS} if without is None else {STEPS, STEPS - 3})


def test_a_state_that_was_loaded_or_replaced_is_the_one_that_counts() -> None:
    ours, torchs = _pair()
    for step in range(3):
        _step(step, ours, torchs)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for optimizer in (ours, torchs):
        first, second = _parameters(optimizer)[:2]
        optimizer.state[first] = {name: torch.full_like(slot, 2.0) for name, slot in optimizer.state[first].items()}
        optimizer.state[second]["step"] = torch.tensor(9.0)
        optimizer.state[second]["exp_avg"] = torch.ones(300)
    for step in range(3, 6):
        _step(step, ours, torchs)

    _assert_equal(ours, torchs)
    assert float(ours.state[_parameters(ours)[1]]["step"]) == 12


def test_a_cleared_state_starts_again() -> None:
    ours, torchs = _pair()
    for step in range(4):
        _step(step, ours, torchs)
        if step == 1:
            ours.state.clear()
            torchs.state.clear()

    _assert_equal(ours, torchs)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_grad_scaler_is_obeyed(overflows: bool) -> None:
    ours, torchs = _pair()
    for optimizer in (ours, torchs):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(4):
            _set_gradients(optimizer, step)
            for parameter in _parameters(optimizer):
                assert parameter.grad is not None
                parameter.grad *= 8.0
            if overflows and step == 2:
                _parameters(optimizer)[0].grad.fill_(torch.inf)  # type: ignore[union-attr]
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update(8.0)

    _assert_equal(ours, torchs)
    assert float(ours.state[_parameters(ours)[0]]["step"]) == (3 if overflows else 4)


def test_the_hooks_of_optimizers_are_called_once() -> None:
    torch.optim.Adam([nn.Parameter(torch.ones(1))])  # torch adds the hooks to the class of its first optimizer
    ours, torchs = _pair()
    calls: list[str] = []
    for optimizer in (ours, torchs):
        optimizer.register_step_post_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("all"))
    try:
        for step in range(3):
            _step(step, ours, torchs)
    finally:
        handle.remove()

    assert sorted(calls) == ["all"] * 6 + ["own"] * 6
    _assert_equal(ours, torchs)


def test_clearing_the_state_frees_the_moments() -> None:
    """A rollback and a thaw clear it before the next engine makes its own."""
    ours, _ = _pair()
    for step in range(3):
        _step(step, ours)
    moments = [weakref.ref(state["exp_avg"]) for state in ours.state.values()]

    ours.state.clear()

    assert [moment() for moment in moments] == [None] * len(moments)

"""An update that the device decides about: the bits of one that the host decides about. Here the device is the CPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine import single
from dtrain.engine.build import build_engine
from dtrain.engine.clipping import clip, clip_on_device
from dtrain.engine.protocol import StepWeight
from dtrain.engine.single import SingleEngine
from tests.support import tiny, training
from tests.support.multirank import run_ranks
from tests.support.training import Setting

SETTING = Setting(optimizer="adamw", learning_rate=1e-2)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "DECIDING_DEVICES", ("cpu",))


def gradients(engine: Any, step: int, *, value: float | None = None) -> None:
    """Sets the gradients of a step; every third parameter has none in its first two steps."""
    draws = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(engine.module.parameters()):
        if index % 3 or step > 1:
            parameter.grad = torch.randn(parameter.shape, generator=draws)
    if value is not None:
        next(p for p in engine.module.parameters() if p.grad is not None).grad.view(-1)[0] = value


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """Weights, moments and counts. A parameter without a step has no moments, or zeros: they come to the same."""
    found: dict[str, torch.Tensor] = {}
    for entry in engine.named_state(here=True):
        found[entry.name] = entry.value.clone()
        found |= {f"{entry.name}/{slot}": tensor.clone() for slot, tensor in entry.slots.items() if tensor.any()}
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# What each step is: the value of one gradient, and whether to skip it for another reason.
PLANS: dict[str, list[tuple[float | None, bool]]] = {
    "all good": [(None, False)] * 4,
    "a bad loss in the middle": [(None, False), (None, True), (None, False), (None, False)],
    "a bad loss at the first step": [(None, True), (None, False), (None, False)],
    "a gradient that is not a number": [(None, False), (math.nan, False), (None, False)],
    "an infinite gradient": [(None, False), (None, False), (math.inf, False), (None, False)],
    "both": [(None, False), (math.nan, True), (None, False)],
}


@pytest.mark.parametrize("limit", [None, 0.4, 1e6])
@pytest.mark.parametrize("plan", PLANS)
def test_the_device_takes_the_steps_that_the_host_takes(plan: str, limit: float | None) -> None:
    setting = replace(SETTING, max_grad_norm=limit)
    ours, theirs = (training.build(ONE_PROCESS, setting).engine for _ in range(2))
    for step, (value, skip) in enumerate(PLANS[plan]):
        gradients(ours, step, value=value)
        gradients(theirs, step, value=value)

        norm = float(ours.step_on_device(torch.tensor(skip)))

        expected = theirs.step(StepWeight(1.0, 1.0), discard=skip)
        assert norm == expected.grad_norm or (math.isnan(norm) and math.isnan(expected.grad_norm))
        assert all(parameter.grad is None for parameter in ours.module.parameters())
        assert_same(state_of(ours), state_of(theirs))


def test_an_update_that_ignores_the_device_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SingleEngine.step_on_device
    never = torch.tensor(False)
    monkeypatch.setattr(SingleEngine, "step_on_device", lambda engine, _skip: real(engine, never))

    with pytest.raises(AssertionError):
        test_the_device_takes_the_steps_that_the_host_takes("a bad loss in the middle", None)


def test_a_step_without_any_gradient_has_norm_0_and_changes_nothing() -> None:
    engine = training.build(ONE_PROCESS, SETTING).engine
    before = state_of(engine)

    assert float(engine.step_on_device(torch.tensor(False))) == 0.0
    assert_same(state_of(engine), before)


@pytest.mark.parametrize("scale", [1.0, 1e-4, math.inf])
@pytest.mark.parametrize("limit", [None, 0.1, 3.0, 1e6])
def test_clipping_on_the_device_has_the_bits_of_clipping_on_the_host(limit: float | None, scale: float) -> None:
    def made() -> list[nn.Parameter]:
        draws = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2,))]
        for parameter in parameters[:2]:
            parameter.grad = torch.randn(parameter.shape, generator=draws) * scale
        return parameters

    ours, theirs = made(), made()

    norm = clip_on_device(iter(ours), limit)

    assert float(norm) == clip(iter(theirs), limit)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad) or not math.isfinite(scale)


# Who can


def decides(context: RankContext, changes: dict[str, Any], *, devices: tuple[str, ...] = ("cpu",)) -> bool:
    single.DECIDING_DEVICES = devices  # in a process of its own, where there are several ranks
    setting = replace(SETTING, **changes)
    engine = build_engine(tiny.bert(dropout=0.0, layers=1), setting.config(), context)
    return bool(engine.decides_on_device)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"precision": "bf16"}, True),
        ({"precision": "fp16"}, False),  # the host sets the loss scale
        ({"optimizer": "sgd"}, False),  # not fused
        ({"optimizer": "adafactor"}, False),
    ],
)
def test_fp32_and_bf16_with_a_fused_optimizer_are_decided_on_the_device(
    changes: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "DECIDING_DEVICES", single.DECIDING_DEVICES)

    assert decides(ONE_PROCESS, changes) == expected


def test_the_cpu_decides_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    assert single.DECIDING_DEVICES == ("cuda",)
    assert not decides(ONE_PROCESS, {}, devices=single.DECIDING_DEVICES)


@pytest.mark.ranks
def test_on_ranks_ddp_decides_on_the_device_unless_the_host_has_to_know() -> None:
    assert run_ranks(of_many, 2) == [[True, True, False, False]] * 2


def of_many(context: RankContext) -> list[bool]:
    cases: list[dict[str, Any]] = [
        {},
        {"gradient_wire": "bf16"},
        {"powersgd": {"rank": 1}},  # its error feedback is reset after a skipped step
        {"local_steps": 2},
    ]
    return [decides(context, case) for case in cases]

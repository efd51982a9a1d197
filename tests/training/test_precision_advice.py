"""The line of --dry-run about bf16: where it is shown, and that it changes nothing."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.models.placement import GATHER_ATTRIBUTE
from dtrain.models.unpadding import Unpadding
from dtrain.training import precision_advice
from dtrain.training.build import PreparedModel, prepare_training, step_plan
from dtrain.training.frozen_cache import FrozenCache
from dtrain.training.precision_advice import describe_precision
from tests.support import tiny, training
from tests.support.training import Setting


def line(setting: Setting, module: nn.Module | None = None) -> str | None:
    config, learns = setting.config(), training.task(setting)
    plan = step_plan(config, learns)
    prepared = prepare_training(module or tiny.bert(), config, learns, plan)
    return describe_precision(config, learns, prepared, plan)


def test_a_run_in_fp32_is_told_what_bf16_gains() -> None:
    said = line(Setting())

    assert said is not None
    assert said.startswith("precision  ")
    assert "bf16" in said


def test_a_run_in_another_precision_is_not() -> None:
    assert line(Setting(precision="bf16")) is None
    assert line(Setting(double=True), tiny.bert().double()) is None, "autocast leaves float64 alone"


def test_a_model_that_would_be_compiled_is_not_timed() -> None:
    said = line(Setting(compile=True))

    assert said is not None
    assert said.startswith("precision  bf16 was not timed, because model.compile=true")


def test_a_sharded_model_is_not_timed_because_the_ranks_clocks_differ() -> None:
    module = tiny.bert()
    module.__dict__[GATHER_ATTRIBUTE] = nullcontext

    said = line(Setting(), module)

    assert said is not None
    assert said.startswith("precision  bf16 was not timed, because the engine shards the model")


def test_where_another_setting_forbids_bf16_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_advice, "_allows_bf16", lambda _config: False)

    assert line(Setting()) is None


def test_settings_that_forbid_bf16_are_known() -> None:
    plain = Setting().config()
    with_wire = Setting(engine="deepspeed", zero_stage=2, gradient_wire="bf16").config()

    assert precision_advice._allows_bf16(plain)
    assert not precision_advice._allows_bf16(with_wire)


def test_a_slow_model_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_advice, "MAX_ROW_S", 0.0)

    said = line(Setting())

    assert said is not None
    assert said.startswith("precision  bf16 was not timed: forward and backward of a single row take")


class Normed(nn.Module):
    """A classifier with running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        class Output:
            logits = self.head(self.dropout(self.norm(self.embed(input_ids).mean(dim=1))))

        return Output()


def test_weights_statistics_modes_gradients_and_random_states_stay() -> None:
    setting = Setting()
    config, learns, module = setting.config(), training.task(setting), Normed()
    plan = step_plan(config, learns)
    cache = FrozenCache(config, learns, plan, total_steps=1, train_mode=lambda part: part.train() and None)
    prepared = PreparedModel(module, lambda _module, _epoch: [], cache._train_mode, Unpadding("off", ""), cache)
    module.eval()
    module.head.train()

    def state() -> tuple[Any, ...]:
        weights = {name: value.tolist() for name, value in module.state_dict().items()}
        modes = [part.training for part in module.modules()]
        gradients = [parameter.grad for parameter in module.parameters()]
        draws = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        return weights, modes, gradients, draws

    before = state()
    said = describe_precision(config, learns, prepared, plan)

    assert said is not None
    assert state() == before

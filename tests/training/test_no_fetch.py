"""No value is fetched from the device between two log points: shown on torch's meta device, where a fetch raises an error.

Tensors there have shapes and no values, so `.item()`, `.tolist()`, `float()`, `bool()`, `.cpu()` and boolean indexing fail,
and so does an operation with a tensor that was left on the CPU. Every engine is tested in tests/engine/test_on_meta.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine import schedules
from dtrain.engine.build import build_engine
from dtrain.training import build as construct
from dtrain.training.look_ahead import LookAhead
from dtrain.training.loop import LoopSettings, batches_ahead, train
from dtrain.training.monitors.logging_steps import LogSteps
from dtrain.training.monitors.protocol import RunState, StepEnd
from tests.support import training
from tests.support.faults import Journal
from tests.support.on_meta import stand_for_a_gpu, usual_monitors
from tests.support.training import Setting

LOG_EVERY = 6
SETTING = Setting(
    rows=200, steps=12, global_batch_size=8, micro_batch_size=3, optimizer="adamw", learning_rate=1e-3, dropout=0.1
)


class Classifier(nn.Module):
    """Embeds, averages, classifies. Transformers' own models look at the mask of a padded batch, which is a fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(100, 8), nn.LayerNorm(8)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_more: Any) -> Any:
        mask = attention_mask[..., None]
        mean = (self.norm(self.embedding(input_ids)) * mask).sum(dim=1) / mask.sum(dim=1)
        return SimpleNamespace(logits=self.head(self.dropout(mean)))


class Steps(Journal):
    """The log of the other monitors, and a list of the steps that they have seen."""

    def needs_at_once(self, end: StepEnd) -> bool:
        return False


def train_on_meta(
    monkeypatch: pytest.MonkeyPatch, *, module: type[nn.Module] = Classifier, log_every: int = LOG_EVERY
) -> tuple[Steps, str]:
    """As `train_until_a_fetch`, on the meta device."""
    stand_for_a_gpu(monkeypatch)
    return train_until_a_fetch(module().to("meta"), log_every=log_every)


def train_until_a_fetch(module: nn.Module, *, log_every: int = LOG_EVERY) -> tuple[Steps, str]:
    """A run from step 2 on with the usual monitors, until a fetch raises an error: the steps it saw, and the functions."""
    setting = SETTING
    config, task = setting.config(), training.task(setting)
    state = RunState(step=1, updates=1)
    settings = LoopSettings(
        plan=construct.step_plan(config, task),
        total_steps=setting.steps,
        seed=7,
        workers=0,
        loss_is_scaled=False,
        learning_rate=schedules.learning_rate(config.optim, config.schedule, total_steps=setting.steps),
        train_mode=lambda module: module.train() and None,
    )
    engine = build_engine(module, config, ONE_PROCESS)
    assert engine.decides_on_device
    prepared = construct.PreparedModel  # only a thaw would need one
    run = training.Run(config, ONE_PROCESS, prepared, task, engine, settings, state)  # type: ignore[arg-type]
    steps = Steps()
    monitors = [
        steps,
        LogSteps(log_every, steps),
        *usual_monitors(steps, state, module, ONE_PROCESS),
    ]
    run.look_ahead = LookAhead(batches_ahead(settings, task, engine, start=1), task, ONE_PROCESS)
    try:
        with pytest.raises((RuntimeError, NotImplementedError)) as raised:
            train(run, monitors)
    finally:
        run.look_ahead.close()
    return steps, " ".join(entry.name for entry in raised.traceback)


def test_nothing_is_fetched_before_the_next_log_point(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, where = train_on_meta(monkeypatch)

    # Step 6 is logged: its losses are fetched before its update, when step 5 has been read.
    assert [record.step for record in steps.records] == [2, 3, 4, 5], where
    assert "_update_at_once to_floats" in where
    assert [record.loss for record in steps.records] == [3.0 * 0.5 / 8] * 4


@pytest.mark.parametrize("fetch", [torch.Tensor.item, torch.Tensor.tolist, float, bool, torch.Tensor.cpu])
def test_a_model_that_fetches_is_found_out_at_its_first_step(
    fetch: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fetching(Classifier):
        def forward(self, *args: Any, **more: Any) -> Any:
            output = super().forward(*args, **more)
            fetch(output.logits.detach().sum())
            return output

    steps, where = train_on_meta(monkeypatch, module=Fetching)

    assert not steps.records
    assert "run_micro_batches" in where


def test_a_monitor_that_needs_each_step_makes_the_first_one_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, where = train_on_meta(monkeypatch, log_every=1)

    assert not steps.records
    assert "_update_at_once to_floats" in where


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_it_before_the_next_log_point() -> None:
    module = Classifier().to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps, where = train_until_a_fetch(module)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert [record.step for record in steps.records] == [2, 3, 4, 5]
    assert "_update_at_once to_floats" in where
    assert all(0.1 < record.loss < 2.0 and record.grad_norm > 0 for record in steps.records)

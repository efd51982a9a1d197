"""The probe before training, and running statistics that only counted micro-batches may move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dtrain.data.order import StepPlan
from dtrain.engine.unused_parameters import parameters_without_gradient
from dtrain.models.freezing import frozen_statistics, train_mode
from dtrain.tasks.row_lengths import row_lengths
from tests.support import tiny, training
from tests.support.training import Setting


class Normed(nn.Module):
    """A classifier with running statistics and a part that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.norm = nn.BatchNorm1d(8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.norm(self.embed(input_ids).mean(dim=1))))


def moving(module: nn.Module) -> None:
    train_mode(module, batch_norm="train")


def test_the_probe_names_what_gets_no_gradient_and_moves_nothing() -> None:
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = StepPlan(21, 8, 3, seed=0, shuffle=True)

    found = parameters_without_gradient(model, training.task(Setting()), plan, train_mode=moving)

    assert found == ["unused.weight", "unused.bias"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Choosy(Normed):
    """Drops a layer always, unless LayerDrop is off, and has a part that only rows with token 7 use."""

    def __init__(self) -> None:
        super().__init__()
        self.layerdrop = 1.0
        self.layer, self.seldom = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed(input_ids).mean(dim=1)
        if torch.rand([]) >= self.layerdrop:
            hidden = self.layer(hidden)
        if bool((input_ids == 7).any()):
            hidden = self.seldom(hidden)
        return SimpleNamespace(logits=self.head(self.norm(hidden)))


def test_the_probe_does_not_name_a_dropped_layer_nor_a_part_that_a_later_micro_batch_uses() -> None:
    model, learns = Choosy(), training.task(Setting())
    rows = learns.splits["train"][[*range(21)]]
    rows["input_ids"] = [[9] * len(ids) for ids in rows["input_ids"]]
    plan = StepPlan(21, 8, 3, seed=0, shuffle=False)
    rows["input_ids"][5][0] = 7  # micro-batch 1
    learns.splits = {**learns.splits, "train": tiny.Table(rows)}

    assert parameters_without_gradient(model, learns, plan, train_mode=moving) == ["unused.weight", "unused.bias"]
    assert model.layerdrop == 1.0


class ForLongRows(Normed):
    """Has a part that only rows above 12 tokens use."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed(input_ids).mean(dim=1)
        return SimpleNamespace(logits=self.head(self.norm(self.unused(hidden) if input_ids.shape[1] > 12 else hidden)))


def test_the_probe_sees_long_rows_where_a_step_is_sorted_by_length() -> None:
    learns = training.task(Setting(rows=64, table=True))
    lengths = row_lengths(learns, "train")
    assert lengths is not None
    plan = StepPlan(64, 64, 4, seed=0, shuffle=True, lengths=lengths, sort_by_length=True)
    shortest = [max(lengths.width[index] for index in batch) for batch in plan.micro_batches(0)[:4]]
    assert max(shortest) <= 12 < max(lengths.width)

    assert parameters_without_gradient(ForLongRows(), learns, plan, train_mode=moving) == []


def test_held_statistics_stay_and_move_again_afterwards() -> None:
    model = Normed()
    moving(model)
    before = model.norm.running_mean.clone()

    with frozen_statistics(model):
        model(torch.arange(6).reshape(2, 3))
    assert torch.equal(model.norm.running_mean, before)

    model(torch.arange(6).reshape(2, 3))
    assert not torch.equal(model.norm.running_mean, before)

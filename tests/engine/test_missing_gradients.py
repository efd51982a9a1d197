"""Parts that some micro-batches leave out: dropped layers, a starved expert. Ranks take the steps of one process.

Each micro-batch draws which parts it uses, so ranks differ in the last micro-batch, in all of them, or in none.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from tests.support import training
from tests.support.multirank import run_ranks
from tests.support.training import Setting

pytestmark = pytest.mark.ranks

SGD = Setting(
    steps=8, rows=64, global_batch_size=10, micro_batch_size=2, learning_rate=0.1, max_grad_norm=None, find_unused=True
)
ADAM = replace(SGD, optimizer="adamw", learning_rate=1e-2, max_grad_norm=1.0, warmup=0)
"""AdamW would decay weights and moments of a part whose gradient is 0 instead of None."""

SETTINGS = {
    "sgd": SGD,
    "adamw": ADAM,
    "many buckets": replace(ADAM, bucket_mb=0.002),
    "one micro-batch a rank": replace(ADAM, global_batch_size=6),
    "checkpointing": replace(ADAM, checkpointing=True),
    "logged": replace(ADAM, log_gradients=1),
}


class LayerDrop(nn.Module):
    """Four layers that are each dropped by half, two experts of which the router starves one, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.checkpointing = False

    def gradient_checkpointing_enable(self, _options: Any) -> None:
        self.checkpointing = True

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            if not self.training or torch.rand([]) >= 0.5:
                hidden = hidden + self._apply(layer, hidden)
        # Expert 1 gets a token in few micro-batches, expert 2 in none.
        chosen = 1 if bool((input_ids[:, 1] % 7 == 0).any()) else 0
        hidden = hidden + self.experts[chosen](hidden)
        return SimpleNamespace(logits=self.head(hidden.mean(dim=1)))

    def _apply(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if not self.checkpointing:
            return torch.tanh(layer(hidden))
        made: torch.Tensor = torch.utils.checkpoint.checkpoint(
            lambda x: torch.tanh(layer(x)), hidden, use_reentrant=False
        )
        return made


def dropped(context: RankContext, settings: dict[str, Setting]) -> dict[str, Any]:
    """Collective. The steps, the final weights, and the moments, for each setting."""
    found = {}
    for name, setting in settings.items():
        run, recorder, norms = training.build(context, setting, LayerDrop()), training.Recorder(), Norms()
        engine = run.go(recorder, norms)
        slots = {
            f"{entry.name} {slot}": value.tolist()
            for entry in engine.named_state(here=True)
            for slot, value in entry.slots.items()
        }
        found[name] = {
            "steps": recorder.steps,
            "weights": training.weights_of(engine),
            "slots": slots,
            "norms": norms.names,
        }
        engine.release()
    return found


class Norms:
    """Keeps whose gradient was measured in each step."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def after_step(self, record: Any) -> Any:
        self.names.append(sorted(record.gradient_norms or {}))
        return 0


@cache
def found(world_size: int) -> dict[str, Any]:
    if world_size == 1:
        return dropped(ONE_PROCESS, SETTINGS)
    ranks = run_ranks(dropped, world_size, SETTINGS)
    assert [rank["adamw"]["steps"] for rank in ranks[1:]] == [ranks[0]["adamw"]["steps"]] * (world_size - 1)
    first: dict[str, Any] = ranks[0]
    return first


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_that_micro_batches_leave_out_learn_as_on_one_process(world_size: int, name: str) -> None:
    one, many = found(1)[name], found(world_size)[name]

    assert training.worst(one, many) <= 1e-6
    assert training.worst(one, many, "grad_norm") <= 1e-5
    assert training.apart(one, many) <= 2e-6
    assert many["norms"] == one["norms"]
    assert many["slots"].keys() == one["slots"].keys()
    for key, value in one["slots"].items():
        torch.testing.assert_close(torch.tensor(many["slots"][key]), torch.tensor(value), rtol=1e-4, atol=1e-6)


def test_the_model_leaves_out_what_it_should() -> None:
    steps = {key: value for key, value in found(1)["adamw"]["slots"].items() if key.endswith("weight step")}

    assert steps["head.weight step"] == 8
    assert 0 < steps["experts.1.weight step"] < 8, "starved in some step"
    assert "experts.2.weight step" not in steps
    assert any(0 < steps[f"layers.{index}.weight step"] < 8 for index in range(4))

"""Parts that some micro-batches leave out: dropped layers, a starved expert. Ranks take the steps of one process.

Each micro-batch draws which parts it uses, so ranks differ in the last micro-batch, in all of them, or in none.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import M2M100Config

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine.missing_gradients import refuse_layer_drop
from dtrain.errors import ConfigError
from dtrain.training.monitors.replicas import hashes_of
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

INEXACT = {
    "bf16 wire": replace(SGD, gradient_wire="bf16"),
    "powersgd": replace(SGD, find_unused=False, powersgd={"rank": 1, "start_step": 2, "min_rate": 1.0}),
    "local steps": replace(ADAM, local_steps=2),
}
"""Other rounding, or another algorithm."""


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
                hidden = hidden + self._run(layer, hidden)
        # Expert 1 gets a token in few micro-batches, expert 2 in none.
        chosen = 1 if bool((input_ids[:, 1] % 7 == 0).any()) else 0
        hidden = hidden + self.experts[chosen](hidden)
        return SimpleNamespace(logits=self.head(hidden.mean(dim=1)))

    def _run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if not self.checkpointing:
            return torch.tanh(layer(hidden))
        made: torch.Tensor = torch.utils.checkpoint.checkpoint(
            lambda x: torch.tanh(layer(x)), hidden, use_reentrant=False
        )
        return made


class Chooses(nn.Module):
    """Two experts of one size, of which each micro-batch uses one: ZeRO would add up gradients of different experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(64, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.experts[int(torch.rand([]) < 0.5)](self.embed(input_ids))
        return SimpleNamespace(logits=self.head(hidden.mean(dim=1)))


def dropped(context: RankContext, settings: dict[str, Setting]) -> dict[str, Any]:
    """Collective. The steps, the final weights, and the moments, for each setting."""
    found: dict[str, Any] = {"hashes": []}
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
        found["hashes"].append(hashes_of(engine.module)[1].tolist())
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
        return dropped(ONE_PROCESS, SETTINGS | INEXACT)
    ranks = run_ranks(dropped, world_size, SETTINGS | INEXACT)
    assert all(rank["hashes"] == ranks[0]["hashes"] for rank in ranks[1:])
    first: dict[str, Any] = ranks[0]
    return first


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_parts_that_micro_batches_leave_out_learn_as_on_one_process(world_size: int, name: str) -> None:
    one, many = found(1)[name], found(world_size)[name]

    assert training.worst(one, many) <= 1e-6
    assert training.worst(one, many, "grad_norm") <= 1e-5
    assert training.apart(one, many) <= 2e-6
    assert many["norms"] == one["norms"]
    assert many["slots"].keys() == one["slots"].keys()
    for key, value in one["slots"].items():
        torch.testing.assert_close(torch.tensor(many["slots"][key]), torch.tensor(value), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(INEXACT))
@pytest.mark.parametrize("world_size", [2, 3])
def test_other_ways_to_exchange_follow_one_process_closely(world_size: int, name: str) -> None:
    one, many = found(1)[name], found(world_size)[name]

    if name == "local steps":  # another algorithm: all ranks have equal weights, which `found` has checked
        assert all(math.isfinite(step["loss"]) for step in many["steps"])
    else:
        assert training.worst(one, many) <= 0.02


def test_the_model_leaves_out_what_it_should() -> None:
    steps = {key: value for key, value in found(1)["adamw"]["slots"].items() if key.endswith("weight step")}

    assert steps["head.weight step"] == 8
    assert 0 < steps["experts.1.weight step"] < 8, "starved in some step"
    assert "experts.2.weight step" not in steps
    assert any(0 < steps[f"layers.{index}.weight step"] < 8 for index in range(4))


ZERO_0 = replace(ADAM, find_unused=False)


def sharded(context: RankContext) -> dict[str, Any]:
    """Collective. The same under DeepSpeed: what stage 0 gives, and how the others refuse."""
    found = dropped(context, {"zero0": replace(ZERO_0, engine="deepspeed", zero_stage=0)})
    for stage in (1, 2):
        run = training.build(context, replace(SGD, engine="deepspeed", zero_stage=stage, find_unused=False), Chooses())
        before = training.weights_of(run.engine)
        with pytest.raises(ConfigError) as refusal:
            run.go()
        found[str(stage)] = [str(refusal.value), training.weights_of(run.engine) == before]
        run.engine.release()
    return found


def test_zero_0_learns_as_one_process_and_the_others_refuse_a_step_that_leaves_parts_out() -> None:
    one = dropped(ONE_PROCESS, {"zero0": ZERO_0})["zero0"]

    ranks = run_ranks(sharded, 2, timeout_s=120)

    assert training.worst(one, ranks[0]["zero0"]) <= 1e-6
    assert training.apart(one, ranks[0]["zero0"]) <= 2e-6
    for rank in ranks:
        for stage in ("1", "2"):
            message, is_untouched = rank[stage]
            assert "A micro-batch of this step did not use experts." in message
            assert is_untouched


def test_zero_refuses_layer_drop_with_a_cure() -> None:
    model = SimpleNamespace(config=M2M100Config(encoder_layerdrop=0.05, decoder_layerdrop=0.0))

    with pytest.raises(ConfigError, match=r"model\.config\.encoder_layerdrop=0"):
        refuse_layer_drop(cast(nn.Module, model), 2)

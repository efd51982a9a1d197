"""FSDP2 takes the steps of one process, with every option, and holds about 1/W of everything on each rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine import single
from dtrain.engine.build import place
from dtrain.engine.fsdp_sharding import LayerCalls, sharded_parts
from dtrain.engine.sharded_tensor import is_sharded, local_rows
from dtrain.errors import ConfigError
from dtrain.models.placement import GATHER_ATTRIBUTE
from dtrain.training import build as construct
from dtrain.training.evaluation import evaluate
from tests.support import tiny, training
from tests.support.memory import own_memory
from tests.support.multirank import RanksFailed, run_ranks
from tests.support.training import Setting, apart, worst

pytestmark = pytest.mark.ranks

PLAIN = Setting(engine="fsdp")
THAWING = replace(
    PLAIN,
    optimizer="adamw",
    learning_rate=1e-2,
    layer_decay=0.8,
    steps=8,
    freeze=("embeddings", "encoder.layer[:1]"),
    thaw=((1, "encoder.layer[0]"),),
)
SETTINGS = {
    "plain": PLAIN,
    "momentum": replace(PLAIN, momentum=0.9, learning_rate=0.1),
    "thawing": THAWING,
    "frozen backbone": replace(PLAIN, freeze=("base_model",), freeze_method="no_grad"),
    "accumulation": replace(PLAIN, micro_batch_size=1),
    "one example": replace(PLAIN, global_batch_size=1),
    "checkpointing": replace(PLAIN, checkpointing=True),
    "offload": replace(PLAIN, offload=True),
    "gathered in between": replace(PLAIN, reshard_after_forward=False),
    "token budget": replace(PLAIN, dropout=0.0, table=True, micro_batch_tokens=40),
    "norms": replace(PLAIN, log_gradients=2),
}


def alone(name: str) -> dict[str, Any]:
    return training.run(
        ONE_PROCESS, replace(SETTINGS[name], engine="single", offload=False, reshard_after_forward=True)
    )


def every_setting(context: RankContext, broken: str | None = None) -> dict[str, Any]:
    """Collective. Trains once with each setting."""
    names = SETTINGS if broken is None else ["plain"]
    return {name: training.run(context, replace(SETTINGS[name], broken=broken)) for name in names}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return {name: alone(name) for name in SETTINGS}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    is_adamw = any("exp_avg" in slots for slots in one["slots"].values())
    assert worst(one, other) <= (1e-5 if is_adamw else 1e-6)
    assert worst(one, other, "grad_norm") <= (1e-4 if is_adamw else 1e-5)
    assert one["slots"] == other["slots"]
    assert is_adamw or apart(one, other) <= 2e-6


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fsdp_takes_the_steps_of_one_process(references: dict[str, dict[str, Any]], world_size: int) -> None:
    ranks = run_ranks(every_setting, world_size, timeout_s=120)

    for name, one in references.items():
        assert_same(one, ranks[0][name])
        assert all(rank[name]["steps"] == ranks[0][name]["steps"] for rank in ranks), name
        assert ranks[0][name]["lock_step"]


@pytest.mark.parametrize("broken", training.BREAKS)
def test_a_broken_run_is_rejected(references: dict[str, dict[str, Any]], broken: str) -> None:
    ranks = run_ranks(every_setting, 2, broken)

    with pytest.raises(AssertionError):
        assert_same(references["plain"], ranks[0]["plain"])


ADAMW = replace(PLAIN, optimizer="adamw", learning_rate=1e-2)


def on_device(context: RankContext) -> dict[str, Any]:
    """Collective. Trains as on a GPU, where the device decides whether the weights change."""
    single.DECIDING_DEVICES = ("cpu",)  # this process ends with the test
    assert training.build(context, ADAMW).engine.decides_on_device
    return training.run(context, ADAMW)


def test_an_update_that_the_device_decides_about_is_the_same() -> None:
    one = training.run(ONE_PROCESS, replace(ADAMW, engine="single"))

    for rank in run_ranks(on_device, 2):
        assert worst(one, rank) <= 1e-5
        assert worst(one, rank, "grad_norm") <= 1e-4
        assert rank["updates"] == one["updates"]


# What a rank holds


def held(context: RankContext) -> dict[str, Any]:
    """Collective. Trains, and counts the bytes of this rank's parameters and moments, and what FSDP2 sends."""
    run = training.build(context, replace(PLAIN, optimizer="adamw", learning_rate=1e-3, steps=2), tiny.bert(layers=3))
    traffic = context.traffic.copy()
    engine = run.go()
    weights = {name: local_rows(p).nbytes for name, p in engine.module.named_parameters()}
    moments = [shard.tensor.nbytes for shard in engine.local_state() if shard.slot in ("exp_avg", "exp_avg_sq")]
    return {
        "layers": len(sharded_parts(engine.module)),
        "whole": 4 * sum(p.numel() for p in engine.module.parameters()),
        "weights": sum(weights.values()),
        "moments": sum(moments),
        "root": 4 * sum(p.numel() for name, p in engine.module.named_parameters() if ".layer." not in name),
        "sent": context.traffic.since(traffic).payload_bytes,
        "collectives": context.traffic.since(traffic).collectives,
        "is_complete": context.traffic.is_complete,
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_holds_its_share_and_sends_every_gradient_once(world_size: int) -> None:
    ranks = run_ranks(held, world_size)

    whole = ranks[0]["whole"]
    assert sum(rank["weights"] for rank in ranks) == whole
    assert sum(rank["moments"] for rank in ranks) == 2 * whole
    for rank in ranks:
        assert rank["layers"] == 4  # three, and the root
        assert rank["weights"] == pytest.approx(whole / world_size, rel=0.02)
        assert rank["moments"] == pytest.approx(2 * whole / world_size, rel=0.02)
        assert rank["is_complete"]


# Models


def shared_layers() -> nn.Module:
    """An ALBERT: one layer, called three times in a pass."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AlbertConfig(
            vocab_size=len(tiny.SPECIAL) + len(tiny.WORDS),
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        return AlbertForSequenceClassification(config)


class Branches(nn.Module):
    """Two lists of layers that share one, a list in a list, and a layer whose rows are fewer than the ranks."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(8, 8)
        self.embed = nn.Embedding(25, 8)
        self.first = nn.ModuleList([nn.Linear(8, 8), shared])
        self.second = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.ModuleList([shared])])
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        mask = attention_mask[..., None].float()
        hidden = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        for layer in [*self.first, *self.second[0], *self.second[1]]:
            hidden = hidden + torch.tanh(layer(hidden))
        return SequenceClassifierOutput(logits=self.head(hidden))


def branches() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Branches()


class PassesBy(Branches):
    """Uses the weights of its layers without calling them."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.embed(input_ids[:, 1])
        for layer in self.first:
            hidden = hidden + torch.tanh(nn.functional.linear(hidden, layer.weight, layer.bias))
        return SequenceClassifierOutput(logits=self.head(hidden))


def passes_by() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PassesBy()


MODELS = {"shared layers": shared_layers, "branches": branches, "passes by": passes_by}


def every_model(context: RankContext) -> dict[str, Any]:
    """Collective. Tries and trains each model."""
    setting = replace(PLAIN, engine="auto" if context.world_size == 1 else "fsdp")
    tried = {
        name: construct.place_and_try(make(), setting.config(), training.task(setting), context)
        for name, make in MODELS.items()
    }
    return {name: training.run(context, setting, module) for name, module in tried.items()}


def test_models_of_other_shapes_take_the_steps_of_one_process() -> None:
    one, ranks = every_model(ONE_PROCESS), run_ranks(every_model, 3)

    for name, expected in one.items():
        assert_same(expected, ranks[0][name])


class Skips(Branches):
    """Leaves a layer out where a row begins with one of some tokens."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
        first = self.first
        if bool((input_ids[:, 1] < 10).any()):
            self.first = nn.ModuleList([self.first[1]])
        try:
            return super().forward(input_ids, attention_mask, **rest)
        finally:
            self.first = first


def test_a_micro_batch_without_one_of_the_layers_is_refused() -> None:
    with pytest.raises(RanksFailed, match=r"did not use first\.0, but FSDP2 gathers every layer.*engine\.name=ddp"):
        run_ranks(leaves_out, 2)


def leaves_out(context: RankContext) -> None:
    """Collective. Trains a model that leaves a layer out in some micro-batches."""
    training.build(context, replace(PLAIN, find_unused=True), Skips()).go()


def test_a_layer_called_again_in_the_backward_pass_was_not_called_in_the_next_micro_batch() -> None:
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    root = nn.Sequential(*layers)
    for layer in layers:
        layer.__class__ = type("Sharded", (FSDPModule, nn.Linear), {"__new__": object.__new__})
    calls = LayerCalls(root)

    root(torch.ones(1))
    calls.check()
    root(torch.ones(1))  # as checkpointing does, or an evaluation
    calls.clear()
    layers[0](torch.ones(1))

    with pytest.raises(ConfigError, match="did not use 1, but"):
        calls.check()


@pytest.mark.parametrize(
    ("shape", "fault"), [((), "scale of this model is a single number"), ((0, 8), "scale of this model has no number")]
)
def test_a_parameter_without_rows_is_refused(shape: tuple[int, ...], fault: str) -> None:
    module = branches()
    module.scale = nn.Parameter(torch.ones(shape))
    config = PLAIN.config()

    with pytest.raises(ConfigError, match=rf"{fault}.*engine\.name=ddp"):
        place(module, config, ONE_PROCESS)


def test_a_model_that_an_earlier_run_has_sharded_is_refused() -> None:
    module = tiny.bert()
    module.__dict__[GATHER_ATTRIBUTE] = nullcontext

    with pytest.raises(ConfigError, match=r"earlier dtrain\.fit with engine\.name=fsdp.*Load that run's folder model/"):
        construct.place_and_try(module, PLAIN.config(), training.task(PLAIN), ONE_PROCESS)


@pytest.mark.parametrize("is_sharded_", [False, True])
def test_a_sharded_model_is_not_tried_for_a_cache(is_sharded_: bool) -> None:
    setting = replace(PLAIN, engine="single", freeze=("embeddings", "encoder.layer[:1]"), cache="auto", table=True)
    config, learns, module = setting.config(), training.task(setting), tiny.bert(dropout=0.0)
    if is_sharded_:
        module.__dict__[GATHER_ATTRIBUTE] = nullcontext

    prepared = construct.prepare_training(module, config, learns, construct.step_plan(config, learns))

    assert (prepared.frozen_cache.border is None) == is_sharded_


def evaluated_alone(context: RankContext) -> dict[str, Any]:
    """Collective. Evaluates, then rank 0 alone reads the state's names, then all evaluate again."""
    run = training.build(context, PLAIN)
    engine = run.engine
    first = evaluate(engine, run.task, micro_batch_size=4).metrics
    are_freed = all(map(is_sharded, engine.module.parameters()))
    if context.is_main:
        engine.module.state_dict()
    return {"equal": first == evaluate(engine, run.task, micro_batch_size=4).metrics, "freed": are_freed}


def test_an_evaluation_leaves_nothing_gathered_so_that_one_rank_may_look_at_the_model() -> None:
    assert run_ranks(evaluated_alone, 2) == [{"equal": True, "freed": True}] * 2


def grown(context: RankContext, folder: str, engine: str) -> float:
    """Collective. Loads a model; returns by how much this rank's own memory grew, in sizes of the model."""
    setting = replace(PLAIN, engine=engine)
    config = setting.config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": folder})})
    learns = training.task(setting)
    before = own_memory()
    module = construct.load(config, learns, context)
    return (own_memory() - before) / (4 * sum(parameter.numel() for parameter in module.parameters()))


def test_a_rank_never_has_memory_of_its_own_for_the_whole_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = BertConfig(
        vocab_size=25, hidden_size=512, num_hidden_layers=8, intermediate_size=2048, num_attention_heads=8
    )
    BertForSequenceClassification(shape).save_pretrained(tmp_path)  # 101 MB
    tiny.tokenizer().save_pretrained(tmp_path)

    assert max(run_ranks(grown, 2, str(tmp_path), "fsdp")) < 0.7
    assert min(run_ranks(grown, 2, str(tmp_path), "ddp")) > 0.9  # a control

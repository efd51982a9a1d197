"""Parameter groups: weight decay, learning rates by module and by layer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config import schema
from dtrain.engine.optim import build_optimizer
from dtrain.engine.parameter_groups import FACTOR, parameter_groups, set_learning_rate
from dtrain.errors import ConfigError
from tests.support import tiny


def names(model: nn.Module, group: dict) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is member for member in group["params"])}


def test_biases_and_norm_layers_are_not_decayed() -> None:
    model = tiny.bert()

    decayed, plain = parameter_groups(model, schema.Optim(weight_decay=0.1))

    expected = {n for n, _ in model.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed) == expected
    assert names(model, plain) == {n for n, _ in model.named_parameters()} - expected


def test_only_what_learns_is_in_a_group_and_no_group_is_empty() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)

    groups = parameter_groups(model, schema.Optim(weight_decay=0.1))

    assert [names(model, group) for group in groups] == [{"0.weight"}]


def test_what_was_thawed_has_groups_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    groups = parameter_groups(model, schema.Optim(weight_decay=0.1), stages=[["1.weight", "1.bias"]])

    assert [names(model, group) for group in groups] == [{"0.weight"}, {"0.bias"}, {"1.weight"}, {"1.bias"}]


def rates(model: nn.Module, optim: schema.Optim) -> dict[str, tuple[float, float]]:
    """Returns by parameter the learning rate of a step at the schedule's peak, and the weight decay."""
    groups = parameter_groups(model, optim)
    set_learning_rate(groups, optim.learning_rate)
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in sorted(names(model, group))}


def test_a_group_has_its_own_learning_rate_and_weight_decay() -> None:
    model = tiny.bert()
    optim = schema.Optim(
        learning_rate=1e-3,
        weight_decay=0.1,
        groups=(
            schema.OptimGroup(modules=("embeddings",), learning_rate=1e-4),
            schema.OptimGroup(modules=("classifier",), weight_decay=0.5),
        ),
    )

    found = rates(model, optim)

    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx((1e-4, 0.1))
    assert found["bert.embeddings.LayerNorm.weight"] == pytest.approx((1e-4, 0.0))
    assert found["classifier.weight"] == pytest.approx((1e-3, 0.5))
    assert found["classifier.bias"] == pytest.approx((1e-3, 0.0))
    assert found["bert.encoder.layer.0.output.dense.weight"] == pytest.approx((1e-3, 0.1))
    assert found.keys() == {name for name, _ in model.named_parameters()}


def test_each_layer_learns_slower_than_the_one_above() -> None:
    model = tiny.bert()
    layers = model.config.num_hidden_layers

    found = rates(model, schema.Optim(learning_rate=1.0, layer_decay=0.5))

    assert layers == 2
    assert found["classifier.weight"][0] == found["bert.pooler.dense.weight"][0] == 1.0
    assert found["bert.encoder.layer.1.output.dense.weight"][0] == 0.5
    assert found["bert.encoder.layer.0.output.dense.weight"][0] == 0.25
    assert found["bert.embeddings.word_embeddings.weight"][0] == 0.125
    assert found["bert.embeddings.LayerNorm.bias"][0] == 0.125


def test_the_layers_of_an_encoder_and_a_decoder_are_counted_separately() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=2)
    )

    found = rates(model, schema.Optim(learning_rate=1.0, layer_decay=0.5))

    assert found["encoder.block.1.layer.0.SelfAttention.q.weight"][0] == 0.5
    assert found["decoder.block.0.layer.0.SelfAttention.q.weight"][0] == 0.125
    assert found["shared.weight"][0] == 0.0625
    assert found["decoder.final_layer_norm.weight"][0] == 1.0


def test_a_group_sets_the_rate_where_layer_decay_would() -> None:
    optim = schema.Optim(
        learning_rate=1.0, layer_decay=0.5, groups=(schema.OptimGroup(modules=("embeddings",), learning_rate=0.3),)
    )

    assert rates(tiny.bert(), optim)["bert.embeddings.LayerNorm.weight"][0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {
                "groups": [
                    {"modules": ("embeddings",), "weight_decay": 0.0},
                    {"modules": ("*.weight",), "weight_decay": 0.0},
                ]
            },
            "bert.embeddings.word_embeddings.weight is in group 0 (['embeddings']) and in group 1 (['*.weight'])",
        ),
        ({"groups": [{"modules": ("embedings",), "weight_decay": 0.0}]}, "optim.groups[0].modules: 'embedings'"),
    ],
)
def test_paths_that_overlap_or_match_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    settings["groups"] = tuple(schema.OptimGroup(**group) for group in settings["groups"])

    with pytest.raises(ConfigError, match=re.escape(message)):
        parameter_groups(tiny.bert(), schema.Optim(**settings))


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(ConfigError, match="Linear has no list of layers"):
        parameter_groups(nn.Linear(2, 2), schema.Optim(layer_decay=0.9))


def test_sgd_moves_each_group_by_its_own_rate() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    optim = schema.Optim(
        name="sgd",
        learning_rate=0.1,
        weight_decay=0.0,
        groups=(schema.OptimGroup(modules=("0",), learning_rate=0.4),),
    )
    optimizer = build_optimizer(parameter_groups(model, optim), optim)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    set_learning_rate(optimizer.param_groups, 0.05)  # half of the peak
    optimizer.step()

    moved = [float(old - new.detach()) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == pytest.approx([0.2, 0.05])
    assert {group[FACTOR] for group in optimizer.param_groups} == {1.0, 4.0}

"""Freezing by path, thawing by epoch, no_grad, and train and eval modes."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from dtrain.config.schema import Freeze, ThawStage
from dtrain.errors import ConfigError
from dtrain.models.freezing import check, freeze, frozen_parameters, summary, train_mode
from dtrain.models.paths import resolve
from tests.support import tiny


@pytest.fixture
def bert() -> Any:
    return tiny.bert(dropout=0.5, layers=3)


@pytest.fixture
def gpt() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def below(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(prefixes)}


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 10, 3]])}


def learn(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that one SGD step changes."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(**batch()).logits.square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.zero_grad()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


# Paths


@pytest.mark.parametrize(
    ("entry", "prefixes"),
    [
        ("embeddings", ["bert.embeddings."]),
        ("bert.embeddings", ["bert.embeddings."]),
        ("base_model", ["bert."]),
        ("base_model.embeddings", ["bert.embeddings."]),
        ("encoder.layer[:2]", ["bert.encoder.layer.0.", "bert.encoder.layer.1."]),
        ("encoder.layer[-1]", ["bert.encoder.layer.2."]),
        ("encoder.layer[0]", ["bert.encoder.layer.0."]),
        ("encoder.layer[::2]", ["bert.encoder.layer.0.", "bert.encoder.layer.2."]),
        ("encoder.layer[1:99]", ["bert.encoder.layer.1.", "bert.encoder.layer.2."]),
        ("encoder.layer[1].attention", ["bert.encoder.layer.1.attention."]),
        ("encoder.layer.*.attention", [f"bert.encoder.layer.{n}.attention." for n in range(3)]),
        ("encoder.layer.1", ["bert.encoder.layer.1."]),
        ("encoder.layer.?.output.dense", [f"bert.encoder.layer.{n}.output.dense." for n in range(3)]),
        ("classifier", ["classifier."]),
        ("classifier.bias", ["classifier.bias"]),
    ],
)
def test_a_path_resolves_in_the_model_or_its_base_model(bert: Any, entry: str, prefixes: list[str]) -> None:
    assert set(resolve(bert, [entry]).parameters) == below(bert, *prefixes)


def test_a_wildcard_finds_parameters_at_any_depth(bert: Any) -> None:
    found = resolve(bert, ["*.bias"]).parameters

    assert set(found) == {name for name, _ in bert.named_parameters() if name.endswith(".bias")}
    assert "classifier.bias" in found
    assert "bert.encoder.layer.0.attention.self.query.bias" in found


def test_paths_are_found_in_a_model_that_is_its_own_base_and_in_one_that_is_not_from_transformers(bert: Any) -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))

    assert resolve(bert.bert, ["embeddings"]).modules == ("embeddings",)
    assert resolve(plain, ["0"]).parameters == ("0.weight", "0.bias")


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("encoder.layers", "encoder.layer"),
        ("embedings", "embeddings"),
        ("encoder.layer[7]", "encoder.layer has 3 entries"),
        ("encoder.layer[2:1]", "encoder.layer has 3 entries"),
        ("encoder.layers[:2]", "encoder.layer"),
        ("zzz", "bert, dropout, classifier"),
    ],
)
def test_an_entry_that_matches_nothing_is_refused_with_a_similar_name(bert: Any, entry: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        freeze(bert, Freeze(modules=(entry,)))

    assert f"{entry!r} matches no module" in str(error.value)
    assert hint in str(error.value).split("matches", 1)[1]


@pytest.mark.parametrize(
    "entry", ["encoder layer", "encoder.layer[a]", "encoder.layer[1", ".bias", "encoder.layer[::0]", ""]
)
def test_an_entry_that_is_not_a_path_is_refused(bert: Any, entry: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a path|is not an index"):
        freeze(bert, Freeze(modules=(entry,)))


def test_an_entry_without_parameters_is_refused(bert: Any) -> None:
    with pytest.raises(ConfigError, match="'dropout' matches something without parameters"):
        freeze(bert, Freeze(modules=("dropout",)))


# Freezing and thawing


@pytest.mark.parametrize("method", ["requires_grad", "no_grad"])
def test_frozen_parameters_keep_every_bit_and_the_others_move(bert: Any, method: Any) -> None:
    frozen = freeze(bert, Freeze(modules=("embeddings", "encoder.layer[:2]"), method=method))
    train_mode(bert)

    moved = learn(bert)

    assert set(frozen) == below(bert, "bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1.")
    assert frozen == frozen_parameters(bert)
    assert not moved & set(frozen)
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.2.output.dense.weight"} <= moved


def test_no_grad_stops_gradients_to_lower_layers_and_requires_grad_does_not(bert: Any) -> None:
    through = copy.deepcopy(bert)
    freeze(through, Freeze(modules=("encoder",)))
    freeze(bert, Freeze(modules=("encoder",), method="no_grad"))

    assert "bert.embeddings.word_embeddings.weight" in learn(through)
    assert not any("embeddings" in name for name in learn(bert))


def test_freezing_everything_is_refused(bert: Any) -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(bert, Freeze(modules=("base_model", "classifier")))


def test_freezing_twice_changes_nothing(bert: Any) -> None:
    settings = Freeze(modules=("base_model",), method="no_grad")

    assert freeze(bert, settings) == freeze(bert, settings)
    assert not isinstance(bert.bert.forward.args[0], partial)  # not wrapped twice
    freeze(bert, Freeze())

    assert "forward" not in vars(bert.bert)
    assert frozen_parameters(bert) == []


THAW = Freeze(
    modules=("base_model",),
    thaw=(ThawStage(epoch=2, modules=("encoder.layer[1:]",)), ThawStage(epoch=1, modules=("pooler",))),
)


def test_each_epoch_thaws_the_modules_that_are_due() -> None:
    stages = {epoch: set(freeze(tiny.bert(layers=3), THAW, epoch=epoch)) for epoch in range(4)}
    model = tiny.bert(layers=3)

    assert stages[0] == below(model, "bert.")
    assert stages[1] == below(model, "bert.embeddings.", "bert.encoder.")
    assert stages[2] == stages[3] == below(model, "bert.embeddings.", "bert.encoder.layer.0.")


@pytest.mark.parametrize("method", ["requires_grad", "no_grad"])
def test_a_later_epoch_freezes_the_same_from_an_earlier_one_or_from_a_fresh_model(method: Any) -> None:
    settings = THAW.model_copy(update={"method": method})
    lived, fresh = tiny.bert(layers=3), tiny.bert(layers=3)
    for epoch in range(3):
        freeze(lived, settings, epoch=epoch)
    freeze(fresh, settings, epoch=2)

    assert frozen_parameters(lived) == frozen_parameters(fresh)
    for model in (lived, fresh):
        train_mode(model)
    assert [m.training for m in lived.modules()] == [m.training for m in fresh.modules()]
    assert ["forward" in vars(m) for m in lived.modules()] == ["forward" in vars(m) for m in fresh.modules()]
    assert any("encoder.layer.1" in name for name in learn(lived))


def test_thawing_leaves_parameters_frozen_by_other_code() -> None:
    model = tiny.bert()
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    settings = Freeze(modules=("base_model",), thaw=(ThawStage(epoch=1, modules=("base_model",)),))
    freeze(model, settings)

    still = freeze(model, settings, epoch=1, keep_frozen=["bert.pooler.dense.bias"])

    assert still == ["bert.embeddings.position_embeddings.weight", "bert.pooler.dense.bias"]


def test_a_parameter_trains_again_once_keep_frozen_no_longer_names_it() -> None:
    model = tiny.bert()

    assert freeze(model, Freeze(), keep_frozen=["bert.pooler.dense.bias"]) == ["bert.pooler.dense.bias"]
    assert freeze(model, Freeze()) == []


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["encoder.layers"], r"freeze.thaw: 'encoder.layers' matches no module.*encoder.layer"),
        (["classifier"], r"freeze.thaw: 'classifier' is not frozen when epoch 1 begins"),
        (["embeddings", "embeddings"], r"freeze.thaw: 'embeddings' is no longer frozen when epoch 1 begins"),
    ],
)
def test_a_thaw_stage_that_thaws_nothing_is_refused_before_training(modules: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tiny.bert(), Freeze(modules=("base_model",), thaw=(ThawStage(epoch=1, modules=tuple(modules)),)))


def test_tied_weights_are_frozen_and_thawed_together_under_both_names(gpt: Any) -> None:
    settings = Freeze(modules=("lm_head",), thaw=(ThawStage(epoch=1, modules=("transformer.wte",)),))

    assert resolve(gpt, ["lm_head"]).parameters == ("transformer.wte.weight", "lm_head.weight")
    assert freeze(gpt, settings) == ["transformer.wte.weight", "lm_head.weight"]
    assert freeze(gpt, settings, epoch=1) == []


# Modes


def test_frozen_modules_run_without_dropout_and_the_others_with_it(bert: Any) -> None:
    freeze(bert, Freeze(modules=("embeddings", "encoder.layer[:2]")))
    train_mode(bert)

    modes = {name: module.training for name, module in bert.named_modules() if isinstance(module, nn.Dropout)}

    assert modes["bert.embeddings.dropout"] is False
    assert modes["bert.encoder.layer.1.output.dropout"] is False
    assert modes["bert.encoder.layer.2.output.dropout"] is True
    assert modes["dropout"] is True
    assert torch.equal(bert.bert.embeddings(**batch()), bert.bert.embeddings(**batch()))


def test_running_statistics_stay_unless_the_config_says_train() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    freeze(model, Freeze(modules=("3",)))

    train_mode(model)
    assert [module.training for module in model] == [True, False, True, False]

    train_mode(model, batch_norm="train")
    assert [module.training for module in model] == [True, True, True, False]


# What the wrapper of no_grad must not disturb


@pytest.fixture
def cut(bert: Any) -> Any:
    freeze(bert, Freeze(modules=("embeddings", "encoder.layer[:2]"), method="no_grad"))
    train_mode(bert)
    return bert


def test_no_grad_gives_the_same_numbers(bert: Any) -> None:
    plain = copy.deepcopy(bert).eval()
    freeze(bert, Freeze(modules=("embeddings", "encoder.layer"), method="no_grad"))

    assert torch.equal(bert.eval()(**batch()).logits, plain(**batch()).logits)


def test_no_grad_does_not_change_names_and_files(cut: Any, tmp_path: Path) -> None:
    plain = tiny.bert(dropout=0.5, layers=3)

    assert list(cut.state_dict()) == list(plain.state_dict())
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_no_grad_leaves_signatures_as_they_are(cut: Any) -> None:
    assert "input_ids" in inspect.signature(cut.bert.embeddings.forward).parameters


def test_a_copy_of_a_model_under_no_grad_uses_its_own_weights(cut: Any) -> None:
    copied = copy.deepcopy(cut).eval()
    before = copied(**batch()).logits
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()

    assert torch.equal(copied(**batch()).logits, before)


# Words


def test_names_are_collapsed_into_modules_and_ranges_of_layers(bert: Any) -> None:
    names = freeze(bert, Freeze(modules=("embeddings", "encoder.layer[:2]", "classifier.bias")))

    assert summary(names) == "bert.embeddings (5 tensors), bert.encoder.layer.0-1 (32 tensors), classifier (1 tensor)"


def test_gaps_between_layers_are_shown_and_no_name_is_a_word(gpt: Any) -> None:
    assert summary(["h.0.w", "h.1.w", "h.3.w"]) == "h.0-1 (2 tensors), h.3 (1 tensor)"
    assert summary(freeze(gpt, Freeze(modules=("wte",)))) == "transformer.wte (1 tensor), lm_head (1 tensor)"
    assert summary([]) == "none"

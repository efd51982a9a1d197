"""A new head on a backbone: pooling, padding on either side, seeding, saving and loading as one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from dtrain.config import schema
from dtrain.config.task import Classification
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.custom_head import HeadedModel
from dtrain.models.freezing import frozen_parameters
from dtrain.models.load import load_model, pretrained_label_names
from dtrain.models.paths import resolve
from dtrain.models.pooling import pool
from dtrain.tasks.classification import ClassificationTask
from dtrain.tasks.tensors import compute_logits
from dtrain.training import build
from dtrain.training.export import save
from tests.support import tiny, training
from tests.support.heads import HEADS
from tests.support.tiny import SPECIAL, WORDS

VOCABULARY = len(SPECIAL) + len(WORDS)
LABELS = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
GPT = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 18,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 8,
    "patch_size": 4,
}
RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head."""
    folder = tmp_path_factory.mktemp("base")
    tiny.bert(layers=1).bert.save_pretrained(folder)
    return folder


def load(model: schema.Model, *, head: str = "sequence_classification", seed: int = 0, side: str = "right") -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    settings = {} if head in ("causal_lm", "masked_lm") else LABELS
    return load_model(model, head=HEADS[head], head_config=settings, tokenizer=tokenizer, seed=seed).eval()


def on(folder: Path | str, **head: Any) -> schema.Model:
    return schema.Model(name_or_path=str(folder), head=schema.NewHead(**head))


def new(shape: dict[str, Any], **head: Any) -> schema.Model:
    return schema.Model(from_scratch=True, tokenizer="char", config=shape, head=schema.NewHead(**head))


def saved(module: Any, folder: Path) -> Path:
    weights = {name: value.detach() for name, value in module.named_parameters()}
    save(module, weights, tiny.tokenizer(), folder)
    return folder


def text(ids: list[int], *, pad: int = 0) -> dict[str, torch.Tensor]:
    row, mask = ids + [0] * pad, [1] * len(ids) + [0] * pad
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.tensor([mask])}


# Pooling


def test_pooling_ignores_padding_on_either_side() -> None:
    states = torch.tensor([[[1.0], [2.0], [4.0], [9.0]], [[9.0], [9.0], [3.0], [5.0]]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])

    assert pool(states, mask, "mean").flatten().tolist() == pytest.approx([7 / 3, 4.0])
    assert pool(states, mask, "cls").flatten().tolist() == [1.0, 3.0]
    assert pool(states, mask, "last").flatten().tolist() == [4.0, 5.0]
    assert pool(states, None, "last").flatten().tolist() == [9.0, 5.0]


def test_a_map_of_states_is_averaged_over_its_positions() -> None:
    assert pool(torch.arange(8.0).reshape(1, 2, 2, 2), None, "mean").tolist() == [[1.5, 5.5]]


@pytest.mark.parametrize(
    ("shape", "pooling"), [(GPT, "last"), (GPT, "mean"), (ROBERTA, "mean"), (ROBERTA, "cls")], ids=str
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_whatever_side_the_tokenizer_names(
    shape: dict[str, Any], pooling: str, side: str
) -> None:
    ids = [2, 7, 11, 9, 3]
    module = load(new(shape, pooling=pooling), side=side)
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    rows = tiny.Table({"input_ids": [ids, [2, *ids, *ids]], "label": [0, 1]})
    task = ClassificationTask({}, tokenizer, ["a", "b"], Classification(name="classification"), max_length=16)

    with torch.no_grad():
        alone = module(**text(ids)).logits
        together = compute_logits(module, task.collate(rows[[0, 1]], tiny.HERE))

    assert torch.allclose(together[:1], alone, atol=1e-6)


# What is made


def test_a_backbone_that_computes_no_states_is_answered_with_its_reason() -> None:
    shape = {**ROBERTA, "model_type": "xmod"}
    with pytest.raises(ConfigError, match=r"xmod model cannot compute .*Input language unknown.*model\.config\.NAME="):
        load(new(shape, pooling="cls"))

    load(new({**shape, "default_language": "en_XX"}, pooling="cls"))


def test_the_new_head_depends_only_on_the_seed(base: Path) -> None:
    torch.manual_seed(1)
    first = load(on(base))
    torch.manual_seed(2)
    second, other = load(on(base)), load(on(base), seed=1)

    assert torch.equal(first.head.out.weight, second.head.out.weight)
    assert not torch.equal(first.head.out.weight, other.head.out.weight)
    assert first.head.out.weight.shape == (3, 32)
    assert first.head.out.weight.std() > 0


def test_the_backbone_keeps_its_weights_and_a_hidden_layer_its_width(base: Path) -> None:
    made = load(on(base, hidden=5, dropout=0.5))

    expected = AutoModel.from_pretrained(base).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in made.backbone.state_dict().items())
    assert (made.head.dense.weight.shape, made.head.out.weight.shape) == ((5, 32), (3, 5))
    assert made.head.dropout.p == 0.5


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ("sequence_classification", (1, 3)),
        ("token_classification", (1, 5, 3)),
        ("masked_lm", (1, 5, VOCABULARY)),
    ],
)
def test_the_task_decides_the_shape_of_the_outputs(base: Path, head: Any, shape: tuple[int, ...]) -> None:
    assert load(on(base), head=head)(**text([2, 7, 11, 9, 3])).logits.shape == shape


def test_choices_get_a_logit_each(base: Path) -> None:
    batch = {name: value.expand(6, -1).reshape(2, 3, 5) for name, value in text([2, 7, 11, 9, 3]).items()}

    assert load(on(base), head="multiple_choice")(**batch).logits.shape == (2, 3)


def test_a_language_model_predicts_its_vocabulary_at_every_token() -> None:
    assert load(new(GPT), head="causal_lm")(**text([2, 7, 11]), use_cache=False).logits.shape == (1, 3, VOCABULARY)


@pytest.mark.parametrize("shape", [VIT, RESNET], ids=["vit", "resnet"])
def test_images_have_heads_too(shape: dict[str, Any]) -> None:
    made = load(new(shape, pooling="mean"), head="image_classification")

    assert made(pixel_values=torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3)


def test_paths_resolve_in_the_backbone(base: Path) -> None:
    made = load(on(base))

    whole = {name for name in dict(made.named_parameters()) if name.startswith("backbone.")}
    assert set(resolve(made, ["backbone"]).parameters) == set(resolve(made, ["base_model"]).parameters) == whole
    assert set(resolve(made, ["embeddings", "encoder.layer[:1]"]).modules) == {
        "backbone.embeddings",
        "backbone.encoder.layer.0",
    }


def test_gradient_checkpointing_recomputes_the_backbones_activations(base: Path) -> None:
    made = load(on(base).model_copy(update={"gradient_checkpointing": True}))

    assert any(getattr(module, "gradient_checkpointing", False) for module in made.backbone.modules())
    assert made.config.use_cache is False


def test_a_pooler_that_no_gradient_reaches_is_found_and_frozen(base: Path) -> None:
    setting = training.Setting()
    task = training.task(setting)
    made = load_model(on(base, pooling="mean"), head=task.head, head_config=task.head_config, tokenizer=None, seed=0)

    plan = build.step_plan(setting.config(), task)
    prepared = build.prepare_training(made, setting.config(), task, plan)

    pooler = ["backbone.pooler.dense.weight", "backbone.pooler.dense.bias"]
    assert frozen_parameters(prepared.module) == pooler
    assert prepared.freeze(made, 0) == pooler


# Saved and loaded


def test_transformers_loads_the_folder_as_the_backbone(base: Path, tmp_path: Path) -> None:
    made = load(on(base, pooling="mean"))
    loaded, told = AutoModel.from_pretrained(saved(made, tmp_path / "model"), output_loading_info=True)

    assert not any(told.values())
    batch = text([2, 7, 11, 9, 3], pad=2)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).last_hidden_state, made.backbone(**batch).last_hidden_state)


@pytest.mark.parametrize("named", [True, False], ids=["with model.head", "without"])
def test_the_saved_folder_loads_backbone_and_head(base: Path, tmp_path: Path, named: bool) -> None:
    made = load(on(base, pooling="mean", hidden=4), seed=5)
    folder = saved(made, tmp_path / "model")

    again = load(on(folder, pooling="mean", hidden=4) if named else schema.Model(name_or_path=str(folder)), seed=6)

    assert isinstance(again, HeadedModel)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())
    batch = text([2, 7, 11, 9, 3], pad=2)
    assert torch.equal(again(**batch).logits, made(**batch).logits)
    assert pretrained_label_names(schema.Model(name_or_path=str(folder))) == ("a", "b", "c")


def test_from_scratch_uses_the_shape_and_draws_new_weights(base: Path, tmp_path: Path) -> None:
    folder = saved(load(on(base)), tmp_path / "model")

    again = load(schema.Model(name_or_path=str(folder), from_scratch=True), seed=9)

    assert isinstance(again, HeadedModel)
    assert not torch.equal(again.head.out.weight, load(on(base)).head.out.weight)


# What is refused


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        (new(GPT), "sequence_classification", "pooling=cls.*gpt2 model sees only itself.*pooling=last"),
        (new({**ROBERTA}), "causal_lm", "sees the tokens that it has to predict.*is_decoder"),
        (new(RESNET), "image_classification", "pooling=cls: a resnet model has a map.*pooling=mean"),
        (
            new({"model_type": "t5", "num_layers": 1, "d_model": 8}),
            "sequence_classification",
            "does not work for a t5 model",
        ),
        (new(GPT), "question_answering", "does not work for question answering"),
        (new({**GPT, "dtrain_head": {}}), "causal_lm", "dtrain_head is set by model.head"),
    ],
    ids=["first token", "bidirectional", "map", "encoder-decoder", "spans", "key"],
)
def test_a_head_that_does_not_fit_the_model_is_refused(model: schema.Model, head: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(model, head=head)


def test_another_head_than_the_trained_one_is_refused_with_the_way_to_replace_it(base: Path, tmp_path: Path) -> None:
    folder = saved(load(on(base, pooling="mean")), tmp_path / "model")

    with pytest.raises(ConfigError, match=r"trained with model.head=.*'mean'.*Leave model.head out.*AutoModel"):
        load(on(folder, pooling="last"))
    with pytest.raises(ConfigError, match=r"head for sequence_classification with 3 outputs.*token_classification"):
        load(schema.Model(name_or_path=str(folder)), head="token_classification")

    bare = AutoModel.from_pretrained(folder)
    del bare.config.dtrain_head
    bare.save_pretrained(tmp_path / "bare")
    assert isinstance(load(on(tmp_path / "bare", pooling="last")), HeadedModel)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_damaged_head_is_a_checkpoint_error(base: Path, tmp_path: Path, damage: str) -> None:
    folder = saved(load(on(base)), tmp_path / "model")
    file = folder / "head.safetensors"
    file.unlink() if damage == "missing" else file.write_bytes(b"\x08\x00\x00")

    with pytest.raises(
        CheckpointError, match=r"config.json describes a head in head.safetensors, but it cannot be loaded"
    ):
        load(schema.Model(name_or_path=str(folder)))


def test_config_json_describes_the_head(base: Path, tmp_path: Path) -> None:
    folder = saved(load(on(base, pooling="mean")), tmp_path / "model")

    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == ["BertModel"]
    assert content["dtrain_head"] == {
        "kind": "linear",
        "pooling": "mean",
        "hidden": None,
        "dropout": 0.0,
        "task": "sequence_classification",
        "outputs": 3,
    }

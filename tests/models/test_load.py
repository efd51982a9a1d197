"""Models from a folder and from scratch: loading, new weights, and errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from dtrain.config import schema
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.load import load_model, pretrained_label_names
from dtrain.models.tokenizer import build_char_tokenizer
from tests.support import tiny
from tests.support.heads import HEADS

CHARACTERS = "abcdef"
GPT = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}


def classifier(
    model: schema.Model, *, labels: tuple[str, ...] = ("no", "yes"), seed: int = 0, tokenizer: Any = None
) -> Any:
    head = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {n: i for i, n in enumerate(labels)},
    }
    tokenizer = tokenizer or tiny.tokenizer()
    return load_model(model, head=HEADS["sequence_classification"], head_config=head, tokenizer=tokenizer, seed=seed)


def language_model(model: schema.Model, *, tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or build_char_tokenizer([CHARACTERS])
    return load_model(model, head=HEADS["causal_lm"], head_config={}, tokenizer=tokenizer, seed=0)


def new(**config: Any) -> schema.Model:
    return schema.Model(from_scratch=True, tokenizer="char", config={**GPT, **config})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder without a head, as most pretrained models are."""
    tiny.bert().bert.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# What is loaded


def test_a_folder_is_loaded_with_its_weights_and_the_datas_label_names(folder: Path) -> None:
    loaded = classifier(schema.Model(name_or_path=str(folder)))

    assert all(torch.equal(value, tiny.bert().state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.config.problem_type == "single_label_classification"


def test_a_new_head_neither_depends_on_the_random_state_nor_changes_it(base: Path) -> None:
    model = schema.Model(name_or_path=str(base))
    torch.manual_seed(1)
    first = classifier(model)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, other = classifier(model), classifier(model, seed=1)

    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.classifier.weight.std() > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_another_type_are_loaded_in_fp32(tmp_path: Path) -> None:
    tiny.bert().to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"

    loaded = classifier(schema.Model(name_or_path=str(tmp_path)))

    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.config.dtype == torch.float32


def test_new_and_unused_weights_are_logged_in_one_line_each(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dtrain"):
        classifier(schema.Model(name_or_path=str(base), config={"num_hidden_layers": 1}))

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "classifier.bias, classifier.weight" in lines[0]
    assert "encoder.layer.1" in lines[1]
    assert "and 12 more" in lines[1]


def test_overrides_reach_the_model_and_attention_and_checkpointing_are_passed_on(folder: Path) -> None:
    model = schema.Model(
        name_or_path=str(folder),
        config={"hidden_dropout_prob": 0.0},
        attn_implementation="eager",
        gradient_checkpointing=True,
    )
    loaded = classifier(model)

    assert loaded.bert.embeddings.dropout.p == 0.0
    assert loaded.config._attn_implementation == "eager"
    assert any(getattr(module, "gradient_checkpointing", False) for module in loaded.modules())
    assert loaded.config.use_cache is False


# From scratch


def test_a_new_model_gets_vocabulary_size_and_special_tokens_from_its_tokenizer() -> None:
    loaded = language_model(new())

    assert loaded.config.vocab_size == loaded.get_input_embeddings().num_embeddings == 1 + len(CHARACTERS)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (None, None, None)
    assert loaded.config.n_layer == 1


def test_a_new_model_keeps_settings_of_model_config() -> None:
    loaded = language_model(new(vocab_size=50, eos_token_id=3))

    assert (loaded.config.vocab_size, loaded.config.eos_token_id) == (50, 3)


def test_the_seed_decides_the_weights_of_a_new_model() -> None:
    tokenizer = build_char_tokenizer([CHARACTERS], pad=True)
    first, second, other = (classifier(new(), seed=seed, tokenizer=tokenizer) for seed in (0, 0, 1))

    assert torch.equal(first.transformer.wte.weight, second.transformer.wte.weight)
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)
    assert first.config.pad_token_id == 1


def test_a_new_model_may_take_its_shape_from_a_folder_that_has_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    loaded = classifier(schema.Model(name_or_path=str(folder), from_scratch=True, config={"num_hidden_layers": 1}))

    assert isinstance(loaded.bert, BertModel)
    assert len(loaded.bert.encoder.layer) == 1
    assert loaded.config.hidden_size == 32


# Labels


def test_a_trained_classifier_gives_its_label_names_in_the_order_of_its_outputs(folder: Path, tmp_path: Path) -> None:
    assert pretrained_label_names(schema.Model(name_or_path=str(folder))) is None
    classifier(schema.Model(name_or_path=str(folder)), labels=("zebra", "ant")).save_pretrained(tmp_path / "trained")

    assert pretrained_label_names(schema.Model(name_or_path=str(tmp_path / "trained"))) == ("zebra", "ant")
    assert pretrained_label_names(new()) is None


def test_a_head_for_another_number_of_labels_is_refused_with_the_way_to_remove_it(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"another number of labels \(classifier.bias is \(2,\), expected \(3,\).*AutoModel"
    ):
        classifier(schema.Model(name_or_path=str(folder)), labels=("a", "b", "c"))


def test_other_label_names_on_a_trained_head_are_mentioned(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier(schema.Model(name_or_path=str(folder))).save_pretrained(tmp_path / "trained")
    with caplog.at_level(logging.INFO, logger="dtrain"):
        classifier(schema.Model(name_or_path=str(tmp_path / "trained")), labels=("yes", "no"))

    assert "('no', 'yes'); they are replaced by ('yes', 'no')" in caplog.text


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layr": 2}, "model.config.n_layr is not a setting of a gpt2 model. Did you mean n_layer"),
        ({"n_layer": "two"}, "n_layer.*expected int"),
        ({"n_head": 3}, "is not a valid gpt2 model"),
        ({"n_head": 0}, "is not a valid gpt2 model"),
        ({"model_type": "gtp2"}, "model_type=gtp2 .* Did you mean gpt2"),
        ({"num_labels": 3}, "model.config.num_labels is set by the labels in the data"),
        ({"dtype": "bfloat16"}, "set by engine.precision"),
        ({"model_type": "t5", "n_layer": None}, "n_layer is not a setting of a t5 model"),
    ],
)
def test_an_override_that_makes_no_model_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        language_model(new(**config))


def test_a_model_without_that_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="A t5 model has no causal lm head"):
        language_model(schema.Model(from_scratch=True, tokenizer="char", config={"model_type": "t5"}))


SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ({"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 2}, "router_aux_loss_coef", 0),
        ({"model_type": "stablelm", "num_key_value_heads": 2}, "layer_norm_eps", 1),
        ({"model_type": "qwen2", "num_key_value_heads": 2}, "head_dim", 6),
        ({"model_type": "qwen2", "num_key_value_heads": 2}, "rope_theta", 5000),
    ],
)
def test_an_override_is_taken_where_transformers_takes_it(config: dict[str, Any], name: str, value: int) -> None:
    model = language_model(schema.Model(from_scratch=True, tokenizer="char", config={**config, **SIZES, name: value}))

    found = model.config.rope_parameters if name == "rope_theta" else vars(model.config)
    assert found[name] == value
    if name == "head_dim":
        assert model.model.layers[0].self_attn.q_proj.out_features == 2 * value


def test_a_rotary_setting_without_effect_is_refused_with_one_that_has_it() -> None:
    config = {"model_type": "gpt_neox", **SIZES}

    with pytest.raises(
        ConfigError, match=r"rope_parameters\.rope_type=default model\.config\.rope_parameters\.rope_theta=5000"
    ):
        language_model(schema.Model(from_scratch=True, tokenizer="char", config={**config, "rope_theta": 5000}))
    cure = {"rope_type": "default", "rope_theta": 5000}
    model = language_model(
        schema.Model(from_scratch=True, tokenizer="char", config={**config, "rope_parameters": cure})
    )
    assert model.config.rope_parameters["rope_theta"] == 5000


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match=r"has no weights \(model.safetensors.*from_scratch"):
        classifier(schema.Model(name_or_path=str(folder)))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json"):
        classifier(schema.Model(name_or_path=str(tmp_path)))


def test_damaged_weights_are_a_checkpoint_error(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00")

    with pytest.raises(CheckpointError, match="damaged"):
        classifier(schema.Model(name_or_path=str(folder)))


def test_a_damaged_config_is_a_checkpoint_error(folder: Path) -> None:
    (folder / "config.json").write_text("{")

    with pytest.raises(CheckpointError, match="damaged"):
        classifier(schema.Model(name_or_path=str(folder)))


def test_weights_of_another_architecture_are_refused(folder: Path, tmp_path: Path) -> None:
    language_model(new()).save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "model.safetensors").replace(folder / "model.safetensors")

    with pytest.raises(ConfigError, match="none of its weights belongs to a bert model"):
        classifier(schema.Model(name_or_path=str(folder)))


def test_an_override_that_the_weights_do_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"its weights do not fit model.config.*and \d+ more"):
        classifier(schema.Model(name_or_path=str(folder), config={"hidden_size": 64}))


def test_code_that_comes_with_a_model_is_not_run_unless_allowed(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}})
    )
    (folder / "code.py").write_text("raise SystemExit('the code ran')\n")

    with pytest.raises(ConfigError, match=r"model.trust_remote_code=true"):
        classifier(schema.Model(name_or_path=str(folder)))


def test_an_unavailable_attention_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.attn_implementation=nope cannot be used"):
        classifier(schema.Model(name_or_path=str(folder), attn_implementation="nope"))


def test_no_model_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.name_or_path is not set"):
        classifier(schema.Model())


def misaligned(tmp_path: Path) -> Any:
    """Returns the model of a file in which every tensor begins at an odd multiple of 4: its header is four bytes longer."""
    folder = tiny.write_model(tmp_path / "odd")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 4).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 4 + content[8 + length :])
    return load_model(
        schema.Model(name_or_path=str(folder)),
        head=HEADS["sequence_classification"],
        head_config={"num_labels": 2},
        tokenizer=tiny.tokenizer(),
        seed=0,
    )


def test_loaded_weights_are_aligned_like_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = misaligned(tmp_path)

    assert [name for name, value in loaded.named_parameters() if value.data_ptr() % 64] == []


def test_before_they_go_to_a_gpu_weights_have_no_copy_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    loaded = misaligned(tmp_path)

    copied = [name for name, value in loaded.named_parameters() if value.data_ptr() % 64 == 0]
    assert copied == []
    assert torch.isfinite(torch.cat([value.detach().flatten() for value in loaded.parameters()])).all()

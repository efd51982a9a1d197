"""LoRA adapters: what trains, what is saved, and that peft, dtrain and the merged model agree; also on several ranks.

Not a quick unit test, because peft takes seconds to import.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from dtrain.commands.export import run_export
from dtrain.config import schema
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.base import load_base
from dtrain.models.load import load_model, pretrained_label_names
from dtrain.models.merging import merge
from dtrain.training.export import save
from dtrain.training.model_card import bare_card
from tests.support import tiny
from tests.support.heads import HEADS
from tests.support.multirank import run_ranks
from tests.support.whole_runs import commands

pytestmark = pytest.mark.ranks

LABELS = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
BATCH = {"input_ids": torch.tensor([[2, 7, 11, 9, 3]])}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head."""
    folder = tmp_path_factory.mktemp("base")
    tiny.bert(layers=1, dropout=0.0).bert.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(seed: int = 0, **model: Any) -> Any:
    return load_model(
        schema.Model(**model),
        head=HEADS["sequence_classification"],
        head_config=LABELS,
        tokenizer=tiny.tokenizer(),
        seed=seed,
    ).eval()


def adapted(base: Path, *, seed: int = 0, **lora: Any) -> Any:
    """Returns new adapters with nonzero values; they start at zero."""
    made = load(seed, name_or_path=str(base), lora=schema.Lora(**{"r": 2, "alpha": 4, **lora}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 100)
    return made


def saved(module: Any, folder: Path) -> Path:
    save(module, {name: value.detach() for name, value in module.named_parameters()}, tiny.tokenizer(), folder)
    return folder


def merged(module: Any) -> Any:
    merge(module)
    return module


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module.eval()(**BATCH).logits
    return found


# What learns


def test_only_the_adapters_and_the_new_head_train(base: Path) -> None:
    made = adapted(base)

    learns = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    attention = "bert.encoder.layer.0.attention.self"
    parts = [f"{attention}.{layer}.lora_{side}.default.weight" for layer in ("query", "value") for side in "AB"]
    assert learns == {*parts, "classifier.weight", "classifier.bias"}


def test_new_adapters_start_at_zero_and_depend_only_on_the_seed(base: Path) -> None:
    plain = load(name_or_path=str(base))
    lora = schema.Lora(r=2, targets=("query",))
    first, second, other = (load(seed, name_or_path=str(base), lora=lora) for seed in (0, 0, 1))

    name = "bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
    assert torch.equal(logits(first), logits(plain))
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_a_trained_head_is_kept(base: Path, tmp_path: Path) -> None:
    folder = saved(load(name_or_path=str(base)), tmp_path / "trained")

    made = adapted(folder)

    assert not made.classifier.weight.requires_grad


# Saved and loaded


@pytest.mark.parametrize("head", [None, {"pooling": "mean"}], ids=["transformers' head", "model.head"])
def test_the_saved_folder_loads_the_same_model(base: Path, tmp_path: Path, head: Any) -> None:
    extra = {} if head is None else {"head": schema.NewHead(**head)}
    made = load(3, name_or_path=str(base), lora=schema.Lora(r=2), **extra)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    folder = saved(made, tmp_path / "model")

    again = load(4, name_or_path=str(folder))

    assert torch.equal(logits(again), logits(made))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in made.named_parameters() if p.requires_grad
    }
    assert pretrained_label_names(schema.Model(name_or_path=str(folder))) == ("a", "b", "c")
    assert not (folder / "model.safetensors").exists()
    assert load_file(folder / "adapter_model.safetensors").keys() < {
        f"base_model.model.{name.replace('.default.', '.')}" for name, _ in made.named_parameters()
    }


def test_peft_loads_the_folder_on_the_base_model(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    made = adapted(base, seed=2)
    folder = saved(made, tmp_path / "model")

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = PeftModel.from_pretrained(plain, folder)

    assert torch.allclose(logits(theirs), logits(made), atol=1e-6)
    assert not torch.allclose(logits(made), logits(load(name_or_path=str(base))), atol=1e-3)  # they have an effect


def test_the_cards_code_loads_the_folder(base: Path, tmp_path: Path) -> None:
    made = adapted(base, seed=2)
    folder = saved(made, tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)

    card = bare_card("mine", folder)

    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(folder))).replace(f'"{base.name}"', repr(str(base))), found)
    assert torch.allclose(logits(found["model"].eval()), logits(made), atol=1e-6)


def test_the_merged_model_is_a_plain_one_with_the_same_outputs(base: Path, tmp_path: Path) -> None:
    made = adapted(base)
    before = logits(made)

    folder = saved(merged(made), tmp_path / "merged")

    plain, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert torch.allclose(logits(plain), before, atol=1e-6)


# What is refused


def test_unknown_target_layers_are_refused_with_the_names_of_existing_ones(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.lora.targets: .*querry.* are named classifier, dense, key, query"):
        adapted(base, targets=("querry",))


def test_adapters_of_another_size_are_refused(base: Path, tmp_path: Path) -> None:
    folder = saved(adapted(base), tmp_path / "model")

    with pytest.raises(ConfigError, match=r"adapters with r=2 and alpha=4, but model.lora has r=5"):
        load(name_or_path=str(folder), lora=schema.Lora(r=5))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_folder_is_a_checkpoint_error(base: Path, tmp_path: Path, file: str) -> None:
    folder = saved(adapted(base), tmp_path / "model")
    (folder / file).write_text("{")

    with pytest.raises(CheckpointError, match=rf"{file} is .*damaged"):
        load(name_or_path=str(folder))


def test_adapters_of_another_model_or_kind_are_refused(base: Path, tmp_path: Path) -> None:
    folder = saved(adapted(base), tmp_path / "model")
    content = json.loads((folder / "adapter_config.json").read_text())

    (folder / "adapter_config.json").write_text(json.dumps({**content, "target_modules": ["key"]}))
    with pytest.raises(CheckpointError, match=r"does not fit .*base.*Is this still the model"):
        load(name_or_path=str(folder))
    (folder / "adapter_config.json").write_text(json.dumps({**content, "peft_type": "IA3"}))
    with pytest.raises(ConfigError, match=r"adapters of type IA3, not LoRA"):
        load(name_or_path=str(folder))


@pytest.mark.parametrize("other", [{"from_scratch": True, "config": {"model_type": "bert"}}, {"factory": "a:b"}])
def test_adapters_need_a_pretrained_model(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"model.lora "):
        schema.Model(lora=schema.Lora(), **other)


# From command to folder, on one rank and two


def settings(folder: Path, base: Path, name: str, **more: str) -> list[str]:
    told = {
        "run.name": name,
        "run.output_dir": str(folder / "runs"),
        "task.name": "classification",
        "model.name_or_path": str(base),
        "model.lora": "{r: 2, dropout: 0.2}",
        "data.name": "cola",
        "data.path": str(folder / "cola"),
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": "32",
        "train.epochs": "1",
        "train.global_batch_size": "8",
        "train.micro_batch_size": "3",
        "train.log_every": "1",
        "optim.learning_rate": "0.05",
        "tracking.tensorboard": "false",
        **more,
    }
    return [f"{key}={value}" for key, value in told.items()]


def test_two_ranks_train_like_one_and_the_folder_evaluates_the_same(base: Path, tmp_path: Path) -> None:
    tiny.write_cola(tmp_path / "cola", train=21, dev=11)
    trained = {"model.name_or_path": str(tmp_path / "runs" / "one" / "model")}
    runs = [("train", settings(tmp_path, base, "one")), ("evaluate", settings(tmp_path, base, "again", **trained))]

    one, again = run_ranks(commands, 1, runs)[0]
    two, sharded, plain = run_ranks(
        commands,
        2,
        [
            ("train", settings(tmp_path, base, "two")),
            ("train", settings(tmp_path, base, "sharded", **{"engine.name": "fsdp"})),
            ("train", settings(tmp_path, base, "plain", **{"model.lora": "null"})),
        ],
    )[0]

    assert (again["metrics"], again["predictions"]) == (one["metrics"], one["predictions"])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert sharded["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert plain["losses"][1:] != pytest.approx(one["losses"][1:], rel=1e-6)  # a control


def test_an_export_merges_adapters_into_a_plain_model(base: Path, tmp_path: Path) -> None:
    made = adapted(base)
    folder = saved(made, tmp_path / "run" / "model")

    export = [f"model.name_or_path={folder}", f"export.to={tmp_path / 'plain'}", "export.merge=true"]
    run_export(load_config(None, export, command="export"), ONE_PROCESS)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(plain), logits(made), atol=1e-6)
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    assert (tmp_path / "plain" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "run"], "no draft is left"


def test_a_plain_model_has_nothing_to_merge(base: Path, tmp_path: Path) -> None:
    export = [f"model.name_or_path={base}", f"export.to={tmp_path / 'plain'}", "export.merge=true"]

    with pytest.raises(ConfigError, match="holds no adapters"):
        run_export(load_config(None, export, command="export"), ONE_PROCESS)

    assert not list(tmp_path.iterdir())


def test_inspect_uses_the_model_with_its_adapters(base: Path, tmp_path: Path) -> None:
    made = adapted(base)
    folder = saved(made, tmp_path / "model")

    body = load_base(schema.Model(name_or_path=str(folder)))

    with torch.no_grad():
        looked_at = body(**BATCH, output_attentions=True)
        states = made.bert(**BATCH).last_hidden_state
    assert torch.allclose(looked_at.last_hidden_state, states, atol=1e-6)
    assert looked_at.attentions[0].shape == (1, 4, 5, 5)


def changed(folder: Path, **entries: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return folder


@pytest.mark.parametrize(
    "entries",
    [
        {"r": 10**9},
        {"r": 0},
        {"r": "two"},
        {"rank_pattern": {"query": 10**9}},
        {"rank_pattern": {"((x|y)+)+z": 2}},
        {"alpha_pattern": {"(x|x)*z": 2}},
        {"layer_replication": [[0, 1]] * 1000},
        {"init_lora_weights": "pissa_niter_1000000000"},
    ],
    ids=str,
)
@pytest.mark.timeout(60)
def test_settings_that_fill_the_memory_or_never_end_are_refused(
    base: Path, tmp_path: Path, entries: dict[str, Any]
) -> None:
    folder = changed(saved(adapted(base), tmp_path / "model"), **entries)

    with pytest.raises(ConfigError, match=r"adapter_config.json has .*does not fit the adapters"):
        load(name_or_path=str(folder))


@pytest.mark.parametrize(
    "entries",
    [
        {"target_modules": r".*\.(query|value)"},
        {"target_modules": r"((\w|\.)+)+X"},
        {"exclude_modules": r"((\w|\.)+)+X"},
        {"layers_to_transform": [0], "layers_pattern": [r"((\w|\.)+)+X"]},
    ],
    ids=["as peft", "target_modules", "exclude_modules", "layers_pattern"],
)
@pytest.mark.timeout(60)
def test_the_weights_say_which_layers_have_adapters_instead_of_a_pattern(
    base: Path, tmp_path: Path, entries: dict[str, Any]
) -> None:
    made = adapted(base)
    folder = changed(saved(made, tmp_path / "model"), **entries)

    assert torch.equal(logits(load(name_or_path=str(folder))), logits(made))


def test_a_vocabulary_that_no_added_tokens_explain_is_refused(base: Path, tmp_path: Path) -> None:
    folder = saved(adapted(base), tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 10**12}))

    for attempt in (lambda: load(name_or_path=str(folder)), lambda: load_base(schema.Model(name_or_path=str(folder)))):
        with pytest.raises(
            ConfigError, match=r"config.json has vocab_size=1000000000000 for a base model with 25 tokens"
        ):
            attempt()

"""Custom modules: the factory call, inputs by name, saving and loading, and errors."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dtrain.config import schema
from dtrain.config.load import load_config
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.load import load_model, pretrained_label_names
from dtrain.training.export import save
from tests.support import tiny
from tests.support.heads import HEADS

LABELS = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
CONFIGS = Path(__file__).parents[2] / "configs"

BAG = """
import random
import numpy as np
import torch
from torch import nn

class Bag(nn.Module):
    def __init__(self, rows, labels, width):
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.out = nn.Linear(width, labels)
        self.drawn = nn.Parameter(torch.tensor([random.random(), np.random.rand()]))
        self.out.weight = self.out.weight
    def forward(self, input_ids):
        return self.out(self.embed(input_ids).mean(dim=1))

def build(num_labels, vocab_size, width=4):
    return Bag(vocab_size, num_labels, width)

class Told(Bag):
    def forward(self, input_ids, **others):
        return {"logits": sorted(others)}

def told(num_labels, vocab_size):
    return Told(vocab_size, num_labels, 4)

def raises():
    raise RuntimeError("no such thing")

def number(**everything):
    return len(everything)

def empty():
    return nn.Identity()

SIZE = 3
"""


@pytest.fixture(autouse=True)
def forget_modules() -> Iterator[None]:
    """Removes modules that a test imported from its own folder, so that the next test does not see them."""
    before, paths = set(sys.modules), list(sys.path)
    yield
    assert sys.path == paths
    for name in set(sys.modules) - before:
        if not hasattr(sys.modules[name], "__file__") or "test_" in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bag.py").write_text(BAG)
    return tmp_path


def load(folder: Path, factory: str = "bag:build", *, seed: int = 0, **model: Any) -> Any:
    settings = schema.Model(factory=factory, factory_folder=folder, **model)
    return load_model(
        settings, head=HEADS["sequence_classification"], head_config=LABELS, tokenizer=tiny.tokenizer(), seed=seed
    )


def saved(module: Any, folder: Path) -> Path:
    save(module, {name: value.detach() for name, value in module.named_parameters()}, tiny.tokenizer(), folder)
    return folder


# What is made


def test_the_factory_gets_the_arguments_it_accepts_and_model_config(folder: Path) -> None:
    made = load(folder, config={"width": 7})

    assert made.embed.weight.shape == (25, 7)
    assert made.out.weight.shape == (2, 7)


def test_the_weights_depend_only_on_the_seed_for_every_random_generator(folder: Path) -> None:
    random.seed(1)
    first = load(folder)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    second, other = load(folder), load(folder, seed=1)

    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_forward_gets_the_inputs_it_accepts_and_its_logits_are_found(folder: Path) -> None:
    ids = torch.tensor([[2, 5, 3]])

    made = load(folder)
    logits = made(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=ids, use_cache=False).logits

    assert torch.equal(logits, made.out(made.embed(ids).mean(dim=1)))


def test_an_output_without_logits_is_refused_with_its_type(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"forward of Told returned dict: expected logits, or an object with .logits"):
        load(folder, "bag:told")(input_ids=torch.tensor([[2, 5, 3]]))


def test_the_folder_is_searched_for_that_import_only(folder: Path) -> None:
    before = list(sys.path)
    load(folder)

    assert sys.path == before


# Saved and loaded


def test_the_saved_folder_loads_the_same_module(folder: Path) -> None:
    made = load(folder, seed=3)
    place = saved(made, folder / "model")

    again = load(folder, seed=4, name_or_path=str(place))

    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())
    content = json.loads((place / "config.json").read_text())
    assert (content["architectures"], content["dtrain_factory"]) == (["Bag"], "bag:build")
    assert pretrained_label_names(schema.Model(factory="bag:build", name_or_path=str(place))) == ("no", "yes")


def test_weights_that_do_not_fit_are_refused_by_name_and_shape(folder: Path) -> None:
    place = saved(load(folder), folder / "model")
    with pytest.raises(ConfigError, match=r"embed.weight is \(25, 4\), expected \(25, 5\)"):
        load(folder, name_or_path=str(place), config={"width": 5})

    weights = load_file(place / "model.safetensors")
    save_file(
        {"strange" if name == "drawn" else name: value for name, value in weights.items()}, place / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"drawn is missing, strange is not in the module"):
        load(folder, name_or_path=str(place))

    (place / "model.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        load(folder, name_or_path=str(place))
    (place / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        load(folder, name_or_path=str(place))


def test_a_saved_folder_without_the_factory_is_refused_with_its_name(folder: Path) -> None:
    place = saved(load(folder), folder / "model")

    with pytest.raises(ConfigError, match=r"set model.factory to the same value"):
        load_model(
            schema.Model(name_or_path=str(place)),
            head=HEADS["sequence_classification"],
            head_config=LABELS,
            tokenizer=tiny.tokenizer(),
            seed=0,
        )


# What is refused


@pytest.mark.parametrize(
    ("factory", "model", "message"),
    [
        ("nothing:build", {}, r"there is no module nothing \(searched .*config file"),
        ("bag:biuld", {}, r"bag.py has no function biuld"),
        ("bag:SIZE", {}, "has no function SIZE"),
        ("bag:raises", {}, r"calling it raised RuntimeError: no such thing \(.*bag.py, line \d+\)"),
        ("bag:number", {}, "returned int: expected a torch.nn.Module"),
        ("bag:empty", {}, "returned a Identity without parameters"),
        ("bag:build", {"config": {"depth": 2}}, r"unexpected keyword argument 'depth'.*model.config=\{'depth': 2\}"),
        ("broken:build", {}, r"cannot be imported: SyntaxError"),
        ("lacking:build", {}, "it imports no_such_library, which is not installed"),
        ("calendar:build", {}, "the name calendar is already used by .*calendar.py, .*Rename your file"),
        ("bag:build", {"gradient_checkpointing": True}, "does not support it for a Bag model"),
    ],
)
def test_a_factory_that_returns_no_module_is_refused(
    folder: Path, factory: str, model: dict[str, Any], message: str
) -> None:
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "lacking.py").write_text("import no_such_library\n")
    (folder / "calendar.py").write_text("def build():\n    pass\n")

    with pytest.raises(ConfigError, match=message):
        load(folder, factory, **model)


@pytest.mark.parametrize("factory", ["own_model", "own_model.build", "own-model:build", ":build", "a:b:c"])
def test_a_factory_is_module_and_function(factory: str) -> None:
    with pytest.raises(ValidationError, match=r"expected package.module:function"):
        schema.Model(factory=factory)


def test_what_has_no_effect_on_an_own_module_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"model.head has no effect on the module that model.factory=own_model:build builds"
    ):
        schema.Model(factory="own_model:build", head=schema.NewHead())


# Where it is looked for


def test_the_factory_file_is_found_beside_the_config_and_recorded_in_the_runs_config() -> None:
    file = CONFIGS / "own_model.yaml"

    assert load_config(file, []).model.factory_folder == CONFIGS
    assert load_config(file, ["model.factory_folder=elsewhere"]).model.factory_folder == Path("elsewhere")
    plain = ["task.name=classification", "model.factory=own_model:build", "data.path=a.csv"]
    assert load_config(None, plain).model.factory_folder == Path()
    assert load_config(None, []).model.factory_folder is None


def test_weights_that_are_stored_transposed_are_saved(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    module.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).t())

    save(module, {name: value.detach() for name, value in module.named_parameters()}, None, tmp_path / "model")

    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")["weight"], module.weight)

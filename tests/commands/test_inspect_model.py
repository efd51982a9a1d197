"""The inspect command: writes the same states that plain transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtrain.config.load import load_config
from dtrain.errors import ConfigError
from tests.support import jobs, tiny
from tests.support.command_line import dtrain

pytestmark = pytest.mark.commands

TEXT = "the old cat sleeps near a dog"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`made/` with a tiny BERT classifier and CoLA's files, `gpt2/` with a tiny language model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("inspected")
    jobs.settings(folder / "runs", "any")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 12}
        GPT2LMHeadModel(GPT2Config(vocab_size=25, **sizes)).save_pretrained(folder / "gpt2")
    tiny.tokenizer().save_pretrained(folder / "gpt2")
    return folder


def inspect(home: Path, name: str, model: Path, *more: str) -> Any:
    return dtrain(
        "inspect", f"run.name={name}", f"run.output_dir={home / 'runs'}", f"model.name_or_path={model}", *more
    )


def examples_of(home: Path, name: str) -> list[dict[str, Any]]:
    """Returns the entries of tokens.json."""
    tokens = json.loads((home / "runs" / name / "inspection" / "tokens.json").read_text())
    examples: list[dict[str, Any]] = tokens["examples"]
    return examples


def plain(model: Path, ids: list[int]) -> Any:
    """Returns the outputs of transformers alone."""
    from transformers import AutoModel

    body = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        return body(input_ids=torch.tensor([ids]), output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize(("name", "layers", "heads", "width"), [("made/model", 2, 4, 32), ("gpt2", 3, 2, 16)])
def test_a_text_gives_the_states_of_plain_transformers(
    home: Path, name: str, layers: int, heads: int, width: int
) -> None:
    run = f"text-{layers}"

    ended = inspect(home, run, home / name, f"inspect.text={TEXT}")

    assert ended.code == 0, ended.text
    (example,) = examples_of(home, run)
    found = load_file(home / "runs" / run / "inspection" / "text.safetensors")
    length = len(example["tokens"])
    assert example["tokens"] == ["[CLS]", *TEXT.split(), "[SEP]"]
    assert found["hidden_states"].shape == (layers + 1, length, width)
    assert found["attentions"].shape == (layers, heads, length, length)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == example["shapes"]
    wanted = plain(home / name, example["input_ids"])
    assert torch.allclose(found["hidden_states"], torch.cat(wanted.hidden_states), rtol=0, atol=1e-6)
    assert torch.allclose(found["attentions"], torch.cat(wanted.attentions), rtol=0, atol=1e-6)
    assert torch.allclose(found["attentions"].sum(-1), torch.ones(layers, heads, length), atol=1e-5)
    above = torch.triu(torch.ones(length, length), diagonal=1).bool()
    assert bool((found["attentions"][..., above] == 0).all()) == (name == "gpt2"), (
        "a language model attends to earlier tokens only"
    )
    assert jobs.exit_of(home / "runs" / run)["code"] == 0


def test_examples_of_a_split_are_the_models_inputs(home: Path) -> None:
    settings = jobs.settings(home / "runs", "split", inspect__split="validation", inspect__examples="[5, 0, 5]")

    ended = dtrain("inspect", *settings)
    again = dtrain("inspect", *settings, "inspect.examples=[1]")

    assert (ended.code, again.code) == (0, 0), ended.text + again.text
    files = {path.name for path in (home / "runs" / "split" / "inspection").iterdir()}
    assert files == {"tokens.json", "validation-000001.safetensors"}, "results of an earlier call are gone"
    (example,) = examples_of(home, "split")
    line = (home / "made" / "cola" / "dev.tsv").read_text().splitlines()[1]
    assert example["tokens"] == ["[CLS]", *line.split("\t")[3].split(), "[SEP]"]
    assert (example["split"], example["example_index"]) == ("validation", 1)
    found = load_file(home / "runs" / "split" / "inspection" / "validation-000001.safetensors")
    wanted = plain(home / "made" / "model", example["input_ids"])
    assert torch.allclose(found["hidden_states"], torch.cat(wanted.hidden_states), rtol=0, atol=1e-6)
    assert "2 example(s)" in ended.text


def test_invalid_examples_are_refused_and_a_training_run_is_not_changed(home: Path) -> None:
    bert, gpt2 = home / "made" / "model", home / "gpt2"
    split = jobs.settings(home / "runs", "wrong")
    text = [f"run.output_dir={home / 'runs'}", "run.name=wrong", f"model.name_or_path={gpt2}"]
    wrong = {
        "inspect needs examples": text,
        "is empty for this tokenizer": [*text, "inspect.text=''", f"model.tokenizer={_characters(home)}"],
        "text has 16 tokens, but the model has only 12 positions": [*text, "inspect.text=" + "a " * 14],
        "inspect.split=dev is not a split of this data. It has train, validation": [*split, "inspect.split=dev"],
        "validation has 7 examples, numbered from 0; there is no 7": [
            *split,
            "inspect.split=validation",
            "inspect.examples=[7]",
        ],
        "is neither a folder": ["run.name=wrong", "model.name_or_path=no/such/model", "inspect.text=a"],
    }
    for message, settings in wrong.items():
        ended = dtrain("inspect", *settings)
        assert ended.code == 2, f"{message}: {ended.text}"
        assert message in ended.text or "there is no such folder" in ended.text
    (home / "runs" / "trained" / "model").mkdir(parents=True)
    ended = inspect(home, "trained", bert, "inspect.text=a")
    assert (ended.code, "holds a training run, which inspect must not change" in ended.text) == (2, True)
    assert not (home / "runs" / "trained" / "inspection").exists()


def _characters(home: Path) -> Path:
    """A tokenizer that adds no special tokens."""
    from dtrain.models.tokenizer import build_char_tokenizer

    build_char_tokenizer(["abc"]).save_pretrained(home / "characters")
    return home / "characters"


def test_a_model_with_missing_weights_is_refused(home: Path) -> None:
    from safetensors.torch import save_file

    model = tiny.write_model(home / "holes", layers=1)
    weights = load_file(model / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.0.output" not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})

    ended = inspect(home, "holes", model, "inspect.text=a cat")

    assert ended.code == 2
    assert "is not in its weights, so its output would be random" in ended.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["inspect.text=a", "inspect.split=train"], "set inspect.text or inspect.split, not both"),
        (["inspect.text=a", "inspect.examples=[1]"], "inspect.examples selects examples of a split"),
        (["inspect.split=train", "inspect.examples=[-1]"], "at least 0"),
        (["inspect.split=train", "inspect.examples=3"], "a list"),
        ([], "set model\\.name_or_path"),
    ],
)
def test_contradictory_settings_are_refused_when_they_are_loaded(settings: list[str], message: str) -> None:
    model = [] if "model" in message else ["model.name_or_path=x"]
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*model, *settings], command="inspect")

"""The folder of a model may come from a stranger: it reads no private file, and a few bytes do not fill the memory."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification

from dtrain.config import schema
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.architecture import read_config, refuse_kernels
from dtrain.models.custom_head import MAX_SIZE, saved_head
from dtrain.models.foreign_files import MAX_COUNT, check_config_file, check_growth, check_sizes
from dtrain.models.tokenizer import load_tokenizer
from tests.support import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A file outside of the model's folder, with the lines of a vocabulary."""
    file = tmp_path / "private.txt"
    file.write_text("\n".join([*tiny.SPECIAL, "password"]))
    return file


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def config_of(folder: Path) -> Any:
    return read_config(schema.Model(name_or_path=str(folder)), local_only=True)


def tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(schema.Model(name_or_path=str(folder)), training_texts=list)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_labels": 10**9},
        {"num_hidden_layers": MAX_COUNT + 1},
        {"num_hidden_layers": 10**4000},
        {"text_config": {"n_layer": 10**9}},
        {"depths": [2, 10**9]},
        {"n_routed_experts": 1e300},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_more_parts_than_any_model_has_are_refused(folder: Path, entries: dict[str, Any]) -> None:
    change(folder / "config.json", **entries)

    with pytest.raises(ConfigError, match=r"config\.json has \w+=\S+, and a model has at most"):
        config_of(folder)
    with pytest.raises(ConfigError, match="and a model has at most"):
        tokenizer_of(folder)


def test_the_numbers_of_real_models_are_accepted(folder: Path) -> None:
    usual = {
        "num_hidden_layers": 126,
        "vocab_size": 262_400,
        "rope_theta": 500_000_000,
        "num_experts": 512,
        "layer_norm_eps": 1e-5,
        "depths": [3, 3, 27, 3],
        "num_labels": 21_843,
        "sliding_window": 131_072,
        "block_size": 4096,
    }
    (folder / "config.json").write_text(json.dumps(usual))

    check_config_file(str(folder), local_only=True, setting="model.name_or_path")


def test_a_list_where_a_mapping_belongs_is_no_traceback(folder: Path) -> None:
    change(folder / "config.json", id2label=["a", "b"])

    with pytest.raises((ConfigError, CheckpointError), match=r"model\.name_or_path="):
        config_of(folder)


@pytest.mark.parametrize("has_file", [True, False], ids=["beside tokenizer.json", "alone"])
@pytest.mark.parametrize("key", ["vocab", "merges", "init_inputs"])
def test_a_tokenizer_is_not_made_of_a_file_that_its_config_names(
    folder: Path, private: Path, key: str, has_file: bool
) -> None:
    change(folder / "tokenizer_config.json", **{key: [str(private)] if key == "init_inputs" else str(private)})
    if not has_file:
        (folder / "tokenizer.json").unlink()

    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json has {key}=.*may be private"):
        tokenizer_of(folder)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "vocab.txt", "additional_chat_templates/x.jinja", "config.json"]
)
def test_a_link_out_of_the_folder_is_refused_and_the_cure_copies_it(folder: Path, private: Path, name: str) -> None:
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        private.write_bytes(link.read_bytes())
        link.unlink()
    link.symlink_to(private)

    with pytest.raises(ConfigError, match=f"{re.escape(name)} is a link to {private}") as refused:
        tokenizer_of(folder)
    with pytest.raises(ConfigError, match="outside of the folder"):
        config_of(folder)
    subprocess.run(shlex.split(str(refused.value).rpartition(": ")[2]), check=True)

    config_of(folder)
    assert tokenizer_of(folder).get_vocab()


def test_links_inside_the_folder_of_the_same_name_and_of_weights_are_accepted(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    (folder / "copy.json").symlink_to("config.json")
    (folder / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")  # a folder of links saves room
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "tokenizer_config.json")

    config_of(folder)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(folder: Path, private: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    config_of(snapshot)

    (blobs / "other").symlink_to(private)
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/other")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is a link"):
        config_of(snapshot)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/elsewhere.safetensors", 5])
def test_weights_outside_of_the_folder_are_not_read(folder: Path, name: Any) -> None:
    index = {"metadata": {}, "weight_map": {"classifier.bias": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ConfigError, match="which is not a name in that folder"):
        config_of(folder)


LONG = normalizers.Replace("o", "o" * 10)


@pytest.mark.parametrize(
    ("part", "is_bomb"),
    [
        (normalizers.Sequence([LONG] * 4), True),
        (normalizers.Sequence([normalizers.Sequence([LONG, LONG]), normalizers.Replace(Regex(""), "x" * 99)]), True),
        (normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_"), normalizers.NFKC()]), False),
    ],
)
def test_replacements_that_multiply_a_text_are_refused(part: Any, is_bomb: bool) -> None:
    backend = Tokenizer(WordLevel({"a": 0}))
    backend.normalizer = part

    if is_bomb:
        with pytest.raises(ConfigError, match=r"tokenizer.json \(normalizer\) can make a text 1e\+04 times as long"):
            check_growth(backend, "m", setting="model.tokenizer")
    else:
        check_growth(backend, "m", setting="model.tokenizer")


def test_the_decoder_is_checked_as_well(folder: Path) -> None:
    file = folder / "tokenizer.json"
    step = json.loads(decoders.Replace("a", "a" * 100).__getstate__())
    change(file, decoder={"type": "Sequence", "decoders": [step, step]})
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")

    with pytest.raises(ConfigError, match=r"\(decoder\)"):
        tokenizer_of(folder)


HEAD = {"pooling": "cls", "hidden": 8, "dropout": 0.0, "task": "sequence_classification", "outputs": 2}


@pytest.mark.parametrize(
    "head",
    [
        "text",
        [],
        {},
        {**HEAD, "outputs": 10**12},
        {**HEAD, "outputs": 0},
        {**HEAD, "outputs": True},
        {**HEAD, "hidden": MAX_SIZE + 1},
        {**HEAD, "pooling": "other"},
        {**HEAD, "task": None},
    ],
    ids=str,
)
def test_a_head_of_no_possible_size_is_refused(folder: Path, head: Any) -> None:
    change(folder / "config.json", dtrain_head=head)

    with pytest.raises(CheckpointError, match="which describes no head"):
        saved_head(config_of(folder), "m")


def test_a_possible_head_is_read(folder: Path) -> None:
    change(folder / "config.json", dtrain_head=HEAD)

    found = saved_head(config_of(folder), "m")

    assert found is not None
    assert (found[0].hidden, *found[1:]) == (8, "sequence_classification", 2)


SIZES = ("vocab_size", "max_position_embeddings", "type_vocab_size", "intermediate_size")


@pytest.mark.parametrize("size", SIZES)
def test_a_model_far_larger_than_its_weights_is_refused_before_it_is_allocated(folder: Path, size: str) -> None:
    change(folder / "config.json", **{size: 10**12})
    auto = AutoModelForSequenceClassification

    with pytest.raises(ConfigError, match=r"has 32000000000000 elements, far more than all files of weights"):
        check_sizes(auto, str(folder), config_of(folder), setting="model.name_or_path")


def test_a_size_that_is_no_weight_is_accepted(folder: Path) -> None:
    change(folder / "config.json", some_other_length=10**12)

    check_sizes(AutoModelForSequenceClassification, str(folder), config_of(folder), setting="model.name_or_path")


def test_a_kernel_of_an_inner_part_is_refused(folder: Path) -> None:
    config = config_of(folder)
    config.text_config = config_of(folder)
    config.text_config.inner = config_of(folder)
    config.text_config.inner._attn_implementation = "someone/kernel"

    with pytest.raises(ConfigError, match="attn_implementation=someone/kernel"):
        refuse_kernels(config, schema.Model(name_or_path=str(folder)))


def test_a_tokenizer_config_that_is_a_list_is_no_traceback(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")

    with pytest.raises(ConfigError, match=r"model\.name_or_path="):
        tokenizer_of(folder)

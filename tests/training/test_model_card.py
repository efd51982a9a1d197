"""The model card: valid for the hub, whole, and without anything of one machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dtrain.config.load import load_config
from dtrain.config.schema import Config
from dtrain.training.model_card import bare_card, command_line, redact_paths, trained_card, write_card

SUMMARY: dict[str, Any] = {
    "eval": {"loss": 0.51234567, "accuracy": 0.75, "odd": float("nan")},
    "world_size": 2,
    "launcher": "torchrun",
    "engine": "ddp",
    "step": 12,
    "examples": 96,
    "rows": {"train": 8551, "validation": 1043},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}
BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
SETTINGS = ["task.name=classification", "model.name_or_path=bert-base-uncased", "data.name=cola", "run.name=cola"]


def card_of(
    *settings: str,
    summary: dict[str, Any] = SUMMARY,
    model: dict[str, Any] = BERT,
    adapters: dict[str, Any] | None = None,
) -> str:
    config = load_config(None, [*SETTINGS, *settings])
    with TemporaryDirectory() as place:
        return trained_card(config, summary, task=config.task.name, folder=folder_of(Path(place), model, adapters))


def folder_of(folder: Path, model: dict[str, Any], adapters: dict[str, Any] | None = None) -> Path:
    """A model's folder, as far as a card looks into it."""
    (folder / "config.json").write_text(json.dumps(model))
    if adapters is not None:
        (folder / "adapter_config.json").write_text(json.dumps(adapters))
    return folder


def test_the_front_matter_is_valid_for_the_hub() -> None:
    data = ModelCard(card_of()).data.to_dict()

    assert data["base_model"] == "bert-base-uncased"
    assert data["datasets"] == ["nyu-mll/glue"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    assert data["metrics"] == ["accuracy"]
    (result,) = data["model-index"][0]["results"]
    assert data["model-index"][0]["name"] == "cola"
    assert result["dataset"] == {"name": "cola", "type": "nyu-mll/glue", "config": "cola", "split": "validation"}
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {"loss": 0.51234567, "accuracy": 0.75}, "a value that is no number is none for the hub"


def test_the_text_has_data_rows_metrics_settings_versions_and_the_command() -> None:
    card = card_of("optim.learning_rate=3e-5", "train.epochs=2")

    for row in (
        "| train | 8551 |",
        "| validation | 1043 |",
        "| accuracy | 0.75 |",
        "| odd | nan |",
        "| optim.learning_rate | 3e-05 |",
        "| train.epochs | 2 |",
        "| seed | 0 |",
        "| torch | 2.13.0 |",
        "Ran on 2 processes, started by torchrun, engine ddp: 12 steps over 96 examples.",
        'BertForSequenceClassification.from_pretrained("FOLDER")',
    ):
        assert row in card


def test_the_command_line_gives_the_same_settings() -> None:
    settings = [
        *SETTINGS,
        "optim.learning_rate=3e-5",
        "train.max_steps=10",
        "train.eval_every=2 epochs",
        "freeze.modules=[embeddings, 'encoder.layer[:2]']",
        "evaluation.best={metric: accuracy}",
        "task.class_weights={'yes': 2.0, 'no': 1.0}",
        "data.delimiter=\t",
        "engine.deepspeed={zero_optimization: {stage3_max_live_parameters: 5}}",
    ]
    config = load_config(None, settings)

    words = shlex.split(command_line(config))

    assert words[:2] == ["dtrain", "train"]
    assert words.count("task.name=classification") == 1
    assert load_config(None, words[2:]) == config


def test_the_card_does_not_mention_the_machine() -> None:
    home = "/ho" + "me/ann"
    token = "hf_" + "a1B2c3D4e5F6"
    card = card_of(
        f"model.name_or_path={home}/models/mine",
        f"model.tokenizer={home}/tokens",
        f"data.path={home}/data/cola",
        f"run.output_dir={home}/runs",
        f"data.cache_dir={home}/cache",
        f"engine.deepspeed={{zero_optimization: {{offload_param: {{nvme_path: {home}/disk}}}}}}",
        f"data.splits={{train: ../../ann/{token}.csv}}",
        "data.columns={text: https://ann:secret@host/file}",
    )

    assert not re.search(r"ann|secret|home", card)
    assert token not in card
    assert "output_dir" not in card
    for left in ("mine", "tokens", "cola", "disk", "hf_....csv"):
        assert left in card
    assert "base_model" not in card, "a folder is no name on the hub"


def test_the_users_data_and_models_have_no_name_on_the_hub() -> None:
    settings = ["data.name=null", "data.path=reviews.csv", "model.from_scratch=true"]

    card = card_of(*settings)
    data = ModelCard(card).data.to_dict()

    assert not {"datasets", "base_model", "model-index"} & set(data)
    assert "`reviews.csv`" in card
    assert "A new bert model with the architecture of `bert-base-uncased`" in card


@pytest.mark.parametrize("part", ["data.limit=100", "data.splits={train: train, validation: test}"])
def test_results_on_a_part_of_the_data_are_not_the_hubs_results(part: str) -> None:
    card = card_of(part)

    assert "model-index" not in ModelCard(card).data.to_dict()
    assert "| accuracy | 0.75 |" in card


def test_a_run_without_evaluation_and_a_model_from_elsewhere_have_a_card_too(tmp_path: Path) -> None:
    plain = card_of(summary={**SUMMARY, "eval": {}, "world_size": 1}, model={"architectures": ["Mine"]})

    data = ModelCard(plain).data.to_dict()
    assert not {"metrics", "model-index", "library_name"} & set(data)
    assert "Not evaluated." in plain
    assert "Ran on one process" in plain
    assert "from_pretrained" not in plain
    assert ModelCard(bare_card("mine", folder_of(tmp_path, BERT))).data.to_dict()["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("cola", "cola"),
        ("org/name", "org/name"),
        ("data/cola", "data/cola"),
        ("/a/b", "b"),
        ("/", "..."),
        ("~/x", "x"),
        ("../../x", "x"),
        (["/a/b", 1], ["b", 1]),
        ({"k": "/a/b"}, {"k": "b"}),
        (None, None),
    ],
)
def test_only_the_last_part_of_a_path_is_kept(value: Any, told: Any) -> None:
    assert redact_paths(value) == told


def test_a_bar_in_a_value_does_not_break_a_table() -> None:
    assert '| freeze.modules | ["a\\|b"] |' in card_of('freeze.modules=["a|b"]')


def test_the_card_is_written_into_the_models_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')

    write_card(tmp_path, Config.model_validate({"task": {"name": "classification"}}), SUMMARY, task="own_task")

    text = (tmp_path / "README.md").read_text()
    assert "- own-task" in text
    assert "pipeline_tag" not in text
    assert "BertModel.from_pretrained" in text


@pytest.mark.parametrize("metric", ["translation", "summarization"])
def test_the_pipeline_of_seq2seq_is_its_metric(metric: str) -> None:
    settings = ["task.name=seq2seq", "model.name_or_path=t5-small", "data.name=opus", f"task.metric={metric}"]
    config = load_config(None, settings)

    with TemporaryDirectory() as place:
        made = trained_card(config, SUMMARY, task="seq2seq", folder=folder_of(Path(place), {"model_type": "t5"}))
        own = trained_card(config, SUMMARY, task="own_task", folder=Path(place))

    data = ModelCard(made).data.to_dict()
    assert data["pipeline_tag"] == metric
    assert data["model-index"][0]["results"][0]["task"]["type"] == metric
    assert "pipeline_tag" not in ModelCard(own).data.to_dict()


def test_the_card_of_adapters_loads_the_base_model() -> None:
    adapters = {"base_model_name_or_path": "bert-base-uncased", "modules_to_save": ["classifier"]}

    card = card_of("model.lora={r: 8}", adapters=adapters)

    data = ModelCard(card).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    for line in (
        "from peft import PeftModel",
        "from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification",
        'base = BertForSequenceClassification.from_pretrained("bert-base-uncased", config=config, '
        "ignore_mismatched_sizes=True)",
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    ):
        assert line in card.splitlines()
    assert "base_model_relation" not in ModelCard(card_of()).data.to_dict()


def test_the_card_of_adapters_keeps_only_the_name_of_the_base_folder() -> None:
    card = card_of("model.lora={r: 8}", adapters={"base_model_name_or_path": "/ho" + "me/ann/models/mine"})

    assert 'from_pretrained("mine", config=config)' in card
    assert "ann" not in card

"""predict.text: what a text is for each task, that its answer is the one in a file's predictions, and every wrong text."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.commands.answer import format_answer, read_row
from dtrain.commands.predict import run_predict
from dtrain.config.load import load_config
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.tasks.build import build_task
from dtrain.training import build
from dtrain.training.export import processor_or_tokenizer, save
from tests.support import pictures, tiny

BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1}
ENDINGS = {"sent1": "the big dog", "sent2": "a", "ending0": "cat sees", "ending1": "bird", "ending2": "dog runs near"}
SHORT = {"doc_stride": 2, "name": "question_answering"}

TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "classification": ({}, BERT, [{"text": "a cat", "label": "x"}, {"text": "dog", "label": "y"}]),
    "multi_label": ({}, BERT, [{"text": "a cat", "label": ["x", "y"]}, {"text": "dog", "label": []}]),
    "regression": ({}, BERT, [{"text": "a cat", "label": 1.5}]),
    "multiple_choice": ({}, BERT, [{**ENDINGS, "label": 1}]),
    "question_answering": (
        SHORT,
        BERT,
        [{"question": "cat", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [2]}}],
    ),
    "token_classification": ({}, BERT, [{"tokens": ["a", "cat", "sees"], "tags": ["O", "B-A", "I-A"]}]),
    "seq2seq": ({"max_target_length": 6}, T5, [{"source": "a cat", "target": "cat a"}]),
    "image_classification": ({}, pictures.VIT, [{"image": "0.png", "label": "x"}, {"image": "1.png", "label": "y"}]),
    "image_regression": ({"targets": ["u", "v"]}, pictures.VIT, [{"image": "0.png", "u": 0.5, "v": 1.0}]),
}
"""By task: its settings, a model and rows that say what its outputs are called."""


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    return caplog


def config(folder: Path, task: str, **sections: Any) -> Config:
    data = {"path": folder / "data", "cache_dir": folder / "cache", "max_length": 24, **sections.pop("data", {})}
    return Config.model_validate(
        {
            "run": {"name": "told", "output_dir": str(folder)},
            "task": {"name": task, **TRAINED[task][0]},
            "data": data,
            **sections,
        }
    )


def write_model(folder: Path, task: str, **data: Any) -> None:
    """folder/model, made as a training run makes it; louder, so that what it answers depends on what it is asked."""
    _, sizes, rows = TRAINED[task]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "vocab.txt").write_text("\n".join([*tiny.SPECIAL, *tiny.WORDS]) + "\n")
    for number, colour in enumerate(pictures.COLOURS.values()):
        pictures.draw(folder / "data" / f"{number}.png", colour, random.Random(number))
    model = {"from_scratch": True, "config": sizes, "tokenizer": str(folder / "vocab.txt")}
    settings = config(folder, task, model=model, data=data)
    made = build_task(settings, ONE_PROCESS)
    module = build.load(settings, made, ONE_PROCESS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0)
    save(module, dict(module.named_parameters()), processor_or_tokenizer(made), folder / "model")


def told(folder: Path, task: str, said: pytest.LogCaptureFixture, text: str, pair: str | None = None) -> str:
    """What the command prints, all of it."""
    said.clear()
    asked = {"text": text, "text_pair": pair}
    run_predict(config(folder, task, model={"name_or_path": str(folder / "model")}, predict=asked), ONE_PROCESS)
    (line,) = said.messages
    return line


def written(folder: Path, task: str, row: dict[str, Any]) -> Any:
    """The prediction of a file with that row."""
    (folder / "data" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    asked = {"file": folder / "data" / "rows.jsonl"}
    run_predict(config(folder, task, model={"name_or_path": str(folder / "model")}, predict=asked), ONE_PROCESS)
    return json.loads((folder / "told" / "predictions" / "test.jsonl").read_text())["prediction"]


def number(value: float) -> str:
    return f"{value:.4f}"


def tagged(words: list[str]) -> Callable[[Any], str]:
    return lambda tags: " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))


def texts_of(task: str, folder: Path) -> tuple[str, str | None, dict[str, Any], Callable[[Any], str]]:
    """Text and pair, the row that they mean, and how its prediction is said."""
    picture = str(folder / "data" / "2.png")
    match task:
        case "question_answering":
            row = {"question": "cat", "context": "the old cat sees a red bird near the dog"}
            return "cat", row["context"], row, lambda found: found or "(no answer in this text)"
        case "token_classification":
            return (
                " the cat  sees a dog",
                None,
                {"tokens": (words := ["the", "cat", "sees", "a", "dog"])},
                tagged(words),
            )
        case "seq2seq":
            return "the big cat", None, {"source": "the big cat"}, str
        case "multiple_choice":
            return json.dumps(ENDINGS), None, ENDINGS, lambda found: f"ending{found}: {ENDINGS[f'ending{found}']}"
        case "image_classification":
            return picture, None, {"image": "2.png"}, str
        case "image_regression":
            return picture, None, {"image": "2.png"}, lambda found: f"u {number(found[0])}, v {number(found[1])}"
        case "multi_label":
            return "the cat", None, {"text": "the cat"}, lambda found: ", ".join(found) or "no label"
        case "regression":
            return "the cat", "a dog", {"text": "the cat", "text_pair": "a dog"}, number
        case _:
            return "the cat", None, {"text": "the cat"}, str


@pytest.mark.parametrize("task", TRAINED)
def test_a_text_is_answered_like_a_row_of_a_file_and_no_file_is_written(
    tmp_path: Path, said: pytest.LogCaptureFixture, task: str
) -> None:
    write_model(tmp_path, task)
    text, pair, row, wording = texts_of(task, tmp_path)
    before = set(tmp_path.rglob("*"))

    line = told(tmp_path, task, said, text, pair)

    assert set(tmp_path.rglob("*")) == before
    assert re.sub(r" \(probability [^()]*[01]\.\d{4}\)$", "", line) == wording(written(tmp_path, task, row))
    if not task.startswith("image"):  # whose row names a file processor_or_tokenizer the table
        assert told(tmp_path, task, said, json.dumps(row)) == line
    assert ("probability" in line) == (
        "classification" in task or task in ("multiple_choice", "multi_label")
    ) or "token" in task


def test_a_json_row_has_the_users_columns_and_paths_relative_to_the_working_folder(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "image_classification")
    monkeypatch.chdir(tmp_path / "data")
    settings: dict[str, Any] = {"model": {"name_or_path": "../model"}, "data": {"columns": {"image": "photo"}}}

    said.clear()
    for text in ('{"photo": "2.png"}', "2.png"):
        run_predict(config(tmp_path, "image_classification", predict={"text": text}, **settings), ONE_PROCESS)

    assert said.messages[0] == said.messages[1]


def test_words_that_the_model_cannot_see_have_no_tag() -> None:
    made = Config.model_validate({"task": {"name": "token_classification"}})

    assert format_answer({"prediction": ["O", None]}, {"tokens": ["a", "b"]}, made) == "a/O b"


def test_a_question_without_an_answer_says_so() -> None:
    made = Config.model_validate({"task": {"name": "question_answering"}})

    assert format_answer({"prediction": ""}, {}, made) == "(no answer in this text)"


def test_an_answer_is_formatted_with_its_further_values() -> None:
    made = Config.model_validate({"task": {"name": "classification"}})

    assert (
        format_answer({"prediction": "yes", "probability": 0.75, "rank": 1}, {}, made)
        == "yes (probability 0.7500, rank 1)"
    )
    assert format_answer({"prediction": 3.14159}, {}, made) == "3.1416"


def test_the_source_of_a_translation_is_in_the_column_of_the_settings() -> None:
    given = ["task.name=seq2seq", "task.source=en", "task.target=ro", "model.name_or_path=m", "predict.text=a cat"]

    assert read_row(load_config(None, given, command="predict")) == {"en": "a cat"}


def test_json_on_the_command_line_stays_text() -> None:
    given = ["task.name=multiple_choice", "model.name_or_path=m", 'predict.text={"sent1": "a: b #c", "sent2": ""}']

    assert read_row(load_config(None, given, command="predict")) == {"sent1": "a: b #c", "sent2": ""}


# Wrong texts


@pytest.mark.parametrize(
    ("task", "text", "pair", "kind", "message"),
    [
        ("multiple_choice", "the cat", None, ConfigError, r"a row with all its columns, as JSON: predict.text='\{\"sent1"),
        ("multiple_choice", '{"sent1": "a", "sent2": "b", "ending0": "c"}', None, DataError,
         r"predict\.text has no column ending1\."),
        ("multiple_choice", '{"sent1": 3, "sent2": "b", "ending0": "c", "ending1": "d"}', None, DataError,
         r"^predict\.text: sent1 must be text, found 3"),
        ("question_answering", "cat", None, ConfigError,
         "predict.text is the question here: set predict.text_pair to the context, or write both as JSON"),
        ("question_answering", '{"question": "cat"}', None, DataError, r"predict\.text has no column context"),
        ("question_answering", "cat " * 30, "the dog", DataError, r"^predict\.text: the question has 30 tokens"),
        ("token_classification", "the cat", "x", ConfigError, "task.name=token_classification reads no second text"),
        ("token_classification", " ", None, DataError, r"^predict\.text: tokens is empty"),
        ("seq2seq", "the cat", "x", ConfigError, "task.name=seq2seq reads no second text"),
        ("classification", '{"text": ', None, ConfigError, r"read as JSON, as the columns of a row, but: Expecting value.* "
         r"Write it like '\{\"text\": \"A cat sleeps\.\"\}'"),
        ("classification", '{"text": "a"} b', None, ConfigError, "but: Extra data"),
        ("classification", '{"foo": "a"}', None, DataError, r"^predict\.text has no column with a usual name for text"),
        ("classification", '{"text": "a"}', "b", ConfigError, "put predict.text_pair into it as a column"),
        ("classification", '{"text": "a", "label": "z"}', None, DataError, r"^predict\.text: 'z' is not one of the known"),
        ("image_classification", "nowhere.png", None, DataError, r"^predict\.text: the image /.*nowhere\.png cannot be"),
        ("image_classification", "{folder}/vocab.txt", None, DataError, r"^predict\.text: .*vocab\.txt is not an image"),
    ],
)  # fmt: skip
def test_a_text_that_is_not_a_row_of_the_task_is_refused(
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    task: str,
    text: str,
    pair: str | None,
    kind: type[DtrainError],
    message: str,
) -> None:
    write_model(tmp_path, task)
    before = set(tmp_path.iterdir())

    with pytest.raises(kind, match=message) as raised:
        told(tmp_path, task, said, text.replace("{folder}", str(tmp_path)), pair)

    assert "dtrain-predict-" not in str(raised.value)
    assert set(tmp_path.iterdir()) == before
    assert log.level == logging.INFO

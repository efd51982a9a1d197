"""Rows that cannot be encoded are bad rows: counted with those that cannot be read, and passed over as far as allowed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.sources import Source, load_sources
from dtrain.data.tables import TEXT
from dtrain.errors import ConfigError, DataError
from dtrain.models.tokenizer import build_char_tokenizer, train_bpe_tokenizer
from dtrain.tasks.classification import ClassificationTask
from dtrain.tasks.prepare import encode_texts, map_rows
from dtrain.tasks.token_classification import encode_words
from dtrain.tasks.truncation import FULL_LENGTH
from tests.support import tiny

ROWS = ["one", "bad", "three", "bad", "five"]


def config(**data: Any) -> Config:
    return Config.model_validate({"task": {"name": "causal_lm"}, "data": data})


def source(folder: Path, texts: list[Any] = ROWS, **data: Any) -> tuple[Source, Config]:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = config(path=folder / "a.jsonl", **data)
    return load_sources(settings.data, TEXT)["train"], settings


def encode(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Two examples of each row, and none of one that is called bad."""
    for text, line in zip(rows["text"], rows["line"], strict=True):
        if text == "bad":
            raise DataError(f"a.jsonl, line {line}: it is bad")
    return {"half": [part for text in rows["text"] for part in (text[:2], text[2:])]}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    return caplog


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_cannot_be_encoded_are_skipped_in_order(
    tmp_path: Path, said: pytest.LogCaptureFixture, processes: int
) -> None:
    rows, settings = source(tmp_path, max_bad_rows=2, num_proc=processes)

    found = map_rows(rows, encode, settings)

    assert found["half"][:] == ["on", "e", "th", "ree", "fi", "ve"]
    assert rows.skipped == 2
    assert [text for text in said.messages if "data: skipped:" in text] == [
        "data: skipped: a.jsonl, line 2: it is bad",
        "data: skipped: a.jsonl, line 4: it is bad",
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_without_max_bad_rows_the_first_bad_row_is_an_error(tmp_path: Path, processes: int) -> None:
    rows, settings = source(tmp_path, num_proc=processes)

    with pytest.raises(
        DataError, match=r"a\.jsonl, line 2: it is bad\. In all, 2 of 5 rows .*; data\.max_bad_rows=2 skips them$"
    ):
        map_rows(rows, encode, settings)


def test_rows_that_cannot_be_encoded_or_read_are_counted_together(tmp_path: Path) -> None:
    rows, settings = source(tmp_path, ["one", 2, "bad", "bad"], max_bad_rows=2)

    assert rows.skipped == 1
    with pytest.raises(DataError, match=r"line 4: it is bad \(data\.max_bad_rows=2 were skipped before it\)"):
        map_rows(rows, encode, settings)


def test_a_split_without_usable_rows_is_refused(tmp_path: Path) -> None:
    rows, settings = source(tmp_path, ["bad", "bad"], max_bad_rows=2)

    with pytest.raises(DataError, match=r"a\.jsonl has no rows that can be used: a split needs at least one"):
        map_rows(rows, encode, settings)


def test_a_wrong_setting_is_not_a_bad_row(tmp_path: Path) -> None:
    def refuse(_rows: Mapping[str, Any]) -> dict[str, Any]:
        raise ConfigError("change it")

    rows, settings = source(tmp_path, max_bad_rows=9)

    with pytest.raises(ConfigError, match="change it"):
        map_rows(rows, refuse, settings)


# Texts without tokens


@pytest.mark.parametrize(
    ("tokenizer", "stands_for_nothing"),
    [
        (build_char_tokenizer(["abc"], pad=True), "<unk>"),
        (train_bpe_tokenizer(["abc"], vocab_size=300, pad=True), "<|endoftext|>"),
    ],
    ids=["char", "train-bpe"],
)
def test_an_empty_text_becomes_one_token_where_the_tokenizer_adds_none(tokenizer: Any, stands_for_nothing: str) -> None:
    token = tokenizer.convert_tokens_to_ids(stands_for_nothing)

    encoded = encode_texts({"text": ["ab", "", "c"], "text_pair": None}, tokenizer, max_length=8)
    words = encode_words([["a", "b"], []], tokenizer, max_length=8)

    assert [len(ids) for ids in encoded["input_ids"]] == [len(tokenizer("ab")["input_ids"]), 1, 1]
    assert encoded["input_ids"][1] == words["input_ids"][1] == [token]
    assert words["places"][1] == []
    per_token = [columns for name, columns in encoded.items() if name != FULL_LENGTH]
    assert all(len(row) == len(ids) for rows in per_token for row, ids in zip(rows, encoded["input_ids"], strict=True))


def test_an_empty_text_can_be_a_batch_of_its_own_and_is_seen_beside_others() -> None:
    tokenizer = build_char_tokenizer(["abc"], pad=True)
    settings = Config.model_validate({"task": {"name": "classification"}}).task
    task = ClassificationTask({}, tokenizer, ["x", "y"], settings, max_length=8)  # type: ignore[arg-type]
    rows = {**encode_texts({"text": ["", "abc"], "text_pair": None}, tokenizer, max_length=8), "label": [0, 1]}

    alone = task.collate({name: values[:1] for name, values in rows.items()}, tiny.HERE)
    together = task.collate(rows, tiny.HERE)

    assert alone["input_ids"].tolist() == [[tokenizer.unk_token_id]]
    assert together["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_tokenizer_that_adds_special_tokens_encodes_an_empty_text_as_before() -> None:
    encoded = encode_texts({"text": ["", "the cat"], "text_pair": None}, tiny.tokenizer(), max_length=8)

    assert encoded["input_ids"][0] == [2, 3]

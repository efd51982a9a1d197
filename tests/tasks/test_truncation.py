"""Texts that are cut and rows without a target: counted for every task, with the setting that keeps them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import DataError
from dtrain.tasks.build import build_task
from dtrain.tasks.prepare import encode_texts
from dtrain.tasks.truncation import FULL_LENGTH, full_lengths
from tests.support import tiny

LONG = "the cat the cat the cat"


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    return caplog


def build(folder: Path, rows: list[dict[str, Any]], task: dict[str, Any], **data: Any) -> Any:
    tiny.tokenizer().save_pretrained(folder / "words")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "task": task,
            "model": {"from_scratch": True, "tokenizer": str(folder / "words"), "config": {"model_type": "bert"}},
            "data": {"path": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache"), "max_length": 5, **data},
        }
    )
    return build_task(config, ONE_PROCESS)


TWO = [{"sent1": "the", "sent2": "the", "ending0": LONG, "ending1": "cat", "label": 0}]


@pytest.mark.parametrize(
    ("task", "long", "short"),
    [
        ({"name": "classification"}, {"text": LONG, "label": "a"}, {"text": "the cat", "label": "b"}),
        ({"name": "regression"}, {"text": LONG, "label": 1.0}, {"text": "the cat", "label": 2.0}),
        ({"name": "seq2seq"}, {"source": LONG, "target": "the"}, {"source": "the cat", "target": "cat"}),
    ],
    ids=["classification", "regression", "seq2seq"],
)
def test_texts_that_are_cut_are_counted_at_every_start(
    tmp_path: Path, logged: pytest.LogCaptureFixture, task: Any, long: Any, short: Any
) -> None:
    for _ in range(2):  # the second start reads what the first one kept
        logged.clear()
        made = build(tmp_path, [long, short, short, short], task)
        assert (
            "data: train: 1 of 4 texts (25.0 %) have more than data.max_length=5 tokens and are cut there; "
            "data.max_length=8 keeps all" in logged.messages
        )
    assert "full_length" not in made.splits["train"].column_names
    logged.clear()
    build(tmp_path, [long, short], task, max_length=8)
    assert "cut" not in logged.text


def test_targets_that_are_cut_are_counted_apart(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    build(tmp_path, [{"source": "the", "target": LONG}], {"name": "seq2seq", "max_target_length": 6})

    assert (
        "data: train: 1 of 1 targets (100.0 %) have more than task.max_target_length=6 tokens and are cut there; "
        "task.max_target_length=8 keeps all" in logged.messages
    )


def test_rows_without_a_token_to_mask_are_counted(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    build(tmp_path, [{"text": ""}, {"text": LONG}, {"text": " "}], {"name": "masked_lm"})

    assert any("data: train: 2 of 3 rows have no token to predict and are left out" in text for text in logged.messages)


def test_a_sentence_without_a_token_is_a_bad_row(tmp_path: Path) -> None:
    good = {"tokens": ["the", "cat"], "tags": ["A", "B"]}
    bad = {"tokens": ["\u200b", "\x00"], "tags": ["A", "B"]}

    with pytest.raises(DataError, match=r"line 2: a sentence without a target: .* any of its 2 word\(s\) .*u200b"):
        build(tmp_path, [good, bad], {"name": "token_classification"})
    made = build(tmp_path, [good, bad], {"name": "token_classification"}, max_bad_rows=1)
    assert len(made.splits["train"]) == 1


def fast_tokenizers() -> dict[str, Any]:
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *tiny.WORDS])}
    added: dict[str, Any] = {
        "none": None,
        "both ends": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        "an end": processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)]),
        "two of each": processors.TemplateProcessing("<s> <s> $A </s> </s>", None, [("<s>", 0), ("</s>", 1)]),
        "several": processors.Sequence([processors.ByteLevel(), processors.BertProcessing(("</s>", 1), ("<s>", 0))]),
    }
    made = {}
    for name, processor in added.items():
        backend = Tokenizer(WordLevel(vocabulary, unk_token="the"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        if processor is not None:
            backend.post_processor = processor
        made[name] = PreTrainedTokenizerFast(tokenizer_object=backend)
    return made


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_a_fast_tokenizer_cut_off_is_counted_without_encoding_again(side: str) -> None:
    texts = [" ".join(["cat"] * words) for words in (1, 3, 4, 5, 6, 7, 8, 9, 17, 40)]
    for name, tokenizer in {**fast_tokenizers(), "bert": tiny.tokenizer()}.items():
        tokenizer.truncation_side = side
        whole = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        for max_length in (5, 6, 8):
            encoded = tokenizer(texts, truncation=True, max_length=max_length)
            counts_only = SimpleNamespace(num_special_tokens_to_add=tokenizer.num_special_tokens_to_add)

            lengths = full_lengths(
                counts_only, encoded["input_ids"], {}, max_length=max_length, encodings=encoded.encodings
            )

            assert lengths == whole, (name, max_length)
            assert encode_texts({"text": texts}, tokenizer, max_length=max_length)[FULL_LENGTH] == whole
    pairs = {"text": texts, "text_pair": texts[::-1]}
    whole = [len(ids) for ids in tokenizer(**pairs)["input_ids"]]
    assert encode_texts(pairs, tokenizer, max_length=8)[FULL_LENGTH] == whole

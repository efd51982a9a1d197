"""A pattern in a tokenizer that takes exponential time for some texts is named instead of hanging."""

from __future__ import annotations

import pickle
import threading
import time
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dtrain.errors import DataError
from dtrain.models.tokenizer_limits import find_patterns, limited_time

BOMB = r"(x+x+)+y"
GOOD, PANICS = "a b", "x" * 40 + " "
SLOW = ("x" * 22 + " ") * 400
"""Each word takes about 0.05 s, which the library's own limit allows."""


def tokenizer(**parts: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, " ": 3}, unk_token="[UNK]"))
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split(BOMB)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), split(BOMB)])},
        {"normalizer": normalizers.Replace(Regex(BOMB), "z")},
    ],
    ids=["split", "in a sequence", "normalizer"],
)
def test_a_pattern_that_the_library_gives_up_on_is_named_with_the_text(parts: dict[str, Any]) -> None:
    own = tokenizer(**parts)
    backend = own._tokenizer

    with pytest.raises(DataError) as raised, limited_time(own):
        own([GOOD, PANICS, GOOD])

    message = str(raised.value)
    assert "gave up" in message
    assert f"one of them is {PANICS!r}" in message
    assert repr(BOMB) in message
    assert "model.tokenizer" in message
    assert raised.value.exit_code == 3
    assert own._tokenizer is backend


def test_a_pattern_below_the_librarys_limit_is_bounded_in_time() -> None:
    own, begin = tokenizer(pre_tokenizer=split(BOMB)), time.monotonic()

    said = r"did not come to an end in 1 s with a batch of 3 texts; one of them is 'xxx"
    with pytest.raises(DataError, match=said), limited_time(own, time_limit_s=0.5):
        own([GOOD, SLOW, GOOD])

    assert time.monotonic() - begin < 20


def test_a_usual_tokenizer_gives_the_same_and_leaves_no_thread() -> None:
    own, threads = tokenizer(pre_tokenizer=split(r"\s")), threading.active_count()
    expected = own([GOOD, GOOD])["input_ids"]

    with limited_time(own):
        assert own([GOOD, GOOD], add_special_tokens=False)["input_ids"] == expected
        assert own(GOOD)["input_ids"] == expected[0]
        assert own([[GOOD], [GOOD]], is_split_into_words=True)["input_ids"]
        assert own(GOOD, truncation=True, max_length=1)["input_ids"] == expected[0][:1]
        assert pickle.loads(pickle.dumps(own))(GOOD)["input_ids"] == expected[0]
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)

    assert threading.active_count() == threads


def test_a_tokenizer_without_patterns_is_left_alone() -> None:
    own = tokenizer(pre_tokenizer=pre_tokenizers.ByteLevel())
    backend = own._tokenizer

    with limited_time(own), limited_time(None):
        assert own._tokenizer is backend
    assert find_patterns(backend) == []

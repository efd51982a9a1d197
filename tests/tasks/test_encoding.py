"""Encoding many texts gives what calling the tokenizer gives, whether or not the call is passed by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from dtrain.errors import DataError
from dtrain.models.tokenizer_limits import limited_time
from dtrain.tasks import encoding
from dtrain.tasks.encoding import encode_all
from tests.support.tiny import tokenizer as word_pieces

TEXTS = [
    "the movie was good",
    "",
    "one",
    "\u4e2d\u6587 text, with 3 scripts: \u00e9 e\u0301 \ufb01",
    "<pad> [PAD] </s>",
    "a " * 40,
    " x  y ",
]
PAIRS = [*TEXTS[1:], "the last"]


def _byte_level(**options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s>:1 $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


def _split_by_pattern() -> PreTrainedTokenizerFast:
    made = _byte_level()
    made._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s?\w+|\s"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def _left_with_settings() -> Any:
    made = word_pieces()
    made(TEXTS, truncation=True, padding="max_length", max_length=5, stride=1)
    return made


class Own(BertTokenizer):
    """A tokenizer whose author does more than to call the library."""

    def _encode_plus(self, *args: Any, **options: Any) -> Any:
        found = super()._encode_plus(*args, **options)
        found["input_ids"] = [ids[::-1] for ids in found["input_ids"]]
        return found


KINDS: dict[str, Callable[[], Any]] = {
    "word pieces": word_pieces,
    "byte level": _byte_level,
    "cut on the left": lambda: _byte_level(truncation_side="left"),
    "special tokens as text": lambda: _byte_level(split_special_tokens=True),
    "split by a pattern": _split_by_pattern,
    "left with settings": _left_with_settings,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("max_length", [None, 8, 5])
@pytest.mark.parametrize("pairs", [None, PAIRS])
@pytest.mark.parametrize("special", [True, False])
def test_the_tokens_are_those_of_the_tokenizer(
    name: str, max_length: int | None, pairs: list[str] | None, special: bool
) -> None:
    tokenizer = KINDS[name]()
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    expected = KINDS[name]()(TEXTS, pairs, add_special_tokens=special, return_attention_mask=False, **cut)

    assert encoding._may_pass_by(tokenizer)
    for _ in range(2):
        found = encode_all(tokenizer, TEXTS, pairs, max_length=max_length, special_tokens=special)

        assert found.columns == dict(expected)
        assert found.encodings is not None
        rests = [[part.ids for part in each.overflowing] for each in found.encodings]
        assert rests == [[part.ids for part in each.overflowing] for each in expected.encodings]


def test_a_tokenizer_that_does_more_is_called() -> None:
    plain = word_pieces()
    own = Own(tokenizer_object=plain.backend_tokenizer, **plain.init_kwargs)

    found = encode_all(own, TEXTS, max_length=8)

    assert not encoding._may_pass_by(own)
    assert found.columns["input_ids"] == own(TEXTS, truncation=True, max_length=8)["input_ids"]
    assert found.columns["input_ids"] != encode_all(plain, TEXTS, max_length=8).columns["input_ids"]


def test_a_tokenizer_in_python_is_called() -> None:
    class Slow:
        """Counts words."""

        def __call__(self, texts: list[str], pairs: object, **_options: Any) -> Any:
            found = _Columns(input_ids=[[len(text.split())] for text in texts])
            found.encodings = None
            return found

    class _Columns(dict[str, Any]):
        encodings: Any

    assert encode_all(Slow(), ["a b", "c"]) == ({"input_ids": [[2], [1]]}, None)


def test_no_text() -> None:
    assert encode_all(word_pieces(), [], max_length=8).columns["input_ids"] == []


def test_the_limit_of_time_holds() -> None:
    tokenizer = _byte_level()
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(x+x+)+y"), "isolated")

    with pytest.raises(DataError, match="exponential time"), limited_time(tokenizer):
        encode_all(tokenizer, ["a", "x" * 40 + " "])

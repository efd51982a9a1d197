"""Tokenizers from every source, and exact decoding of those that are built from text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig

from dtrain.config import schema
from dtrain.errors import ConfigError, DataError
from dtrain.models.saved_tokenizer import fingerprint
from dtrain.models.tokenizer import (
    build_char_tokenizer,
    has_characters_only,
    load_tokenizer,
    reload_tokenizer,
    train_bpe_tokenizer,
)
from tests.support import tiny

# Line breaks and white space of every kind, an emoji, a combining accent, a Chinese word, the names of special tokens.
TEXT = "It's  fine , no ?\n\n\ttab\r\n\u2028\x0b\x00 \u65e5\u672c \U0001f600 e\u0301 <unk> <pad>"


def no_text() -> Iterable[str]:
    raise AssertionError("the training text is read for char only")


@pytest.mark.parametrize("pad", [False, True])
def test_a_char_tokenizer_has_a_token_per_character_and_decodes_to_the_same_text(pad: bool, tmp_path: Path) -> None:
    made = build_char_tokenizer([TEXT], pad=pad)
    made.save_pretrained(tmp_path)

    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(TEXT)["input_ids"]
        assert len(ids) == len(TEXT)
        assert tokenizer.decode(ids) == TEXT
        assert len(tokenizer) == 1 + pad + len(set(TEXT))


def test_a_char_tokenizer_numbers_characters_by_code_point_whatever_the_order_of_the_texts() -> None:
    there, back = build_char_tokenizer(["ba", "\u00e9c"]), build_char_tokenizer(["c\u00e9", "ab"])

    assert there.get_vocab() == {"<unk>": 0, "a": 1, "b": 2, "c": 3, "\u00e9": 4}
    assert fingerprint(there) == fingerprint(back)


def test_an_unknown_character_becomes_the_unknown_token() -> None:
    tokenizer = build_char_tokenizer(["ab"])

    assert tokenizer("azb")["input_ids"] == [1, 0, 2]


def test_a_char_tokenizer_without_a_character_is_refused() -> None:
    with pytest.raises(DataError, match="no character"):
        build_char_tokenizer(["", ""])


def test_char_has_a_pad_token_only_if_the_task_pads() -> None:
    model = schema.Model(tokenizer="char")

    assert load_tokenizer(model, training_texts=lambda: ["ab"]).pad_token_id is None
    assert load_tokenizer(model, training_texts=lambda: ["ab"], needs_padding=True).pad_token_id == 1


def test_model_tokenizer_overrides_the_models_own_tokenizer(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "own")
    build_char_tokenizer(["abc"]).save_pretrained(tmp_path / "other")
    own, other = str(tmp_path / "own"), str(tmp_path / "other")

    assert len(load_tokenizer(schema.Model(name_or_path=own), training_texts=no_text)) == len(tiny.tokenizer())
    assert len(load_tokenizer(schema.Model(name_or_path=own, tokenizer=other), training_texts=no_text)) == 4
    assert len(reload_tokenizer(tmp_path / "other", schema.Model())) == 4


def test_a_vocabulary_file_has_a_token_per_line_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[CLS]\n[PAD]\n[SEP]\n[UNK]\nthe\ncat\n##s\n", encoding="utf-8")

    tokenizer = load_tokenizer(schema.Model(tokenizer=str(path)), training_texts=no_text)

    assert tokenizer("The cats zzz")["input_ids"] == [0, 4, 5, 6, 3, 2]
    assert tokenizer.pad_token_id == 1
    assert len(tokenizer) == 7  # no [MASK] is added past the end of the embedding


def test_a_vocabulary_file_gives_the_same_tokens_as_the_folder_it_belongs_to(tmp_path: Path) -> None:
    vocabulary = tiny.tokenizer().get_vocab()
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)), encoding="utf-8")

    tokenizer = load_tokenizer(schema.Model(tokenizer=str(path)), training_texts=no_text)

    assert tokenizer("the dog sees a big bird")["input_ids"] == tiny.tokenizer()("the dog sees a big bird")["input_ids"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, ConfigError, "no such vocabulary file"),
        (b"[UNK]\n[CLS]\nthe\n", ConfigError, r"lacks \[SEP\], \[PAD\]"),
        (b"[UNK]\n\xff\n", DataError, "byte 6"),
    ],
)
def test_a_vocabulary_file_that_cannot_be_used_is_refused(
    content: bytes | None, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(kind, match=message):
        load_tokenizer(schema.Model(tokenizer=str(path)), training_texts=no_text)


def test_a_folder_without_a_tokenizer_is_refused_though_transformers_would_make_an_empty_one(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=r"model.name_or_path=.* has no tokenizer.*model.tokenizer"):
        load_tokenizer(schema.Model(name_or_path=str(tmp_path)), training_texts=no_text)


def test_no_tokenizer_at_all_is_refused() -> None:
    new = schema.Model(from_scratch=True, config={"model_type": "bert"})
    with pytest.raises(ConfigError, match=r"model\.tokenizer is not set"):
        load_tokenizer(new, training_texts=no_text)
    with pytest.raises(ConfigError, match=r"model\.name_or_path is not set"):
        load_tokenizer(schema.Model(), training_texts=no_text)


def test_a_fingerprint_is_the_same_after_use_saving_and_loading(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    before = fingerprint(tokenizer)

    tokenizer(["the cat", "a"], truncation=True, max_length=3, padding="max_length")
    tokenizer.save_pretrained(tmp_path)

    assert fingerprint(tokenizer) == before
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before


def test_a_fingerprint_changes_with_what_changes_the_tokens() -> None:
    plain, sided = build_char_tokenizer(["ab"]), build_char_tokenizer(["ab"])
    sided.truncation_side = "left"

    prints = [
        fingerprint(t) for t in (plain, sided, build_char_tokenizer(["abc"]), build_char_tokenizer(["ab"], pad=True))
    ]

    assert len(set(prints)) == 4


# Trained on the text


def test_trained_bpe_decodes_any_text_exactly_also_after_saving(tmp_path: Path) -> None:
    made = train_bpe_tokenizer(["the cat sees the dog, the dog sees the cat"] * 3, vocab_size=265)
    made.save_pretrained(tmp_path)

    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT  # hardly a character is known
        assert len(tokenizer) == 265
        assert tokenizer("the")["input_ids"] == [tokenizer.get_vocab()["the"]]
        assert tokenizer("<|endoftext|>")["input_ids"] != [tokenizer.eos_token_id]  # text is text


def test_trained_bpe_is_the_same_each_time() -> None:
    texts = ["one two three two one", "three four", TEXT]

    prints = {fingerprint(train_bpe_tokenizer(texts, vocab_size=300)) for _ in range(3)}

    assert len(prints) == 1
    assert prints != {fingerprint(train_bpe_tokenizer(texts, vocab_size=290))}


def test_trained_bpe_on_a_single_letter_is_256_bytes_and_no_character_tokenizer() -> None:
    tokenizer = train_bpe_tokenizer(["a"], vocab_size=8000)

    assert tokenizer.decode(tokenizer("aba\u00e9")["input_ids"]) == "aba\u00e9"
    assert len(tokenizer) == 257
    assert not has_characters_only(tokenizer)  # its tokens are single letters, and an accent takes two


def test_trained_bpe_without_a_character_is_refused() -> None:
    with pytest.raises(DataError, match="train-bpe is trained on the training text"):
        train_bpe_tokenizer(["", ""], vocab_size=300)


def test_train_bpe_has_pad_and_mask_tokens_only_if_the_task_pads() -> None:
    model = schema.Model(tokenizer="train-bpe", tokenizer_vocab_size=300)

    plain = load_tokenizer(model, training_texts=lambda: ["ab"])
    padding = load_tokenizer(model, training_texts=lambda: ["ab"], needs_padding=True)

    assert (plain.pad_token_id, plain.mask_token_id, plain.eos_token_id) == (None, None, 0)
    assert (padding.pad_token_id, padding.mask_token_id, padding.eos_token_id) == (1, 2, 0)


def test_the_mask_of_a_trained_bpe_replaces_a_word_and_the_blank_before_it(tmp_path: Path) -> None:
    made = train_bpe_tokenizer(["the cat sleeps, the cat"] * 3, vocab_size=280, pad=True)
    made.save_pretrained(tmp_path)

    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        the, word, comma = (tokenizer.get_vocab()[token] for token in ("the", "\u0120cat", ","))
        assert tokenizer("the cat,")["input_ids"] == [the, word, comma]
        assert tokenizer("the <mask>,", split_special_tokens=False)["input_ids"] == [
            the,
            tokenizer.mask_token_id,
            comma,
        ]
        assert tokenizer.mask_token_id not in tokenizer("the <mask>,")["input_ids"]  # text is text

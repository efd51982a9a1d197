"""Both chat formats token by token: targets, truncation, replies and errors."""

from __future__ import annotations

from typing import Any

import pytest

from dtrain.errors import ConfigError, DataError
from dtrain.models.chat_format import (
    TemplateFormat,
    TurnsFormat,
    choose_format,
    encode_truncated,
    prompt_truncated,
    remove_cjk_spaces,
)
from dtrain.models.tokenizer import build_char_tokenizer
from tests.support import tiny

PAD, UNK, CLS, SEP = range(4)
A, B, C, USER, ASSISTANT, SYSTEM, HAO, NI = range(4, 12)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "user", "assistant", "system", "\u597d", "\u4f60"]

PLAIN = (
    "{% for m in messages %}[CLS]{{ m.role }} {{ m.content }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS]assistant{% endif %}"
)
MARKED = (
    "{% for m in messages %}[CLS]{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }}[SEP]"
    "{% endgeneration %}{% else %}{{ m.content }}[SEP]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[CLS]assistant{% endif %}"
)
FORGETS = (  # like templates that remove the reasoning of earlier replies
    "{% for m in messages %}[CLS]{{ m.role }} {% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}[SEP]"
    "{% endfor %}{% if add_generation_prompt %}[CLS]assistant{% endif %}"
)


def tokenizer(template: str | None = None) -> Any:
    from transformers import BertTokenizerFast

    made = BertTokenizerFast(vocab={token: number for number, token in enumerate(VOCABULARY)}, mask_token=None)
    made.chat_template = template
    return made


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system is not None else []
    return [
        *start,
        *({"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)),
    ]


# Turns


def test_turns_are_separated_by_sep_and_every_token_but_the_first_is_a_target() -> None:
    [found] = TurnsFormat(tokenizer()).encode(talk("a b", "c", "b"), replies_only=False)

    assert found.ids == [CLS, A, B, SEP, C, SEP, B, SEP]
    assert found.is_target == [False] + [True] * 7


def test_a_replys_tokens_and_the_sep_that_ends_it_are_targets() -> None:
    [found] = TurnsFormat(tokenizer()).encode(talk("a b", "c c", "b", "a"), replies_only=True)

    assert found.ids == [CLS, A, B, SEP, C, C, SEP, B, SEP, A, SEP]
    assert [token for token, mark in zip(found.ids, found.is_target, strict=True) if mark] == [C, C, SEP, A, SEP]
    assert found.is_target[4:7] == [True] * 3


def test_a_special_token_inside_a_message_is_plain_text() -> None:
    [found] = TurnsFormat(tokenizer()).encode(talk("a[SEP]b"), replies_only=False)

    assert found.ids.count(SEP) == 1
    assert found.ids[0] == CLS
    assert found.ids[-1] == SEP


def test_special_tokens_come_from_the_tokenizer_and_go_into_the_models_config() -> None:
    chat = TurnsFormat(tokenizer())

    assert chat.stop_ids == {SEP}
    assert chat.head_config == {"bos_token_id": CLS, "eos_token_id": SEP, "pad_token_id": PAD}


def test_the_prompt_equals_the_tokens_before_the_reply_in_training() -> None:
    chat = TurnsFormat(tokenizer())

    whole = chat.encode(talk("a", "b", "c", "a"), replies_only=False)[0].ids

    assert chat.prompt(talk("a", "b", "c")) == whole[: whole.index(C) + 2]


def test_a_tokenizer_without_the_special_tokens_is_refused_and_they_are_named() -> None:
    lacks_one = tokenizer()
    lacks_one.pad_token = None

    with pytest.raises(ConfigError, match=r"the tokenizer has no \[PAD\], and task.format=turns"):
        choose_format(lacks_one, "turns")
    with pytest.raises(ConfigError, match=r"the tokenizer has no \[CLS\], \[SEP\], \[PAD\]"):
        choose_format(build_char_tokenizer(["ab"]), "auto")


# Template


def test_auto_chooses_the_template_if_there_is_one() -> None:
    assert choose_format(tokenizer(PLAIN), "auto").name == "template"
    assert choose_format(tokenizer(PLAIN), "turns").name == "turns"
    assert choose_format(tokenizer(), "auto").name == "turns"
    with pytest.raises(ConfigError, match=r"task.format=template: the tokenizer has no chat template\. Take"):
        choose_format(tokenizer(), "template")
    with pytest.raises(ConfigError, match="no chat template but several, named default, tool_use"):
        choose_format(tokenizer({"default": PLAIN, "tool_use": PLAIN}), "template")  # type: ignore[arg-type]


def test_a_template_encodes_the_complete_dialogue() -> None:
    [found] = TemplateFormat(tokenizer(PLAIN)).encode(talk("a", "b", system="c"), replies_only=False)

    assert found.ids == [CLS, SYSTEM, C, SEP, CLS, USER, A, SEP, CLS, ASSISTANT, B, SEP]
    assert all(found.is_target)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "generation blocks"])
def test_a_templates_replies_are_found_with_and_without_marks(template: str) -> None:
    [found] = TemplateFormat(tokenizer(template)).encode(talk("a", "b c", "a", "c"), replies_only=True)

    turn = [CLS, USER, A, SEP, CLS, ASSISTANT]
    assert found.ids == [*turn, B, C, SEP, *turn, C, SEP]
    assert [number for number, mark in enumerate(found.is_target) if mark] == [6, 7, 8, 15, 16]


def test_with_a_template_that_rewrites_earlier_turns_each_reply_is_the_last_of_its_own_example() -> None:
    chat = TemplateFormat(tokenizer(FORGETS))

    first, second = chat.encode(talk("a", "b", "a", "c"), replies_only=True)

    assert first.ids == [CLS, USER, A, SEP, CLS, ASSISTANT, B, SEP]
    assert first.is_target == [False] * 6 + [True] * 2
    assert second.ids == [CLS, USER, A, SEP, CLS, ASSISTANT, SEP, CLS, USER, A, SEP, CLS, ASSISTANT, C, SEP]
    assert second.is_target == [False] * 13 + [True] * 2
    [every] = chat.encode(talk("a", "b", "a", "c"), replies_only=False)
    assert every.is_target == [True] * 15


def test_a_dialogue_that_the_template_rejects_raises_its_reason() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"

    with pytest.raises(DataError, match="chat template rejects this dialogue: System role not supported"):
        TemplateFormat(tokenizer(strict)).encode(talk("a", system="b"), replies_only=False)
    with pytest.raises(DataError, match="begins with the assistant"):
        TemplateFormat(tokenizer(PLAIN)).encode([{"role": "assistant", "content": "a"}], replies_only=True)


# Lengths


@pytest.mark.parametrize(
    ("max_length", "ids", "is_cut"),
    [
        (8, [CLS, A, B, SEP, C, SEP, B, SEP], False),
        (7, [CLS, A, B, SEP, C, SEP], True),
        (6, [CLS, A, B, SEP, C, SEP], True),
        (5, [CLS, A, B, SEP], True),
        (3, [CLS, A, B], True),  # not even the first turn fits
    ],
)
def test_complete_turns_are_kept_from_the_start_as_far_as_they_fit(
    max_length: int, ids: list[int], is_cut: bool
) -> None:
    [found], length = encode_truncated(
        TurnsFormat(tokenizer()), talk("a b", "c", "b"), max_length=max_length, replies_only=False
    )

    assert (found.ids, length > max_length, length) == (ids, is_cut, 8)


def test_the_reply_is_cut_if_the_turns_that_fit_have_no_target() -> None:
    chat = TurnsFormat(tokenizer())

    [found], length = encode_truncated(chat, talk("a b", "c c c", "b"), max_length=6, replies_only=True)
    [none], _ = encode_truncated(chat, talk("a b", "c c c", "b"), max_length=3, replies_only=True)

    assert (found.ids, length) == ([CLS, A, B, SEP, C, C], 10)
    assert found.is_target == [False] * 4 + [True] * 2
    assert not none.has_targets


def test_too_long_a_history_drops_its_oldest_turns_but_not_the_system_message() -> None:
    plain, template = TurnsFormat(tokenizer()), TemplateFormat(tokenizer(PLAIN))
    history = talk("a", "b", "b", "b", "c")

    assert prompt_truncated(plain, history, max_tokens=11) == ([CLS, A, SEP, B, SEP, B, SEP, B, SEP, C, SEP], 0)
    assert prompt_truncated(plain, history, max_tokens=10) == ([CLS, B, SEP, B, SEP, C, SEP], 2)
    assert prompt_truncated(plain, history, max_tokens=6) == ([CLS, C, SEP], 4)
    assert prompt_truncated(plain, history, max_tokens=1) == ([CLS, C, SEP], 4)
    assert prompt_truncated(template, talk("a", "b", "c", system="b"), max_tokens=10) == (
        [CLS, SYSTEM, B, SEP, CLS, USER, C, SEP, CLS, ASSISTANT],
        2,
    )


# Replies


def test_replies_have_no_blanks_between_chinese_characters() -> None:
    assert TurnsFormat(tokenizer()).reply([NI, HAO, A, B, HAO, SEP]) == "\u4f60\u597d a b \u597d"
    assert remove_cjk_spaces("\u597d \uff0c \u4f60 \u2026 \u597d \u3002") == "\u597d\uff0c\u4f60\u2026\u597d\u3002"
    assert remove_cjk_spaces("a b 2 \u65a4") == "a b 2 \u65a4"
    assert TemplateFormat(tokenizer(PLAIN)).reply([A, B, SEP]) == "a b"


def test_the_word_tokenizer_of_the_other_tests_supports_the_turns_format() -> None:
    chat = choose_format(tiny.tokenizer(), "auto")

    assert chat.reply(chat.prompt(talk("the cat"))) == "the cat"

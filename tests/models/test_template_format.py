"""Templates of every style with every kind of tokenizer: targets against a truth computed from the pieces of the text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dtrain.errors import DataError
from dtrain.models import template_limits
from dtrain.models.chat_template import find_turn_end, name_turn_end, render, turn_end_tokens
from dtrain.models.template_format import TemplateFormat
from dtrain.models.template_limits import TemplateLimitError
from tests.support.chat_templates import (
    CHATML,
    CHATML_MARKED,
    OPENS_THINKING,
    PLAIN,
    QWEN,
    TOKENIZERS,
    byte_bpe,
    characters,
)

REPLIES = {
    "words": ("the cat is here", "ok!"),
    "outer blanks": ("  the cat ", " ok! "),
    "chinese": ("\u4f60\u597d\u5417", "\u597d"),
    "emoji": ("\U0001f600 the \U0001f600", "\U0001f600"),
}


def talk(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def learned(chat: TemplateFormat, messages: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Returns for each example the runs of targets."""
    return [
        [
            [token for token, _ in group]
            for is_target, group in itertools.groupby(
                zip(made.ids, made.is_target, strict=True), key=lambda pair: pair[1]
            )
            if is_target
        ]
        for made in chat.encode(messages, replies_only=True)
    ]


@pytest.mark.parametrize("replies", REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("style", PLAIN)
def test_exactly_the_reply_and_its_end_mark_are_learned(style: str, make: Any, replies: tuple[str, str]) -> None:
    template, end, before = PLAIN[style]
    tokenizer = make(template)
    first, second = (text.strip() if "trim" in template else text for text in replies)

    found = learned(TemplateFormat(tokenizer), talk("where?", replies[0], "where is the cat?", replies[1]))

    # The truth: each reply's text, encoded alone. A special token or a line break stands before each.
    truth = [tokenizer(before + text + end, add_special_tokens=False)["input_ids"] for text in (first, second)]
    assert found == [truth]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_with_earlier_reasoning_dropped_every_reply_is_learned_as_the_last_turn(make: Any) -> None:
    tokenizer = make(QWEN)
    thought = "<think>\nwhere?\n</think>\n\nthe cat"

    found = learned(TemplateFormat(tokenizer), talk("a", thought, "is the cat here?", "ok!"))

    texts = ["<think>\nwhere?\n</think>\n\nthe cat<|im_end|>", "<think>\n\n</think>\n\nok!<|im_end|>"]
    assert found == [[tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]


def test_tokens_that_the_prompt_supplies_are_no_targets() -> None:
    tokenizer = characters(OPENS_THINKING)

    [[found]] = learned(TemplateFormat(tokenizer), talk("a", "<think>\na</think>ok"))

    assert found == tokenizer("a</think>ok<|im_end|>", add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match="writes the start of turn 2 otherwise in the prompt"):
        TemplateFormat(tokenizer).encode(talk("a", "ok"), replies_only=True)


def test_a_turn_with_weight_0_is_context() -> None:
    tokenizer = characters(CHATML)
    messages = talk("a", "ok", "a", "the cat")
    messages[1]["weight"] = 0
    chat = TemplateFormat(tokenizer)

    [[found]] = learned(chat, messages)
    [every] = chat.encode(messages, replies_only=False)

    assert found == tokenizer("the cat<|im_end|>", add_special_tokens=False)["input_ids"]
    assert [i for i, mark in zip(every.ids, every.is_target, strict=True) if not mark] == tokenizer(
        "ok<|im_end|>", add_special_tokens=False
    )["input_ids"]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefixes", "marks"])
def test_the_targets_are_the_same_with_and_without_marks_and_without_the_line_break(template: str) -> None:
    tokenizer = byte_bpe(template, trim_offsets=True)

    [found] = TemplateFormat(tokenizer).encode(talk("a", "ok"), replies_only=True)

    text = tokenizer.decode([token for token, mark in zip(found.ids, found.is_target, strict=True) if mark])
    assert text == "ok<|im_end|>"
    assert tokenizer.decode(found.ids[-1:]) == "\n"
    assert not found.is_target[-1]


def test_a_token_on_the_border_of_a_reply_is_refused() -> None:
    joined = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}x{% endif %}{% endfor %}"
    tokenizer = byte_bpe(joined.replace("x", "th"), trim_offsets=False)

    with pytest.raises(
        DataError, match=r"characters on both sides of the beginning of the reply in turn 2 .*'th' \| 'e"
    ):
        TemplateFormat(tokenizer).encode(talk("", "e cat"), replies_only=True)


@pytest.mark.parametrize("style", PLAIN)
def test_the_end_mark_stops_a_reply_besides_the_end_of_text(style: str) -> None:
    template, end, _ = PLAIN[style]
    tokenizer = characters(template)
    mark = tokenizer.convert_tokens_to_ids(end)

    assert find_turn_end(tokenizer).token == mark
    assert turn_end_tokens(tokenizer) == {mark}
    assert TemplateFormat(tokenizer).stop_ids == {mark, tokenizer.eos_token_id}
    assert TemplateFormat(tokenizer).warning is None


def test_an_end_that_is_no_token_or_outside_the_marks_is_said() -> None:
    no_token = CHATML.replace("<|im_end|>", "<end>")
    outside = CHATML_MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}<|im_end|>")

    assert "ends a reply with '<end>\\n', which is not one special token" in str(
        TemplateFormat(characters(no_token)).warning
    )
    assert "block ends before '<|im_end|>'" in str(TemplateFormat(characters(outside)).warning)


def test_the_saved_generation_config_names_the_end_mark_first() -> None:
    class Model:
        class generation_config:
            eos_token_id: Any = 2

    name_turn_end(Model, frozenset([4, 2]))
    assert Model.generation_config.eos_token_id == [2, 4]
    name_turn_end(Model, frozenset([4]))
    assert Model.generation_config.eos_token_id == [4, 2]


# Limits


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "ran for more than 0.3 s"),
        ("{{ 'a' * 99999999999 }}", "asked for more than 1024 MiB"),
        (
            "{% set n = namespace(t='aaaaaaaa') %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
            "asked for",
        ),
        ("{% for a in range(99) %}{{ 'a' * 1000000 }}{% endfor %}", "wrote 99000000 characters"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", r"has a power \(\*\*\) in its line 1"),
        (
            "{% set n = namespace(t=9) %}{% for a in range(99) %}{% set n.t = n.t * n.t %}{% endfor %}",
            "has a product of two",
        ),
    ],
)
def test_a_template_cannot_take_unlimited_time_or_memory(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "TIME_LIMIT_S", 0.3 if "0.3 s" in said else 60.0)

    with pytest.raises(TemplateLimitError, match=said):
        render(characters(template), talk("a"))
    with pytest.raises(TemplateLimitError, match=said):
        find_turn_end(characters(template))
    assert render(characters(CHATML), talk("a")).text.endswith("a<|im_end|>\n")  # the limits are lifted


def test_an_error_inside_a_template_is_a_bad_row() -> None:
    for template in ("{{ 1 / 0 }}", "{{ messages[7].content }}", "{{ messages.nothing.more }}", "{% if %}"):
        with pytest.raises(DataError, match="chat template rejects this dialogue"):
            render(characters(template), talk("a"))


def test_a_template_that_demands_a_system_message_still_shows_its_end() -> None:
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML

    assert TemplateFormat(characters(strict)).warning is None
    assert len(turn_end_tokens(characters(strict))) == 1


def test_what_the_prompt_supplies_is_no_target_inside_marks_either() -> None:
    tokenizer = characters(CHATML_MARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"))

    [[found]] = learned(TemplateFormat(tokenizer), talk("a", "<think>\na</think>ok"))

    assert found == tokenizer("a</think>ok<|im_end|>", add_special_tokens=False)["input_ids"]

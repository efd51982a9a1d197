"""Encodes dialogues as tokens, the same way in training and in chat, and decodes replies.

There are two formats: `[CLS] u1 [SEP] u2 [SEP] ...` over a BERT vocabulary, and the tokenizer's own chat template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from dtrain.errors import ConfigError, DataError

ChatMessage = Mapping[str, str]
"""A message with `role` (system, user, assistant) and `content`."""

FormatName = Literal["turns", "template"]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

_CJK = (
    "\u2e80-\u303f"  # radicals, ideographic punctuation
    "\u3040-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
    "\uff00-\uffef"  # full-width forms
    "\u2018-\u201d\u2026"  # quotation marks and the ellipsis, which Chinese shares with English
)
_BLANK_BETWEEN_CJK = re.compile(rf"(?<=[{_CJK}])\s+(?=[{_CJK}])")


@dataclass(frozen=True)
class EncodedDialogue:
    """The tokens of one dialogue.

    Attributes:
        ids: token ids.
        is_target: for each token, whether it is a training target.
    """

    ids: list[int]
    is_target: list[bool]

    @property
    def has_targets(self) -> bool:
        """Whether any token is a target. The first token does not count: nothing precedes it."""
        return any(self.is_target[1:])

    def truncated(self, length: int) -> EncodedDialogue:
        """Returns the first `length` tokens."""
        return EncodedDialogue(self.ids[:length], self.is_target[:length])


class ChatFormat(Protocol):
    """A way to write a dialogue as tokens."""

    name: FormatName
    stop_ids: frozenset[int]
    """Tokens that end a reply, if the tokenizer has any."""
    head_config: dict[str, Any]
    """Entries that the model's config needs for this format."""

    def encode(self, messages: Sequence[ChatMessage], *, replies_only: bool) -> EncodedDialogue:
        """Encodes a dialogue. The targets are all tokens, or only those of the assistant's turns.

        Raises:
            DataError: this format cannot represent the dialogue.
        """
        ...

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Returns the tokens that the model continues to answer the last turn."""
        ...

    def reply(self, ids: Sequence[int]) -> str:
        """Decodes the tokens that the model generated."""
        ...


class TurnsFormat:
    """`[CLS] u1 [SEP] u2 [SEP] ...` without roles. Each turn ends with [SEP], which therefore stops a reply."""

    name: FormatName = "turns"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        needed = {"[CLS]": "cls_token_id", "[SEP]": "sep_token_id", "[PAD]": "pad_token_id"}
        special: dict[str, Any] = {token: getattr(tokenizer, name) for token, name in needed.items()}
        if missing := [token for token, number in special.items() if number is None]:
            raise ConfigError(
                f"the tokenizer has no {', '.join(missing)}, and task.format=turns writes a dialogue as [CLS] turn "
                "[SEP] turn [SEP]. Set model.tokenizer to a BERT vocabulary (vocab.txt) or its folder, or use a model "
                "whose tokenizer has a chat template"
            )
        self._cls, self._sep = int(special["[CLS]"]), int(special["[SEP]"])
        self._tokenizer = tokenizer
        self.stop_ids = frozenset([self._sep])
        # GPT-2's defaults (50256) are beyond the end of a small vocabulary.
        self.head_config = {"bos_token_id": self._cls, "eos_token_id": self._sep, "pad_token_id": int(special["[PAD]"])}

    def encode(self, messages: Sequence[ChatMessage], *, replies_only: bool) -> EncodedDialogue:
        # "[SEP]" inside a message is plain text (five characters), not the end of a turn.
        turns: list[list[int]] = self._tokenizer(
            [message["content"] for message in messages],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        ids, is_target = [self._cls], [False]
        for message, turn in zip(messages, turns, strict=True):
            ids += [*turn, self._sep]
            is_target += [not replies_only or message["role"] == "assistant"] * (len(turn) + 1)
        return EncodedDialogue(ids, is_target)

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.encode(messages, replies_only=False).ids

    def reply(self, ids: Sequence[int]) -> str:
        return remove_cjk_spaces(str(self._tokenizer.decode(list(ids), skip_special_tokens=True)))


class TemplateFormat:
    """The tokenizer's own chat template, applied by `apply_chat_template`."""

    name: FormatName = "template"
    head_config: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if not isinstance(template, str):
            named = f" but several, named {', '.join(template)}" if isinstance(template, Mapping) else ""
            raise ConfigError(
                f"task.format=template: the tokenizer has no chat template{named}. Take an instruction model's "
                "tokenizer, save one with tokenizer.chat_template set, or use task.format=turns"
            )
        self._tokenizer = tokenizer
        self._marks_replies = _GENERATION_BLOCK.search(template) is not None
        self.stop_ids = frozenset([tokenizer.eos_token_id]) if isinstance(tokenizer.eos_token_id, int) else frozenset()

    def encode(self, messages: Sequence[ChatMessage], *, replies_only: bool) -> EncodedDialogue:
        if not replies_only:
            ids = self._apply(messages)["input_ids"]
            return EncodedDialogue(ids, [True] * len(ids))
        if self._marks_replies:
            encoded = self._apply(messages, return_assistant_tokens_mask=True)
            return EncodedDialogue(encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]])
        return self._by_prefixes(messages)

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids: list[int] = self._apply(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def reply(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _by_prefixes(self, messages: Sequence[ChatMessage]) -> EncodedDialogue:
        """Finds each reply's tokens: those between its prompt and the dialogue up to its end, each encoded separately."""
        ids: list[int] = self._apply(messages)["input_ids"]
        is_target = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise DataError("the dialogue begins with the assistant, so its first reply answers nothing")
            before = self.prompt(messages[:number])
            up_to: list[int] = self._apply(messages[: number + 1])["input_ids"]
            if ids[: len(up_to)] != up_to or up_to[: len(before)] != before:
                raise DataError(
                    f"the chat template changes the text up to turn {number + 1} when the dialogue continues, so the "
                    "reply's tokens cannot be located (the template leaves out earlier reasoning, or a turn begins with a "
                    "line break). Use a template that marks replies with {% generation %} and {% endgeneration %}, or set "
                    "task.loss_on=all"
                )
            is_target[len(before) : len(up_to)] = [True] * (len(up_to) - len(before))
        return EncodedDialogue(ids, is_target)

    def _apply(self, messages: Sequence[ChatMessage], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=True, return_dict=True, **options
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"the tokenizer's chat template rejects this dialogue: {error}") from error


def choose_format(tokenizer: PreTrainedTokenizerBase, name: Literal["auto", "turns", "template"]) -> ChatFormat:
    """Returns the chosen format. auto: the tokenizer's chat template if it has one, else turns.

    Raises:
        ConfigError: the tokenizer lacks what the format needs.
    """
    if name == "template" or (name == "auto" and getattr(tokenizer, "chat_template", None)):
        return TemplateFormat(tokenizer)
    return TurnsFormat(tokenizer)


def encode_truncated(
    chat: ChatFormat, messages: Sequence[ChatMessage], *, max_length: int, replies_only: bool
) -> tuple[EncodedDialogue, bool]:
    """Encodes a dialogue in at most max_length tokens. Returns the tokens and whether something was cut off.

    Keeps as many complete turns from the start as fit. If these have no target, keeps the first max_length tokens.
    """
    full = chat.encode(messages, replies_only=replies_only)
    if len(full.ids) <= max_length:
        return full, False
    for number in range(len(messages) - 1, 0, -1):
        shorter = chat.encode(messages[:number], replies_only=replies_only)
        if len(shorter.ids) <= max_length:
            return (shorter if shorter.has_targets else full.truncated(max_length)), True
    return full.truncated(max_length), True


def prompt_truncated(chat: ChatFormat, messages: Sequence[ChatMessage], *, max_tokens: int) -> tuple[list[int], int]:
    """Returns the prompt of a dialogue in at most max_tokens tokens, and how many of the oldest turns were dropped.

    A system message is kept, and the remaining turns begin with the user. The last turn is kept at any length.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    begin = 0
    while True:
        ids = chat.prompt([*system, *turns[begin:]])
        if len(ids) <= max_tokens:
            return ids, begin
        later = [number for number in range(begin + 1, len(turns)) if turns[number]["role"] == "user"]
        if not later:
            return ids, begin
        begin = later[0]


def remove_cjk_spaces(text: str) -> str:
    """Removes the blanks that a BERT vocabulary puts between Chinese or Japanese characters."""
    return _BLANK_BETWEEN_CJK.sub("", text)

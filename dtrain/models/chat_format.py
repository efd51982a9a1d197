"""Encodes dialogues as tokens, the same way in training and in chat, and decodes replies.

There are two formats: `[CLS] u1 [SEP] u2 [SEP] ...` over a BERT vocabulary, and the tokenizer's own chat template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from dtrain.errors import ConfigError
from dtrain.models.chat_template import ChatMessage
from dtrain.models.encoded_dialogue import EncodedDialogue, FormatName, is_learned
from dtrain.models.template_format import TemplateFormat

_CJK = (
    "\u2e80-\u303f"  # radicals, ideographic punctuation
    "\u3040-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
    "\uff00-\uffef"  # full-width forms
    "\u2018-\u201d\u2026"  # quotation marks and the ellipsis, which Chinese shares with English
)
_BLANK_BETWEEN_CJK = re.compile(rf"(?<=[{_CJK}])\s+(?=[{_CJK}])")


class ChatFormat(Protocol):
    """A way to write a dialogue as tokens."""

    name: FormatName
    stop_ids: frozenset[int]
    """Tokens that end a reply, if the tokenizer has any."""
    head_config: dict[str, Any]
    """Entries that the model's config needs for this format."""

    @property
    def warning(self) -> str | None:
        """What keeps a trained model from ending its replies, if anything does."""
        ...

    def encode(self, messages: Sequence[ChatMessage], *, replies_only: bool) -> list[EncodedDialogue]:
        """Encodes a dialogue. The targets are all tokens, or only those of the assistant's turns. Never with weight 0.

        Returns:
            One example; several if the format writes a turn otherwise once the dialogue continues, each with the
            replies that it writes as after their own prompt.

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
    warning: str | None = None

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

    def encode(self, messages: Sequence[ChatMessage], *, replies_only: bool) -> list[EncodedDialogue]:
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
            is_target += [is_learned(message) and (not replies_only or message["role"] == "assistant")] * (
                len(turn) + 1
            )
        return [EncodedDialogue(ids, is_target)]

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.encode(messages, replies_only=False)[0].ids

    def reply(self, ids: Sequence[int]) -> str:
        return remove_cjk_spaces(str(self._tokenizer.decode(list(ids), skip_special_tokens=True)))


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
) -> tuple[list[EncodedDialogue], int]:
    """Encodes a dialogue in at most max_length tokens.

    Keeps as many complete turns from the start as fit. If these have no target, keeps the first max_length tokens. Of
    several examples, each keeps its first max_length tokens.

    Returns:
        The examples, and the number of tokens of the longest before anything was cut off. Of several examples, those
        without a target are left out; of those, the first is kept if no other has one.
    """
    full = chat.encode(messages, replies_only=replies_only)
    longest = max(len(each.ids) for each in full)
    if len(full) > 1:
        cut = [each.truncated(max_length) for each in full]
        return [each for each in cut if each.has_targets] or cut[:1], longest
    if longest <= max_length:
        return full, longest
    for number in range(len(messages) - 1, 0, -1):
        shorter = chat.encode(messages[:number], replies_only=replies_only)
        if all(len(each.ids) <= max_length for each in shorter):
            learned = [each for each in shorter if each.has_targets]
            return learned or [full[0].truncated(max_length)], longest
    return [full[0].truncated(max_length)], longest


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

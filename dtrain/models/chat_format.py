"""How a dialogue becomes tokens, in training and in talking alike, and how tokens become a reply again.

Two formats: `[CLS] u1 [SEP] u2 [SEP] ...` over a BERT vocabulary, and the chat template that a tokenizer brings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from dtrain.errors import ConfigError, DataError

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""

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
class Encoded:
    """One dialogue. ids: its tokens. is_target: which of them are learnt, as many."""

    ids: list[int]
    is_target: list[bool]

    @property
    def has_targets(self) -> bool:
        """The first token follows nothing, so that it is never one."""
        return any(self.is_target[1:])

    def first(self, length: int) -> Encoded:
        """The first tokens of it."""
        return Encoded(self.ids[:length], self.is_target[:length])


class ChatFormat(Protocol):
    """One way to write a dialogue down."""

    name: FormatName
    stops: frozenset[int]
    """Tokens that end a reply, as far as the tokenizer knows them."""
    head_config: dict[str, Any]
    """What the model's config has to say for it."""

    def encode(self, messages: Sequence[Message], *, replies_only: bool) -> Encoded:
        """A whole dialogue, of which every token or those of the assistant's turns are targets.

        Raises:
            DataError: this format cannot say such a dialogue.
        """
        ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What the model goes on from to answer the last turn."""
        ...

    def reply(self, ids: Sequence[int]) -> str:
        """The text of what the model added."""
        ...


class TurnsFormat:
    """`[CLS] u1 [SEP] u2 [SEP] ...`, whoever speaks. A turn's tokens end with its [SEP], which stops a reply."""

    name: FormatName = "turns"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        needed = {"[CLS]": "cls_token_id", "[SEP]": "sep_token_id", "[PAD]": "pad_token_id"}
        found: dict[str, Any] = {token: getattr(tokenizer, name) for token, name in needed.items()}
        if missing := [token for token, number in found.items() if number is None]:
            raise ConfigError(
                f"the tokenizer has no {', '.join(missing)}, and task.format=turns writes a dialogue as [CLS] turn "
                "[SEP] turn [SEP]. Set model.tokenizer to a BERT vocabulary (vocab.txt) or its folder, or take a model "
                "whose tokenizer has a chat template"
            )
        self._cls, self._sep = int(found["[CLS]"]), int(found["[SEP]"])
        self._tokenizer = tokenizer
        self.stops = frozenset([self._sep])
        # GPT-2's own numbers (50256) lie past the end of a small vocabulary.
        self.head_config = {"bos_token_id": self._cls, "eos_token_id": self._sep, "pad_token_id": int(found["[PAD]"])}

    def encode(self, messages: Sequence[Message], *, replies_only: bool) -> Encoded:
        # "[SEP]" in what somebody says is five characters, not the end of a turn.
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
        return Encoded(ids, is_target)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(messages, replies_only=False).ids

    def reply(self, ids: Sequence[int]) -> str:
        return without_blanks(str(self._tokenizer.decode(list(ids), skip_special_tokens=True)))


class TemplateFormat:
    """The tokenizer's own chat template, through `apply_chat_template`."""

    name: FormatName = "template"
    head_config: dict[str, Any] = {}  # noqa: RUF012 - nothing is ever put in

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
        self.stops = frozenset([tokenizer.eos_token_id]) if isinstance(tokenizer.eos_token_id, int) else frozenset()

    def encode(self, messages: Sequence[Message], *, replies_only: bool) -> Encoded:
        if not replies_only:
            ids = self._apply(messages)["input_ids"]
            return Encoded(ids, [True] * len(ids))
        if self._marks_replies:
            found = self._apply(messages, return_assistant_tokens_mask=True)
            return Encoded(found["input_ids"], [bool(mark) for mark in found["assistant_masks"]])
        return self._by_prefixes(messages)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = self._apply(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def reply(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _by_prefixes(self, messages: Sequence[Message]) -> Encoded:
        """A reply's tokens: from the prompt for it to the end of the dialogue up to it, both encoded by themselves."""
        ids: list[int] = self._apply(messages)["input_ids"]
        is_target = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise DataError("the dialogue begins with the assistant, whom nobody has asked anything")
            before = self.prompt(messages[:number])
            up_to: list[int] = self._apply(messages[: number + 1])["input_ids"]
            if ids[: len(up_to)] != up_to or up_to[: len(before)] != before:
                raise DataError(
                    f"the chat template writes the dialogue up to turn {number + 1} in another way when it goes on, so "
                    "that the reply's tokens cannot be told (a template that leaves earlier reasoning out, or a turn "
                    "that begins with a line break). Give a template that marks them with {% generation %} and "
                    "{% endgeneration %}, or set task.loss_on=all"
                )
            is_target[len(before) : len(up_to)] = [True] * (len(up_to) - len(before))
        return Encoded(ids, is_target)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=True, return_dict=True, **options
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"the tokenizer's chat template refuses this dialogue: {error}") from error


def choose_format(tokenizer: PreTrainedTokenizerBase, name: Literal["auto", "turns", "template"]) -> ChatFormat:
    """auto: the tokenizer's chat template where it has one.

    Raises:
        ConfigError: a tokenizer that lacks what the format needs.
    """
    if name == "template" or (name == "auto" and getattr(tokenizer, "chat_template", None)):
        return TemplateFormat(tokenizer)
    return TurnsFormat(tokenizer)


def fit(chat: ChatFormat, messages: Sequence[Message], *, max_length: int, replies_only: bool) -> tuple[Encoded, bool]:
    """A dialogue in at most max_length tokens, and whether something had to be left out.

    Whole turns from the start, as many as fit; where those have no target, the first max_length tokens.
    """
    whole = chat.encode(messages, replies_only=replies_only)
    if len(whole.ids) <= max_length:
        return whole, False
    for number in range(len(messages) - 1, 0, -1):
        shorter = chat.encode(messages[:number], replies_only=replies_only)
        if len(shorter.ids) <= max_length:
            return (shorter if shorter.has_targets else whole.first(max_length)), True
    return whole.first(max_length), True


def newest(chat: ChatFormat, messages: Sequence[Message], *, max_tokens: int) -> tuple[list[int], int]:
    """The prompt of a dialogue in at most max_tokens, without its oldest turns if need be, and how many of those.

    A system message stays, and what is left begins with the user. The last turn stays however long it is.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    said = list(messages[len(system) :])
    begin = 0
    while True:
        ids = chat.prompt([*system, *said[begin:]])
        if len(ids) <= max_tokens:
            return ids, begin
        later = [number for number in range(begin + 1, len(said)) if said[number]["role"] == "user"]
        if not later:
            return ids, begin
        begin = later[0]


def without_blanks(text: str) -> str:
    """The text without the blanks that a BERT vocabulary leaves between Chinese or Japanese characters."""
    return _BLANK_BETWEEN_CJK.sub("", text)

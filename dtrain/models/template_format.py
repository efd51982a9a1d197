"""Encodes dialogues with the tokenizer's own chat template, and finds the tokens of each reply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dtrain.errors import ConfigError, DataError
from dtrain.models.chat_template import ChatMessage, find_turn_end, render
from dtrain.models.encoded_dialogue import EncodedDialogue, FormatName, is_learned

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class _Reply:
    """A reply as the last turn of its own prompt.

    Attributes:
        number: its turn, from 0.
        text: the dialogue up to the reply, as the template writes it.
        begin: the character at which the prompt ends.
        spans: start and stop characters of its targets.
    """

    number: int
    text: str
    begin: int
    spans: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        """The character after the reply."""
        return max((stop for _, stop in self.spans), default=self.begin)


class TemplateFormat:
    """The tokenizer's own chat template.

    Replies are found in the rendered text. A reply's targets begin where its prompt ends, so that a token that the prompt
    supplies is never a target, and end with the turn's end mark: a line break after the mark is no target.
    """

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
        self._end = find_turn_end(tokenizer)
        eos = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
        self.stop_ids = frozenset([*eos, *([] if self._end.token is None else [self._end.token])])

    @property
    def warning(self) -> str | None:
        """What keeps a trained model from ending its replies, if anything does."""
        if self._end.token is None:
            written = f"with {self._end.tail!r}, which" if self._end.tail else "without a mark, which"
            return (
                f"the chat template ends a reply {written} is not one special token of the tokenizer: chat and generate "
                "cannot stop there. Use a template and a tokenizer of the same model"
            )
        rendered = render(self._tokenizer, self._end.probe, marks=self._marks_replies)
        ends_marked = any(rendered.text[stop:].startswith(self._end.text) for _, stop in rendered.spans)
        if ends_marked and not any(self._end.text in rendered.text[a:b] for a, b in rendered.spans):
            return (
                f"the chat template's {{% generation %}} block ends before {self._end.text!r}, so that "
                "replies are learned without their end, and chat may not stop. Move {% endgeneration %} behind the mark"
            )
        return None

    def encode(self, messages: Sequence[ChatMessage], *, replies_only: bool) -> list[EncodedDialogue]:
        if replies_only:
            return [
                self._with_targets(text, replies) for text, replies in self._split(self._replies(messages), messages)
            ]
        text = render(self._tokenizer, messages).text
        ids = self._tokens(text)
        is_target = [True] * len(ids)
        if any(not is_learned(message) for message in messages):
            self._remove_unweighted(messages, text, is_target)
        return [EncodedDialogue(ids, is_target)]

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self._tokens(render(self._tokenizer, messages, add_generation_prompt=True).text)

    def reply(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def _replies(self, messages: Sequence[ChatMessage], *, learned: bool = True) -> list[_Reply]:
        """Returns each reply that is learned (or is not), as the last turn of its own prompt."""
        return [
            self._reply(messages, number)
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and is_learned(message) == learned
        ]

    def _reply(self, messages: Sequence[ChatMessage], number: int) -> _Reply:
        if number == 0 and not self._marks_replies:
            raise DataError("the dialogue begins with the assistant, so its first reply answers nothing")
        prompt = "" if number == 0 else render(self._tokenizer, messages[:number], add_generation_prompt=True).text
        rendered = render(self._tokenizer, messages[: number + 1], marks=self._marks_replies)
        text, begin = rendered.text, len(prompt)
        if not text.startswith(prompt):
            if not self._marks_replies:
                raise DataError(
                    f"the chat template writes the start of turn {number + 1} otherwise in the prompt "
                    f"(...{prompt[-40:]!r}) than before the reply, so that chat would not continue what was learned. Write "
                    "the turn as the prompt begins it, use a template that marks replies with {% generation %} and "
                    "{% endgeneration %}, or set task.loss_on=all"
                )
            begin = _common_length(prompt, text)
        if not self._marks_replies:
            return _Reply(number, text, begin, ((begin, self._end.stop(text, begin)),))
        spans = ((max(start, begin), self._end.trim(text, start, stop)) for start, stop in rendered.spans)
        return _Reply(number, text, begin, tuple((start, stop) for start, stop in spans if stop > start))

    def _split(self, replies: Sequence[_Reply], messages: Sequence[ChatMessage]) -> list[tuple[str, Sequence[_Reply]]]:
        """Returns the fewest texts in which each reply stands after its own prompt, each with its replies.

        One text is enough unless the template changes earlier turns, such as by leaving out their reasoning.
        """
        texts = [(render(self._tokenizer, messages).text, list[_Reply]())]
        for reply in reversed(replies):
            if not texts[-1][0].startswith(reply.text[: reply.stop]):
                texts.append((reply.text, []))
            texts[-1][1].append(reply)
        return [(text, found[::-1]) for text, found in reversed(texts) if found or len(texts) == 1]

    def _with_targets(self, text: str, replies: Sequence[_Reply]) -> EncodedDialogue:
        ids = self._tokens(text)
        is_target = [False] * len(ids)
        spans = [(reply, start, stop) for reply in replies for start, stop in reply.spans]
        for reply, start, stop in spans:
            first, last = self._token_range(text, ids, reply, start, stop)
            is_target[first:last] = [True] * (last - first)
        self._compare(text, is_target, [(start, stop) for _, start, stop in spans])
        return EncodedDialogue(ids, is_target)

    def _token_range(self, text: str, ids: list[int], reply: _Reply, start: int, stop: int) -> tuple[int, int]:
        """Returns the first token of a part of a text and the one after its last, by encoding what is before each."""
        first = self._count(text[:start], ids)
        blank = len(text[:start]) - len(text[:start].rstrip())
        if (
            first is None and blank and start - blank >= reply.begin
        ):  # the reply's first token includes the blank before it
            first = self._count(text[: start - blank], ids)
        last = self._count(text[:stop], ids)
        if first is None or last is None:
            place, at = ("beginning", start) if first is None else ("end", stop)
            raise DataError(
                f"a token includes characters on both sides of the {place} of the reply in turn {reply.number + 1} "
                f"({text[max(at - 10, 0) : at]!r} | {text[at : at + 10]!r}), so that its tokens cannot be told from the "
                "others. Remove blanks and line breaks around the turn, or use a chat template that separates turns by "
                "special tokens"
            )
        return first, last

    def _count(self, beginning: str, ids: list[int]) -> int | None:
        """Returns the number of tokens of a text's beginning; None if the complete text has other tokens there."""
        tokens = self._tokens(beginning)
        return len(tokens) if ids[: len(tokens)] == tokens else None

    def _compare(self, text: str, is_target: Sequence[bool], spans: Sequence[tuple[int, int]]) -> None:
        """Compares targets with the characters that the tokenizer gives for each token.

        Raises:
            DataError: a token within the replies is no target, or one outside is.
        """
        if not self._tokenizer.is_fast:
            return
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [False] * len(text)
        for start, stop in spans:
            inside[start:stop] = [True] * (stop - start)
        for number, (start, stop) in enumerate(offsets["offset_mapping"]):
            part = inside[start:stop]
            # A token without width is a blank. One on the border may have taken the blank beside it.
            if part and all(part) != is_target[number] and any(part) != is_target[number]:
                raise DataError(
                    f"the targets of this dialogue cannot be located: token {number + 1} stands for "
                    f"{text[start:stop]!r}, which {'is not' if is_target[number] else 'is'} a part of a reply. The "
                    "tokenizer changes texts in a way that hides which token is which: set task.loss_on=all"
                )

    def _remove_unweighted(self, messages: Sequence[ChatMessage], text: str, is_target: list[bool]) -> None:
        if any(not is_learned(message) and message["role"] != "assistant" for message in messages):
            raise DataError(
                "weight 0 on a turn that is not the assistant's is not supported with task.loss_on=all and a chat "
                "template. Set task.loss_on=replies, or remove the weight"
            )
        replies = self._replies(messages, learned=False)
        if not all(text.startswith(reply.text[: reply.stop]) for reply in replies):
            raise DataError(
                "the chat template changes earlier turns, so that a reply with weight 0 cannot be located with "
                "task.loss_on=all. Set task.loss_on=replies"
            )
        for token, is_unweighted in enumerate(self._with_targets(text, replies).is_target):
            if is_unweighted:
                is_target[token] = False


def _common_length(one: str, other: str) -> int:
    """Returns the number of characters with which both texts begin."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

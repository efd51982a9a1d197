"""Renders a tokenizer's chat template as text, within limits, and finds how the template ends a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dtrain.errors import DataError
from dtrain.models.template_limits import TemplateLimitError, check_length, limited

ChatMessage = Mapping[str, Any]
"""A message with `role` (system, user, assistant), `content`, and perhaps `weight` (0: not learned)."""

PROBE: Sequence[ChatMessage] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "zqz"})
"""A dialogue that shows what a template writes after a reply."""

# What a template can raise: it is a program that computes with the dialogue.
TEMPLATE_ERRORS = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TemplateError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """A dialogue as text.

    Attributes:
        text: what the template wrote.
        spans: start and stop characters of its {% generation %} blocks, if they were asked for.
    """

    text: str
    spans: Sequence[tuple[int, int]] = ()


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = False,
    marks: bool = False,
) -> Rendered:
    """Applies the tokenizer's chat template.

    Args:
        marks: whether to find the {% generation %} blocks.

    Raises:
        DataError: the template rejects the dialogue, or exceeds the limits of template_limits.py.
    """
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        with limited():
            _refuse_large_numbers(str(tokenizer.chat_template))
            if not marks:
                written: Any = tokenizer.apply_chat_template(
                    plain, tokenize=False, add_generation_prompt=add_generation_prompt
                )
                return Rendered(check_length(written))
            texts, spans = render_jinja_template(
                conversations=[plain],
                chat_template=tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.special_tokens_map,
            )
            return Rendered(check_length(texts[0]), spans[0])
    except TEMPLATE_ERRORS as error:
        raise DataError(f"the tokenizer's chat template rejects this dialogue: {error}") from error


class _GenerationBlock(Extension):
    """Parses {% generation %} ... {% endgeneration %}."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        next(parser.stream)
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@lru_cache(maxsize=8)
def _refuse_large_numbers(template: str) -> None:
    """Refuses arithmetic that can run for hours in one instruction of Python, which no limit of time can interrupt.

    Raises:
        TemplateLimitError: the template has a power, or a product of two computed values.
    """
    parsed = ImmutableSandboxedEnvironment(extensions=[_GenerationBlock, loopcontrols]).parse(template)
    power = parsed.find(nodes.Pow)
    product = next(
        (
            each
            for each in parsed.find_all(nodes.Mul)
            if not any(isinstance(side, nodes.Const) for side in (each.left, each.right))
        ),
        None,
    )
    found = power or product
    if found is not None:
        kind = "a power (**)" if power else "a product of two computed values"
        raise TemplateLimitError(
            f"the tokenizer's chat template has {kind} in its line {found.lineno}, which can take unlimited time. Templates "
            "need none: use another tokenizer, or correct its chat_template"
        )


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends a reply.

    Attributes:
        token: the special token that ends it; None: it does not end with one.
        text: the token as the template writes it, with a blank before it if there is one.
        tail: all that the template writes after the last reply.
        probe: the dialogue that showed it.
    """

    token: int | None
    text: str
    tail: str
    probe: Sequence[ChatMessage]

    def stop(self, text: str, begin: int) -> int:
        """Returns where the last reply of a text ends. The reply begins at `begin`."""
        if self.token is None:
            return len(text)
        if text.endswith(self.tail):
            return len(text) - len(self.tail) + len(self.text)
        mark = text.rfind(self.text, begin)
        return len(text) if mark < 0 else mark + len(self.text)

    def trim(self, text: str, start: int, stop: int) -> int:
        """Returns the stop of a marked part without the blanks after the end mark."""
        mark = text.rfind(self.text, start, stop) if self.token is not None else -1
        if mark < 0 or text[mark + len(self.text) : stop].strip():
            return stop
        return mark + len(self.text)


def find_turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Returns how the tokenizer's chat template ends a reply.

    Raises:
        TemplateLimitError: the template exceeds the limits.
    """
    for probe in (PROBE, ({"role": "system", "content": "a"}, *PROBE)):  # some templates demand a system message
        try:
            text = render(tokenizer, probe).text
        except TemplateLimitError:
            raise
        except DataError:
            continue
        _, found, tail = text.rpartition(PROBE[-1]["content"])
        if found:
            return _turn_end(tokenizer, tail, probe)
    return TurnEnd(None, "", "", PROBE)


def _turn_end(tokenizer: PreTrainedTokenizerBase, tail: str, probe: Sequence[ChatMessage]) -> TurnEnd:
    """Returns the special token that the text after a reply begins with, blanks aside."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for number in tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]:
        token = str(tokenizer.convert_ids_to_tokens(number))
        before, is_there, _ = tail.partition(token)
        if number in special and is_there and not before.strip():
            return TurnEnd(number, before + token, tail, probe)
        if str(tokenizer.decode([number])).strip():
            break
    return TurnEnd(None, "", tail, probe)


def turn_end_tokens(tokenizer: Any) -> frozenset[int]:
    """Returns the tokens at which a reply ends: that of the chat template, if the tokenizer has one template."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return frozenset()
    try:
        token = find_turn_end(tokenizer).token
    except DataError:
        return frozenset()
    return frozenset() if token is None else frozenset([token])


def name_turn_end(model: Any, stop_ids: frozenset[int]) -> None:
    """Names the tokens at which a reply ends in the model's generation config, which is saved with the model."""
    config = getattr(model, "generation_config", None)
    if config is None or not stop_ids:
        return
    known = config.eos_token_id if config.eos_token_id is not None else []
    known = [known] if isinstance(known, int) else list(known)
    names = list(dict.fromkeys([*sorted(stop_ids), *known]))
    config.eos_token_id = names[0] if len(names) == 1 else names

"""The chat command: talks in the terminal, or answers a file of dialogues, with the encoding of training.

A reply is drawn as `generate` says and seeded by its number in the conversation, or by its dialogue's in the file: the
same settings give the same replies.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dtrain.commands.generate import continuation, ends_of
from dtrain.config.schema import Config
from dtrain.config.task import CausalLm, Chat
from dtrain.console import log
from dtrain.data.dialogues import read_prompts
from dtrain.data.readers import row_unit
from dtrain.data.seeding import seed_all
from dtrain.distributed.heartbeat import Heartbeat
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import device_of
from dtrain.errors import ConfigError, DataError
from dtrain.models.chat_format import ChatFormat, ChatMessage, choose_format, prompt_truncated
from dtrain.models.compatibility import check_fit, longest_input
from dtrain.models.load import load_model
from dtrain.models.tokenizer import load_tokenizer
from dtrain.runs.folder import write_json_atomic, write_lines_atomic
from dtrain.training import run_claim
from dtrain.training import summary as results
from dtrain.training.build import refuse_own_parts

FORGET = "/reset"


@dataclass(frozen=True)
class Reply:
    """text: what the model says. forgotten: the oldest turns that it could not be shown any more."""

    text: str
    forgotten: int


def run_chat(config: Config, context: RankContext) -> None:
    """Talks with whoever sits at the terminal (or behind a pipe), or writes replies to `talk.input`.

    Raises:
        ConfigError: several ranks, another task, or a tokenizer that the format cannot use.
        DataError: a file that cannot be read as dialogues.
    """
    if context.world_size > 1:
        raise ConfigError(f"chat runs as one process, not {context.world_size}: start it with python, no launcher.")
    if not isinstance(config.task, Chat | CausalLm):
        raise ConfigError(f"chat needs a chat model (task.name=chat), not task.name={config.task.name}.")
    begin = time.monotonic()
    file, system = config.talk.input, config.talk.system
    prompts = list(read_prompts(file)) if file is not None else []
    if file is not None and not prompts:
        raise DataError(f"{file} has no dialogue to answer: a line of text is one")
    holds = run_claim.taken(config, context, command="chat") if config.talk.makes_run_folder else nullcontext()
    with holds:
        answer = speaker(config, context)
        if file is None:
            talk(answer, _lines_of(sys.stdin), system=system)
            return
        for line, messages in prompts:
            answer.check(begun_with(system, messages), f"{file}, {row_unit(file)} {line}")
        target = config.talk.output or config.run_dir / "predictions" / "replies.jsonl"
        replies = (
            reply_record(answer, index, line, messages, system=system) for index, (line, messages) in enumerate(prompts)
        )
        write_lines_atomic(target, replies)
        if config.talk.makes_run_folder:
            summary = results.summary("chat", None, context, engine="single", seconds=time.monotonic() - begin)
            write_json_atomic(config.run_dir / "summary.json", {**summary, "step": 0, "examples": len(prompts)})
        log.info("%d replies: %s", len(prompts), target)


Answer = Callable[[Sequence[ChatMessage], int], Reply]
"""The reply to the last message of a dialogue, drawn with that number."""


class Speaker:
    """A model that replies to the last message of a dialogue; an Answer."""

    def __init__(self, config: Config, model: PreTrainedModel, chat: ChatFormat, heartbeat: Heartbeat) -> None:
        self._config, self._model, self._chat, self._heartbeat = config, model, chat, heartbeat
        self._stops = chat.stop_ids | ends_of(model)
        self._room = _room(model, config.generate.max_new_tokens)

    def __call__(self, messages: Sequence[ChatMessage], number: int) -> Reply:
        ids, forgotten = prompt_truncated(self._chat, messages, max_tokens=self._room)
        seed_all(self._config.run.seed, "chat", number)
        prompt = torch.tensor(ids, device=self._model.device)
        whole = continuation(self._model, prompt, self._config, stops=self._stops, heartbeat=self._heartbeat)
        drawn = whole[len(ids) :].tolist()
        return Reply(self._chat.reply([token for token in drawn if token not in self._stops]), forgotten)

    def check(self, messages: Sequence[ChatMessage], place: str) -> None:
        """Raises:
        DataError: a dialogue that the format cannot write down, such as one that the chat template refuses.
        """
        try:
            self._chat.prompt(messages)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None


def speaker(config: Config, context: RankContext) -> Speaker:
    """Loads the model that answers."""
    refuse_own_parts(config, "chat")
    tokenizer = load_tokenizer(config.model, training_texts=list)
    chat = choose_format(tokenizer, config.task.format if isinstance(config.task, Chat) else "auto")
    model = load_model(
        config.model, head="causal_lm", head_config=chat.head_config, tokenizer=tokenizer, seed=config.run.seed
    )
    check_fit(model, tokenizer, max_length=1, needs_padding=False)
    return Speaker(config, model.to(device_of(context.topology)).eval(), chat, context.heartbeat)


def talk(answer: Answer, lines: Iterator[str], *, system: str | None) -> None:
    """Answers line by line with the history, until an empty line or the end; FORGET begins anew."""
    start: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    history, number, told = list(start), 0, 0
    for line in lines:
        said = line.strip()
        if not said:
            return
        if said == FORGET:
            history, told = list(start), 0
            log.info("(forgotten)")
            continue
        history.append({"role": "user", "content": said})
        reply = answer(history, number)
        number += 1
        if reply.forgotten > told:
            told = reply.forgotten
            log.info("(the first %d turns are more than the model can look back on)", told)
        log.info("%s", reply.text)
        history.append({"role": "assistant", "content": reply.text})


def begun_with(system: str | None, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    """The dialogue with that system message, unless it begins with one of its own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def reply_record(
    answer: Answer, index: int, line: int, messages: Sequence[ChatMessage], *, system: str | None
) -> dict[str, Any]:
    """What is written down of one dialogue of a file. index: its number among them, which seeds the reply."""
    return {
        "example_index": index,
        "line": line,
        "messages": [dict(message) for message in messages],
        "prediction": answer(begun_with(system, messages), index).text,
    }


def _lines_of(stream: Any) -> Iterator[str]:
    """Lines that are typed, each after a sign that it is awaited, or lines of a pipe."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="replace")  # half a character is no reason to stop
    if not stream.isatty():
        yield from stream
        return
    log.info("An empty line or Ctrl-D ends, %s forgets what was said.", FORGET)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            log.info("")  # the shell's own prompt begins a line
            return


def _room(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Tokens of the history: the positions less those of the reply, at least half of them."""
    positions = longest_input(model)
    return 2**31 if positions is None else max(positions - max_new_tokens, positions // 2)

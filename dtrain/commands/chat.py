"""The chat command: a conversation in the terminal, or replies to a file of dialogues. Encodes dialogues as in training.

Replies are sampled with the settings of `generate`. The seed of a reply includes its number in the conversation, or the
number of its dialogue in the file, so the same settings give the same replies.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from dtrain.commands.continuation import Continuer, Prompt, end_tokens
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.dialogues import read_prompts
from dtrain.data.readers import row_unit
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.heartbeat import Heartbeat
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.models.chat_format import ChatFormat, choose_format, prompt_truncated
from dtrain.models.chat_template import ChatMessage
from dtrain.models.compatibility import check_fit, longest_input
from dtrain.models.load import load_model
from dtrain.models.tokenizer import load_tokenizer
from dtrain.runs.folder import write_json_atomic, write_lines_atomic
from dtrain.tasks.build import task_info
from dtrain.tasks.progress import progress
from dtrain.training import run_claim
from dtrain.training import summary as results
from dtrain.training.build import refuse_custom_models

RESET = "/reset"
"""Line that clears the history of a conversation."""


@dataclass(frozen=True)
class Reply:
    """A reply of the model.

    Attributes:
        text: the reply.
        dropped_turns: number of oldest turns that did not fit into the model's context.
    """

    text: str
    dropped_turns: int


def run_chat(config: Config, context: RankContext) -> None:
    """Holds a conversation on standard input and output, or writes replies to the dialogues in `talk.input`.

    Raises:
        ConfigError: there are several ranks, another task, or a tokenizer that does not fit the format.
        DataError: the file cannot be read as dialogues.
    """
    if context.world_size > 1:
        raise ConfigError(
            f"chat runs as one process, not {context.world_size}: start it with python, not with a launcher."
        )
    if task_info(config.task).chat_format is None:
        raise ConfigError(f"chat needs a chat model (task.name=chat), not task.name={config.task.name}.")
    begin = time.monotonic()
    file, system = config.talk.input, config.talk.system
    prompts = list(read_prompts(file, config.data.encoding)) if file is not None else []
    if file is not None and not prompts:
        raise DataError(f"{file} has no dialogue to answer: each line of text is one dialogue")
    claim = run_claim.claimed(config, context, command="chat") if config.talk.makes_run_folder else nullcontext()
    with claim:
        model = load_chat_model(config, context)
        if file is None:
            converse(model, _input_lines(sys.stdin), system=system)
            return
        for line, messages in prompts:
            model.check(with_system_message(system, messages), f"{file}, {row_unit(file)} {line}")
        target = config.talk.output or config.run_dir / "predictions" / "replies.jsonl"
        dialogues = [(index, line, messages) for index, (line, messages) in enumerate(prompts)]
        with progress("dialogues answered", len(prompts), of="chat") as done:
            records = [
                record
                for batch in model.batches([with_system_message(system, messages) for _, messages in prompts])
                for record in reply_records(model, [dialogues[index] for index in batch], system=system, done=done)
            ]
        write_lines_atomic(target, sorted(records, key=lambda record: int(record["example_index"])))
        if config.talk.makes_run_folder:
            summary = results.summary("chat", None, context, engine="single", seconds=time.monotonic() - begin)
            write_json_atomic(config.run_dir / "summary.json", {**summary, "step": 0, "examples": len(prompts)})
        log.info("%d replies: %s", len(prompts), target)


ReplyFn = Callable[[Sequence[ChatMessage], int], Reply]
"""Returns the reply to the last message of a dialogue. The number is part of its random seed."""


class ChatModel:
    """A model that replies to the last message of a dialogue. Can be called as a ReplyFn."""

    def __init__(self, config: Config, model: PreTrainedModel, chat: ChatFormat, heartbeat: Heartbeat) -> None:
        self._seed, self._chat = config.run.seed, chat
        self._stops = chat.stop_ids | end_tokens(model)
        self._continue = Continuer(model, config, stops=self._stops, heartbeat=heartbeat)
        self._max_prompt_tokens = _max_prompt_tokens(model, config.generate.max_new_tokens)

    def __call__(self, messages: Sequence[ChatMessage], number: int) -> Reply:
        return self.reply_all([(number, messages)])[0]

    def batches(self, dialogues: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Returns which dialogues `reply_all` should get together."""
        return self._continue.batches([len(self._prompt(messages)[0]) for messages in dialogues])

    def reply_all(
        self, dialogues: Sequence[tuple[int, Sequence[ChatMessage]]], done: Callable[[int], None] = lambda _: None
    ) -> list[Reply]:
        """Replies to each dialogue of a batch, given with the number that is part of its seed.

        Args:
            done: called with the number of dialogues whose reply has ended since its last call.
        """
        encoded = [self._prompt(messages) for _, messages in dialogues]
        prompts = [
            Prompt(ids, (self._seed, "chat", number)) for (number, _), (ids, _) in zip(dialogues, encoded, strict=True)
        ]
        return [
            Reply(self._chat.reply([token for token in new if token not in self._stops]), dropped_turns)
            for new, (_, dropped_turns) in zip(self._continue(prompts, done), encoded, strict=True)
        ]

    def _prompt(self, messages: Sequence[ChatMessage]) -> tuple[list[int], int]:
        """Returns the tokens of a dialogue, and how many turns do not fit."""
        return prompt_truncated(self._chat, messages, max_tokens=self._max_prompt_tokens)

    def check(self, messages: Sequence[ChatMessage], location: str) -> None:
        """Checks that the format can encode a dialogue.

        Args:
            location: file and line of the dialogue, for the error message.

        Raises:
            DataError: it cannot, for example because the chat template refuses the dialogue.
        """
        try:
            self._chat.prompt(messages)
        except DataError as error:
            raise DataError(f"{location}: {error}") from None


def load_chat_model(config: Config, context: RankContext) -> ChatModel:
    """Loads the model with its tokenizer and chat format."""
    refuse_custom_models(config, "chat")
    info = task_info(config.task)
    assert info.chat_format is not None
    tokenizer = load_tokenizer(config.model, training_texts=list)
    chat = choose_format(tokenizer, info.chat_format)
    model = load_model(
        config.model,
        head=info.head,
        head_config=chat.head_config,
        tokenizer=tokenizer,
        seed=config.run.seed,
        is_trained=True,
    )
    check_fit(model, tokenizer, max_length=1, needs_padding=False)
    return ChatModel(config, model.to(device_of(context.topology)).eval(), chat, context.heartbeat)


def converse(reply_to: ReplyFn, lines: Iterator[str], *, system: str | None) -> None:
    """Replies to each line, given the conversation before it. Ends at an empty line or at the end of input.

    The line RESET clears the conversation.
    """
    start: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    history, number, reported = list(start), 0, 0
    for line in lines:
        text = line.strip()
        if not text:
            return
        if text == RESET:
            history, reported = list(start), 0
            log.info("(history cleared)")
            continue
        history.append({"role": "user", "content": text})
        reply = reply_to(history, number)
        number += 1
        if reply.dropped_turns > reported:
            reported = reply.dropped_turns
            log.info("(the first %d turns no longer fit into the model's context)", reported)
        log.info("%s", reply.text)
        history.append({"role": "assistant", "content": reply.text})


def with_system_message(system: str | None, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    """Returns the dialogue with that system message, unless it has one already."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def reply_records(
    model: ChatModel,
    dialogues: Sequence[tuple[int, int, Sequence[ChatMessage]]],
    *,
    system: str | None,
    done: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Returns the output records of a batch of dialogues of a file.

    Args:
        dialogues: number of the dialogue in the file, part of the reply's random seed; line or row that it begins on; and
            its messages.
        done: called with the number of dialogues whose reply has ended since its last call.
    """
    replies = model.reply_all(
        [(index, with_system_message(system, messages)) for index, _, messages in dialogues], done
    )
    return [
        {
            "example_index": index,
            "line": line,
            "messages": [dict(message) for message in messages],
            "prediction": reply.text,
        }
        for (index, line, messages), reply in zip(dialogues, replies, strict=True)
    ]


def _input_lines(stream: Any) -> Iterator[str]:
    """Yields the lines of a pipe, or of a terminal, where a prompt is shown before each."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="replace")  # An incomplete character is no reason to stop.
    if not stream.isatty():
        yield from stream
        return
    log.info("An empty line or Ctrl-D ends the conversation; %s clears the history.", RESET)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            log.info("")  # So that the shell's prompt begins on a new line.
            return


def _max_prompt_tokens(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Returns the maximum prompt length: the model's positions minus those of the reply, but at least half of them."""
    positions = longest_input(model)
    return 2**31 if positions is None else max(positions - max_new_tokens, positions // 2)

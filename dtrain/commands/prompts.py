"""Answers prompts, for the tasks whose examples have no answers: continues a text, fills its masks, or replies to a turn.

Each rank answers some of the prompts, with the complete model. The random seed includes the number of the prompt, and which
prompts are answered together depends on the prompts alone, so the answers are the same at every world size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.commands.chat import load_chat_model, reply_records, with_system_message
from dtrain.commands.evaluate import write_results
from dtrain.commands.fill import MaskFiller
from dtrain.commands.generate import TextGenerator
from dtrain.config.schema import Config, Data
from dtrain.console import log
from dtrain.data.dialogues import read_prompts
from dtrain.data.encodings import text_lines
from dtrain.data.order import assign_micro_batches, chunks
from dtrain.data.readers import TEXT_SUFFIXES, read_rows, row_unit
from dtrain.data.tables import TEXT, Origin, to_table
from dtrain.distributed.collectives import gather_object, on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from dtrain.tasks.build import task_info
from dtrain.tasks.progress import progress
from dtrain.training import run_claim
from dtrain.training.build import in_turn
from dtrain.training.evaluation import EvaluationResult, SplitResult
from dtrain.training.summary import Result

Record = Mapping[str, Any]
"""One line of predictions/test.jsonl."""

NumberedPrompt = tuple[int, int, Any]
"""A prompt's number, the line that it begins on, and the prompt."""


@dataclass(frozen=True)
class PromptResponder:
    """A model and how it answers prompts.

    Attributes:
        check: takes a prompt and its location; raises DataError if the prompt cannot be answered.
        batches: takes all prompts; returns which are answered together.
        answer: takes the prompts of a batch, and a function to call with the number of those that are answered since its
            last call; returns the records to write.
        format: takes a record; returns it as text for the terminal.
    """

    check: Callable[[Any, str], None]
    batches: Callable[[Sequence[Any]], list[list[int]]]
    answer: Callable[[Sequence[NumberedPrompt], Callable[[int], None]], list[Record]]
    format: Callable[[Record], str]


def run_prompts(config: Config, file: Path, context: RankContext) -> Result:
    """Collective. Answers each prompt of the file. Writes predictions/test.jsonl in their order, and summary.json.

    Raises:
        DataError: the file cannot be read as prompts, or a prompt cannot be answered.
        ConfigError: the model cannot answer prompts.
    """
    begin = time.monotonic()
    prompts = _read(config, file, context)
    with run_claim.claimed(config, context, command="predict"):
        responder = in_turn(lambda: _load_responder(config, context), context)
        _check(responder, prompts, file, context)
        log.info(
            "predict with %s on %s, the complete model on each rank",
            config.model.name_or_path,
            context.topology.describe(),
        )
        batches = responder.batches([prompt for _, prompt in prompts])
        local_records: list[Record] = []
        own = share_of(batches, context)
        with progress("prompts answered", sum(map(len, own)), of="predict", is_shown=context.is_main) as done:
            for batch in own:
                local_records += responder.answer([(number, *prompts[number]) for number in batch], done)
        gathered = gather_object(local_records, context)
        records = sorted(
            (record for part in gathered or () for record in part), key=lambda record: int(record["example_index"])
        )
        assert not context.is_main or [record["example_index"] for record in records] == list(range(len(prompts)))
        result = EvaluationResult({}, {"test": SplitResult({}, records)})
        write_results("predict", result, config.run_dir, context, engine="single", seconds=time.monotonic() - begin)
        return Result({}, config.run_dir)


def answer_single_prompt(config: Config, file: Path, context: RankContext) -> str:
    """Collective. Returns the answer to the only prompt of a file, as text for the terminal."""
    prompts = _read(config, file, context)
    responder = in_turn(lambda: _load_responder(config, context), context)
    _check(responder, prompts, file, context)
    ((line, prompt),) = prompts
    (record,) = responder.answer([(0, line, prompt)], lambda _: None)
    return responder.format(record)


def share_of(batches: Sequence[Sequence[int]], context: RankContext) -> list[Sequence[int]]:
    """Returns the batches that this rank answers: the largest go first to the rank with the fewest prompts."""
    assigned = assign_micro_batches(
        len(batches),
        rank=context.rank,
        world_size=context.world_size,
        lock_step=False,
        costs=list(map(len, batches)),
    )
    return [batches[assignment.micro_batch] for assignment in assigned if assignment.counted]


def _read(config: Config, file: Path, context: RankContext) -> list[tuple[int, Any]]:
    """Collective. Reads line number and content of each prompt. Only rank 0 has to see the file."""

    def read() -> list[tuple[int, Any]]:
        if task_info(config.task).prompt == "reply":
            prompts: list[tuple[int, Any]] = list(read_prompts(file, config.data.encoding))
        elif file.suffix.lower() in TEXT_SUFFIXES:
            prompts = [
                (line, text.rstrip("\r\n")) for line, text in text_lines(file, config.data.encoding) if text.strip()
            ]
        else:
            prompts = list(_table_texts(file, config.data))
        if not prompts:
            raise DataError(f"{file} has no prompt: each line of text is one prompt")
        return prompts

    return [(line, prompt) for line, prompt in on_main(read, context)]


def _table_texts(file: Path, data: Data) -> Iterator[tuple[int, str]]:
    """Yields line number and text of each row."""
    origin = Origin(str(file), row_unit(file), needs_label=False, columns=data.columns)
    table = to_table(
        read_rows(file, delimiter=data.delimiter, header=data.header, encoding=data.encoding), TEXT, origin
    ).rows
    return zip(table["line"], table["text"], strict=True)


def _check(responder: PromptResponder, prompts: list[tuple[int, Any]], file: Path, context: RankContext) -> None:
    """Collective. Checks all prompts, before any is answered, because answering may take long."""

    def check() -> None:
        for line, prompt in prompts:
            responder.check(prompt, f"{file}, {row_unit(file)} {line}")

    on_main(check, context)


def _load_responder(config: Config, context: RankContext) -> PromptResponder:
    match task_info(config.task).prompt:
        case "continue":
            return _text_responder(TextGenerator(config, context, command="predict"))
        case "fill":
            return _mask_responder(MaskFiller(config, context))
        case _:
            return _chat_responder(config, context)


def _text_responder(generator: TextGenerator) -> PromptResponder:
    def check(text: str, location: str) -> None:
        if not generator.has_tokens(text):
            raise DataError(
                f"{location}: the text is empty for this tokenizer: a model needs at least one token to continue from"
            )

    def answer(prompts: Sequence[NumberedPrompt], done: Callable[[int], None]) -> list[Record]:
        texts = generator.generate_all([(number, text) for number, _, text in prompts], done)
        return [
            {"example_index": number, "line": line, "text": text, "prediction": generated.continuation}
            for (number, line, text), generated in zip(prompts, texts, strict=True)
        ]

    return PromptResponder(check, generator.batches, answer, lambda record: f"{record['text']}{record['prediction']}")


def _mask_responder(filler: MaskFiller) -> PromptResponder:
    def fill(number: int, line: int, text: str) -> Record:
        filled = filler.fill(text)
        masks = [[{"token": token, "probability": value} for token, value in guesses] for guesses in filled.masks]
        return {"example_index": number, "line": line, "text": text, "prediction": filled.text, "masks": masks}

    def answer(prompts: Sequence[NumberedPrompt], done: Callable[[int], None]) -> list[Record]:
        records = [fill(*prompt) for prompt in prompts]
        done(len(records))
        return records

    def as_text(record: Record) -> str:
        lines = [str(record["prediction"])]
        for number, guesses in enumerate(record["masks"], start=1):
            listed = ", ".join(f"{guess['token']} {guess['probability']:.4f}" for guess in guesses)
            lines.append(f"{filler.token} {number}: {listed}")
        return "\n".join(lines)

    return PromptResponder(filler.check, lambda prompts: chunks(range(len(prompts)), 1), answer, as_text)


def _chat_responder(config: Config, context: RankContext) -> PromptResponder:
    system = config.talk.system
    model = load_chat_model(config, context)
    return PromptResponder(
        lambda messages, location: model.check(with_system_message(system, messages), location),
        lambda dialogues: model.batches([with_system_message(system, messages) for messages in dialogues]),
        lambda prompts, done: list(reply_records(model, prompts, system=system, done=done)),
        lambda record: str(record["prediction"]),
    )

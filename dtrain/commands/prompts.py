"""Answers to prompts, for the tasks whose examples have none: a text is gone on from, its masks are filled, a turn answered.

Each prompt is answered by itself, by one rank, from a model that is whole there, and drawn with its number among the
prompts: the answers are the same at every world size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.commands.chat import begun_with, reply_record, speaker
from dtrain.commands.evaluate import write_down
from dtrain.commands.fill import Filler
from dtrain.commands.generate import Writer
from dtrain.config.schema import Config, Data
from dtrain.console import log
from dtrain.data.dialogues import read_prompts
from dtrain.data.readers import TEXT_SUFFIXES, read_rows, row_unit, text_lines
from dtrain.data.tables import TEXT, Origin, to_table
from dtrain.distributed.collectives import all_gather_object, on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from dtrain.training import run_claim
from dtrain.training.build import in_turn
from dtrain.training.evaluation import EvaluationResult, SplitResult
from dtrain.training.summary import Result

TASKS = ("causal_lm", "masked_lm", "chat")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Respondent:
    """A model and how it answers.

    check: raises DataError against a prompt that it has no answer to; given that and its place. answer: what is written
    down of a prompt, given its number among them, its line and itself. worded: that, as a person reads it.
    """

    check: Callable[[Any, str], None]
    answer: Callable[[int, int, Any], Record]
    worded: Callable[[Record], str]


def run_prompts(config: Config, file: Path, context: RankContext) -> Result:
    """Collective. Answers each prompt of the file, and writes predictions/test.jsonl in their order and summary.json.

    Raises:
        DataError: a file that cannot be read as prompts, or a prompt that cannot be answered.
        ConfigError: a model that cannot answer prompts.
    """
    begin = time.monotonic()
    prompts = _read(config, file, context)
    with run_claim.taken(config, context, command="predict"):
        respondent = in_turn(lambda: _respondent(config, context), context)
        _check(respondent, prompts, file, context)
        log.info(
            "predict with %s on %s, the whole model on each rank",
            config.model.name_or_path,
            context.topology.describe(),
        )
        own = [
            respondent.answer(number, line, prompt)
            for number, (line, prompt) in enumerate(prompts)
            if number % context.world_size == context.rank
        ]
        gathered = [record for records in all_gather_object(own, context) for record in records]
        records = sorted(gathered, key=lambda record: int(record["example_index"]))
        assert [record["example_index"] for record in records] == list(range(len(prompts)))
        result = EvaluationResult({}, {"test": SplitResult({}, records)})
        write_down("predict", result, config.run_dir, context, engine="single", seconds=time.monotonic() - begin)
        return Result({}, config.run_dir)


def answer_first(config: Config, file: Path, context: RankContext) -> str:
    """Collective. The answer to the only prompt of a file, as a person reads it."""
    prompts = _read(config, file, context)
    respondent = in_turn(lambda: _respondent(config, context), context)
    _check(respondent, prompts, file, context)
    ((line, prompt),) = prompts
    return respondent.worded(respondent.answer(0, line, prompt))


def _read(config: Config, file: Path, context: RankContext) -> list[tuple[int, Any]]:
    """Collective. Line and content of each prompt; rank 0 alone need see the file."""

    def read() -> list[tuple[int, Any]]:
        if config.task.name == "chat":
            found: list[tuple[int, Any]] = list(read_prompts(file))
        elif file.suffix.lower() in TEXT_SUFFIXES:
            found = [(line, text.rstrip("\r\n")) for line, text in text_lines(file) if text.strip()]
        else:
            found = list(_texts_of_table(file, config.data))
        if not found:
            raise DataError(f"{file} has no prompt: a line of text is one")
        return found

    return [(line, prompt) for line, prompt in on_main(read, context)]


def _texts_of_table(file: Path, data: Data) -> Iterator[tuple[int, str]]:
    origin = Origin(str(file), row_unit(file), needs_label=False, columns=data.columns)
    table = to_table(read_rows(file, delimiter=data.delimiter, header=data.header), TEXT, origin).rows
    return zip(table["line"], table["text"], strict=True)


def _check(respondent: Respondent, prompts: list[tuple[int, Any]], file: Path, context: RankContext) -> None:
    """Collective. All prompts before the first answer, which may take long."""

    def check() -> None:
        for line, prompt in prompts:
            respondent.check(prompt, f"{file}, {row_unit(file)} {line}")

    on_main(check, context)


def _respondent(config: Config, context: RankContext) -> Respondent:
    match config.task.name:
        case "causal_lm":
            return _continues(Writer(config, context, command="predict"))
        case "masked_lm":
            return _fills(Filler(config, context))
        case _:
            return _replies(config, context)


def _continues(writer: Writer) -> Respondent:
    def check(text: str, place: str) -> None:
        if not writer.has_tokens(text):
            raise DataError(f"{place}: the text is empty for this tokenizer: a model goes on from one token at least")

    def answer(number: int, line: int, text: str) -> Record:
        return {
            "example_index": number,
            "line": line,
            "text": text,
            "prediction": writer.write(text, number=number).added,
        }

    return Respondent(check, answer, lambda record: f"{record['text']}{record['prediction']}")


def _fills(filler: Filler) -> Respondent:
    def answer(number: int, line: int, text: str) -> Record:
        filled = filler.fill(text)
        masks = [[{"token": token, "probability": value} for token, value in found] for found in filled.masks]
        return {"example_index": number, "line": line, "text": text, "prediction": filled.text, "masks": masks}

    def worded(record: Record) -> str:
        lines = [str(record["prediction"])]
        for number, found in enumerate(record["masks"], start=1):
            guesses = ", ".join(f"{one['token']} {one['probability']:.4f}" for one in found)
            lines.append(f"{filler.token} {number}: {guesses}")
        return "\n".join(lines)

    return Respondent(filler.check, answer, worded)


def _replies(config: Config, context: RankContext) -> Respondent:
    system = config.talk.system
    answer = speaker(config, context)
    return Respondent(
        lambda messages, place: answer.check(begun_with(system, messages), place),
        lambda number, line, messages: reply_record(answer, number, line, messages, system=system),
        lambda record: str(record["prediction"]),
    )

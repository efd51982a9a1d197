"""The answer to predict.text: one example that is in no file, read and encoded as one of a split would be.

The text becomes the row of a file with the columns that the task reads, in a temporary folder; what follows is what
happens to any file. A text that begins with { is such a row itself, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dtrain.commands import prompts
from dtrain.commands.evaluate import wrap
from dtrain.config import task as task_settings
from dtrain.config.schema import Config, Data
from dtrain.console import log, warnings_only
from dtrain.data.images import IMAGE_COLUMNS
from dtrain.data.seeding import DataPosition
from dtrain.data.token_tags import TOKEN_COLUMNS
from dtrain.distributed.collectives import barrier
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Answers
from dtrain.training import build
from dtrain.training.evaluation import evaluate, to_device
from dtrain.training.summary import Result

SPLIT, FILE = "test", "text.jsonl"

EXAMPLES = {
    "multiple_choice": '{"sent1": "She opens the door.", "sent2": "She", "ending0": "goes in.", "ending1": "is a door."}',
    "question_answering": '{"question": "Who came?", "context": "Ann came late."}',
}
"""Rows as JSON, of the tasks that one text alone is no row of."""

EXAMPLE = '{"text": "A cat sleeps."}'

WITH_PAIRS = ("classification", "regression", "question_answering")


def run_answer(config: Config, context: RankContext) -> Result:
    """Collective. Prints the answer, and writes nothing.

    Raises:
        ConfigError: a text that is no row of this task.
        DataError: a column is missing, or a value is not what the task reads.
    """
    row = row_of(config)
    with TemporaryDirectory(prefix="dtrain-predict-") as place:
        file = Path(place) / FILE
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        config = config.model_copy(update={"data": _data(config, file)})
        try:
            with warnings_only():
                text = _answer(config, row, file, context)
        except DataError as error:  # the user knows of no file
            told = str(error).replace(f"{file}, line 1", "predict.text").replace(str(file), "predict.text")
            error.args = (told,)
            raise
        barrier(context)  # the rows lie in the folder of one rank of each node
    log.info("%s", text)
    return Result({}, config.run_dir)


def row_of(config: Config) -> dict[str, Any]:
    """The columns that predict.text stands for.

    Raises:
        ConfigError: the task wants more than one text, or less than two, or JSON that is none.
    """
    text, pair, task = str(config.predict.text), config.predict.text_pair, config.task
    if _is_row(config):
        if pair is not None:
            raise ConfigError("predict.text is a whole row, as JSON: put predict.text_pair into it as a column.")
        return _json_row(text, config)
    if pair is not None and task.name not in WITH_PAIRS:
        raise ConfigError(f"predict.text_pair: task.name={task.name} reads no second text. Leave it out.")
    match task:
        case task_settings.MultipleChoice():
            raise ConfigError(
                "predict.text for task.name=multiple_choice is a row with all its columns, as JSON: predict.text="
                f"'{EXAMPLES[task.name]}'"
            )
        case task_settings.QuestionAnswering() if pair is None:
            raise ConfigError(
                "predict.text is a question here: give the text that answers it as predict.text_pair, or both as JSON: "
                f"predict.text='{EXAMPLES[task.name]}'"
            )
        case task_settings.QuestionAnswering():
            return {"question": text, "context": pair}
        case task_settings.TokenClassification():
            return {"tokens": text.split()}
        case task_settings.Seq2Seq():
            return {task.source or "source": text}
        case task_settings.Chat():
            return {"prompt": text}
        case task_settings.ImageClassification() | task_settings.ImageRegression():
            return {"image": _absolute(text)}
        case _:
            return {"text": text} if pair is None else {"text": text, "text_pair": pair}


def _is_row(config: Config) -> bool:
    """Whether the text is a whole row, as JSON."""
    return str(config.predict.text).lstrip().startswith("{")


def _json_row(text: str, config: Config) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(
            f"predict.text begins with {{ and so is read as JSON, the columns of a row, but: {error}. Write it like "
            f"'{EXAMPLES.get(config.task.name, EXAMPLE)}'; a text that itself begins with {{ is given like that, too."
        ) from None
    assert isinstance(row, dict), "it begins with {"
    for name in {config.data.columns.get("image", ""), *IMAGE_COLUMNS} & row.keys():
        if config.task.name.startswith("image_") and isinstance(row[name], str):
            row[name] = _absolute(row[name])
    return row


def _absolute(path: str) -> str:
    """As seen from here, not from the folder that the row is put into."""
    return str(Path(path).expanduser().absolute())


def _data(config: Config, file: Path) -> Data:
    """The row as a split; its columns have the user's names where it came as JSON."""
    return Data(
        path=file.parent,
        splits={SPLIT: file.name},
        columns=config.data.columns if _is_row(config) else {},
        max_length=config.data.max_length,
        cache_dir=file.parent / "cache",
    )


def _answer(config: Config, row: Mapping[str, Any], file: Path, context: RankContext) -> str:
    """Collective. With what the task tells of an example besides, or else the prediction that an evaluation writes down."""
    if config.task.name in prompts.TASKS:
        return prompts.answer_first(config, file, context)
    if config.task.name == "seq2seq":
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate": True})})
    task = build_task(config, context)
    forward = wrap(build.load(config, task, context), config, context)
    if not isinstance(task, Answers):
        (record,) = evaluate(forward, task, micro_batch_size=1).splits[SPLIT].records
        return worded({"prediction": record["prediction"]}, row, config)
    forward.module.eval()
    batch = task.collate(task.splits[SPLIT][[0]], DataPosition(0, (0,)))
    device = next(forward.module.parameters()).device
    with torch.no_grad(), forward.autocast():
        (answer,) = task.answers(forward.module, to_device(batch, device))
    return worded(answer, row, config)


def worded(answer: Mapping[str, Any], row: Mapping[str, Any], config: Config) -> str:
    """`acceptable (probability 0.9731)`."""
    first = _worded_prediction(answer["prediction"], row, config)
    more = ", ".join(f"{name} {_short(value)}" for name, value in answer.items() if name != "prediction")
    return f"{first} ({more})" if more else first


def _worded_prediction(found: Any, row: Mapping[str, Any], config: Config) -> str:
    columns = config.data.columns
    match config.task:
        case task_settings.TokenClassification():
            words = next(row[name] for name in (columns.get("tokens", ""), *TOKEN_COLUMNS) if name in row)
            return " ".join(word if tag is None else f"{word}/{tag}" for word, tag in zip(words, found, strict=True))
        case task_settings.MultipleChoice():
            name = f"ending{found}"
            return f"{name}: {row[columns.get(name, name)]}"
        case task_settings.ImageRegression(targets=names):
            return ", ".join(f"{name} {_short(value)}" for name, value in zip(names, found, strict=True))
        case task_settings.QuestionAnswering() if not found:
            return "(no answer in this text)"
        case _:
            return _short(found)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)

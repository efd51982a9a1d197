"""Answers predict.text: a single example, which is read and encoded like an example of a split.

The text becomes a row with the columns that the task reads, in a file in a temporary folder. From there on it is treated
like any other file. A text that starts with { is such a row itself, as JSON.
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
from dtrain.config import bounded_json
from dtrain.config.schema import Config, Data
from dtrain.console import log, warnings_only
from dtrain.data.seeding import DataPosition
from dtrain.distributed.collectives import barrier, broadcast_object
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.models.host_copy import to_device
from dtrain.models.placement import compute_device
from dtrain.tasks.build import build_task, task_info
from dtrain.tasks.info import TaskInfo, format_value
from dtrain.tasks.protocol import HasAnswers
from dtrain.training import build
from dtrain.training.evaluation import evaluate
from dtrain.training.summary import Result

SPLIT, FILE = "test", "text.jsonl"


def run_answer(config: Config, context: RankContext) -> Result:
    """Collective. Prints the answer and writes no file.

    Raises:
        ConfigError: the text is not a row of this task.
        DataError: a column is missing, or a value is not what the task reads.
    """
    row = read_row(config)
    with TemporaryDirectory(prefix="dtrain-predict-") as folder:
        file = Path(folder) / FILE
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        config = config.model_copy(update={"data": _data(config, file)})
        try:
            with warnings_only():
                text = _answer(config, row, file, context)
        except DataError as error:  # the user does not know about the file
            message = str(error).replace(f"{file}, line 1", "predict.text").replace(str(file), "predict.text")
            error.args = (message,)
            raise
        barrier(context)  # the other ranks of a node read the row from the folder of one rank
    log.info("%s", text)
    return Result({}, config.run_dir)


def read_row(config: Config) -> dict[str, Any]:
    """Returns the row that predict.text and predict.text_pair stand for.

    Raises:
        ConfigError: the task needs more texts or fewer, or the JSON is invalid.
    """
    info, pair = task_info(config.task), config.predict.text_pair
    if not _is_json(config):
        row = _row_of_plain_text(config, info)
    elif pair is not None:
        raise ConfigError("predict.text is a complete row, as JSON: put predict.text_pair into it as a column.")
    else:
        row = _row_of_json(config, info)
    renamed = (config.data.columns.get(name, name) for name in info.path_columns)
    for name in {*info.path_columns, *renamed} & row.keys():
        if isinstance(row[name], str):  # relative to the working folder, not to the folder that the row is written to
            row[name] = str(Path(row[name]).expanduser().absolute())
    return row


def _row_of_plain_text(config: Config, info: TaskInfo) -> dict[str, Any]:
    pair, name, columns = config.predict.text_pair, config.task.name, info.text_columns
    if pair is not None and len(columns) < 2:
        raise ConfigError(f"predict.text_pair: task.name={name} reads no second text. Leave it out.")
    if not columns:
        raise ConfigError(
            f"predict.text for task.name={name} must be a row with all its columns, as JSON: predict.text="
            f"'{json.dumps(info.example_row)}'"
        )
    if pair is None and info.needs_text_pair:
        raise ConfigError(
            f"predict.text is the {columns[0]} here: set predict.text_pair to the {columns[1]}, or write both as JSON: "
            f"predict.text='{json.dumps(info.example_row)}'"
        )
    row = {columns[0]: info.parse_text(str(config.predict.text))}
    return row if pair is None else {**row, columns[1]: pair}


def _is_json(config: Config) -> bool:
    """Returns whether the text is a complete row, as JSON."""
    return str(config.predict.text).lstrip().startswith("{")


def _row_of_json(config: Config, info: TaskInfo) -> dict[str, Any]:
    try:
        row = bounded_json.loads(str(config.predict.text))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"predict.text starts with {{ and is therefore read as JSON, as the columns of a row, but: {error}. Write it "
            f"like '{json.dumps(info.example_row)}', also if the text itself starts with {{."
        ) from None
    assert isinstance(row, dict), "it starts with {"
    return row


def _data(config: Config, file: Path) -> Data:
    """Returns the data section with the row as its only split. Rows from JSON have the user's column names."""
    return Data(
        path=file.parent,
        splits={SPLIT: file.name},
        columns=config.data.columns if _is_json(config) else {},
        max_length=config.data.max_length,
        cache_dir=file.parent / "cache",
    )


def _answer(config: Config, row: Mapping[str, Any], file: Path, context: RankContext) -> str:
    """Collective. Returns the task's own answer if it has one, else the prediction that an evaluation writes."""
    if task_info(config.task).prompt is not None:
        return prompts.answer_single_prompt(config, file, context)
    if config.task.generates_texts:
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate": True})})
    task = build_task(config, context)
    forward = wrap(build.load(config, task, context, is_trained=True), config, task, context)
    if not isinstance(task, HasAnswers):
        records = evaluate(forward, task, micro_batch_size=1).splits[SPLIT].records
        (prediction,) = broadcast_object([record["prediction"] for record in records], context)  # rank 0 has it
        return format_answer({"prediction": prediction}, row, config)
    forward.module.eval()
    batch = task.collate(task.splits[SPLIT][[0]], DataPosition(0, (0,)))
    device = compute_device(forward.module)
    with torch.no_grad(), forward.autocast():
        (answer,) = task.answers(forward.module, to_device(batch, device))
    return format_answer(answer, row, config)


def format_answer(answer: Mapping[str, Any], row: Mapping[str, Any], config: Config) -> str:
    """Returns an answer as text, e.g. `acceptable (probability 0.9731)`."""
    prediction = task_info(config.task).format_prediction(answer["prediction"], row, config.data.columns)
    more = ", ".join(f"{name} {format_value(value)}" for name, value in answer.items() if name != "prediction")
    return f"{prediction} ({more})" if more else prediction

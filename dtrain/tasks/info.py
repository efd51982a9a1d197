"""The facts about a task that the rest of dtrain uses, so that no code outside dtrain/tasks/ checks a task's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.models.heads import Head
from dtrain.tasks.protocol import Task


def format_value(value: Any) -> str:
    """Returns a prediction as text: four decimals for a float."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _format_value_alone(prediction: Any, _row: Mapping[str, Any], _columns: Mapping[str, str]) -> str:
    return format_value(prediction)


@dataclass(frozen=True)
class TaskInfo:
    """Describes a task for the commands and the model card. The function `info` in the task's file returns it.

    Attributes:
        prepare: Collective. Reads and encodes the data, once per node, and returns the task.
        head: Output layers that the task needs on top of a model.
        example_row: A row of the data, for error messages.
        text_columns: Columns that `predict.text` and `predict.text_pair` fill, in this order. With one column there is
            no second text. Without columns a plain text is no row of this task.
        needs_text_pair: `predict.text` alone is no row of this task.
        parse_text: Converts `predict.text` to the value of its column.
        path_columns: Usual names of a column of file paths. A path in a row of `predict.text` is relative to the
            working folder.
        format_prediction: Returns a prediction as text, given the row of `predict.text` and `data.columns`.
        prompt: How `predict` answers a prompt. `continue`: the model continues a text. `fill`: it fills the masks of a
            text. `reply`: it replies to the last message of a dialogue. None: `predict` writes down the predictions of
            an evaluation.
        chat_format: Format of a dialogue in the `chat` command (see `models.chat_format`). None: the model cannot chat.
        pipeline_tag: The name of the task on the Hugging Face hub. None: the hub has no name for it.
    """

    prepare: Callable[[Config, RankContext], Task]
    head: Head
    example_row: Mapping[str, Any]
    text_columns: Sequence[str] = ("text",)
    needs_text_pair: bool = False
    parse_text: Callable[[str], Any] = str
    path_columns: Sequence[str] = ()
    format_prediction: Callable[[Any, Mapping[str, Any], Mapping[str, str]], str] = _format_value_alone
    prompt: Literal["continue", "fill", "reply"] | None = None
    chat_format: Literal["auto", "turns", "template"] | None = None
    pipeline_tag: str | None = None

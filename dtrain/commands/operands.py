"""What a command works on, written without the name of a setting: `dtrain predict runs/cola "A text."`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dtrain.config.yaml_dialect import quote
from dtrain.errors import ConfigError

WITHOUT_OPERANDS = ("train", "doctor", "goodput")
"""Commands that take settings only, or whose operand is no setting."""

SECOND = {
    "predict": "predict.text",
    "generate": "generate.prompt",
    "inspect": "inspect.text",
    "export": "export.to",
    "download": "download.to",
}
"""By command, the setting of its second operand. The first one is the model."""

FILES_OF_ROWS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", ".arrow")


def is_setting(word: str) -> bool:
    """Returns whether a word of the command line is `section.key=value`, and not a text or a path with a `=` in it."""
    return re.match(r"[A-Za-z_][\w.-]*=", word) is not None


def expand_operands(command: str, words: Sequence[str]) -> list[str]:
    """Returns the words with those that name no setting as settings: the model, then what SECOND says.

    Raises:
        ConfigError: a word too many, or a file where a text is expected.
    """
    operands = [word for word in words if not is_setting(word)]
    if not operands or command in WITHOUT_OPERANDS:
        return list(words)  # load.py refuses what is no setting
    names = ["model.name_or_path", *([SECOND[command]] if command in SECOND else [])]
    if len(operands) > len(names):
        takes = f"takes {' and '.join(names)}" if len(names) > 1 else "takes a model"
        raise ConfigError(
            f"{operands[len(names)]!r} is one word too many: {command} {takes}, then settings such as run.seed=1. Put a text "
            "with spaces in quotes."
        )
    for name in names[: len(operands)]:
        if any(word.startswith(f"{name}=") for word in words):
            raise ConfigError(f"{name} is set twice: as {operands[names.index(name)]!r} and as {name}=... Keep one.")
    if command == "predict" and len(operands) > 1:
        _refuse_file(operands[1])
    # A setting that is given as a word comes first, so that errors list settings in the order of the command line.
    expanded = [f"{name}={quote(operand)}" for name, operand in zip(names, operands, strict=False)]
    return [*expanded, *(word for word in words if is_setting(word))]


def _refuse_file(text: str) -> None:
    if text.lower().endswith(FILES_OF_ROWS) and Path(text).is_file():
        raise ConfigError(
            f"{text} is a file: to answer its rows, write predict.file={text}; to answer its name, predict.text={text}"
        )

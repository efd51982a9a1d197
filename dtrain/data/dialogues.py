"""Dialogues: turns with a speaker each, read from text files, lists and messages.

A plain text file has one of two formats, detected from its first 100 nonempty lines. If one of them has a tab, each line
is a dialogue with its turns separated by tabs. Otherwise each line is a turn, and an empty line ends the dialogue. Turns
without roles alternate and begin with the user. models/chat_format.py encodes dialogues as tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrain.data.column_names import cure
from dtrain.data.encodings import text_lines
from dtrain.data.readers import TEXT_SUFFIXES, Row, Values, read_rows, row_unit
from dtrain.data.tables import Origin, RowConverter, RowFormat, configured_columns, missing_column, require_text
from dtrain.errors import DataError
from dtrain.models.chat_template import ChatMessage

FORMAT_SAMPLE_LINES = 100
"""Number of nonempty lines that decide the format of a text file."""

COLUMNS = ("messages", "turns", "dialog", "dialogue", "conversation", "conversations", "dialogs")
ROLES = ("system", "user", "assistant")
ROLE_ALIASES = {"human": "user", "gpt": "assistant"}
"""Role names of other data sets."""
NOT_WRITTEN = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that other programs write into its text, and dtrain does not."""
TOOLS = "tools"
"""Column of the functions that a model may call."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")


def text_dialogues(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Yields the dialogues of a plain text file, each with its first line number."""
    begin = islice(((line, text) for line, text in text_lines(path, encoding) if text.strip()), FORMAT_SAMPLE_LINES)
    tab = next((line for line, text in begin if "\t" in text.strip()), None)
    return _utterance_per_line(path, encoding) if tab is None else _dialogue_per_line(path, tab, encoding)


def _dialogue_per_line(path: Path, tab: int, encoding: str | None) -> Iterator[Row]:
    for line, text in text_lines(path, encoding):
        turns = text.rstrip("\r\n").split("\t")
        if not text.strip():
            continue
        if len(turns) < 2:
            yield (
                line,
                DataError(
                    f"{path}, line {line}: only one turn ({_shown(turns[0])}), where turns separated by tabs are expected, "
                    f"as on line {tab}. If this file has a turn on each line and an empty line between dialogues, remove "
                    f"the tab from line {tab}"
                ),
            )
            continue
        yield line, {"turns": turns}


def _utterance_per_line(path: Path, encoding: str | None) -> Iterator[Row]:
    begin, turns = 0, list[str]()
    for line, text in text_lines(path, encoding):
        if text.strip():
            begin = begin if turns else line
            turns.append(text.rstrip("\r\n"))
        elif turns:
            yield begin, {"turns": turns}
            turns = []
    if turns:
        yield begin, {"turns": turns}


def parse_dialogue(value: Any, column: str, location: str, *, last: str | None = None) -> list[ChatMessage]:
    """Returns the checked messages of a row's value: a list of texts, or of objects with role and content.

    Args:
        last: speaker of the last turn if turns have no roles; None: they alternate from the user on.

    Raises:
        DataError: the value is not a dialogue. The message names the location.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(
            f'{location}: {column} must be a list of turns, such as ["Hello", "Hi"] or [{{"role": "user", "content": '
            f'"Hello"}}, ...], found {_shown(value)}'
        )
    if not value:
        raise DataError(f"{location}: an empty dialogue: {column} has no turns. Every dialogue needs at least one")
    if isinstance(value[0], Mapping):
        return [_message(turn, f"{location}, turn {number}") for number, turn in enumerate(value, start=1)]
    first = 1 if last is not None and len(value) % 2 == (last == "assistant") else 0
    speakers = ("user", "assistant")
    return [
        {"role": speakers[(first + number) % 2], "content": _turn_text(turn, f"{location}, turn {number + 1}")}
        for number, turn in enumerate(value)
    ]


def _message(turn: Any, location: str) -> ChatMessage:
    if not isinstance(turn, Mapping):
        raise DataError(f"{location}: expected an object with role and content, like turn 1, found {_shown(turn)}")
    role_key = next((key for key in ROLE_KEYS if key in turn), None)
    content_key = next((key for key in CONTENT_KEYS if key in turn), None)
    if role_key is None or content_key is None:
        missing = "role" if role_key is None else "content"
        raise DataError(
            f"{location}: a message without {missing}: it needs role and content, and has {', '.join(turn)}"
        )
    role = turn[role_key]
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(
            f"{location}: the role {_shown(role)} is unknown. Expected {', '.join(ROLES[:-1])} or {ROLES[-1]}"
        )
    if lost := [key for key in NOT_WRITTEN if turn.get(key)]:
        raise DataError(
            f"{location}: the message has {lost[0]}, which would not be learned: only content is. Write it into content, as "
            f"the model should write it, and remove {lost[0]}"
        )
    message = {"role": role, "content": _turn_text(turn[content_key], location, may_be_empty=role == "system")}
    weight = turn.get("weight")
    if weight is None:
        return message
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(
            f"{location}: weight must be 1 (the turn is learned) or 0 (it is only context), found {_shown(weight)}"
        )
    return {**message, "weight": int(weight)}


def _turn_text(value: Any, location: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{location}: a turn must be text, found {_shown(value)}")
    text = require_text(value, "a turn", location)
    if not text.strip() and not may_be_empty:
        raise DataError(f"{location}: an empty turn. Remove the turn or the dialogue")
    return text


def _converter(first: Values, origin: Origin, *, needs_reply: bool) -> RowConverter:
    column = _column(list(first), origin)

    def convert(values: Values, location: str) -> dict[str, Any]:
        if column not in values:
            raise DataError(f"{location}: the column {column!r} is missing; the row has {', '.join(values) or 'none'}")
        turns = parse_dialogue(values[column], column, location)
        if values.get(TOOLS) not in (None, "", [], "[]"):
            raise DataError(
                f"{location}: the row has {TOOLS}, which would not be learned. Write them into the system message, as the "
                f"model should read them, and remove the column {TOOLS}"
            )
        replies = [turn for turn in turns if turn["role"] == "assistant"]
        if needs_reply and origin.needs_label and all(turn.get("weight") == 0 for turn in replies):
            which = "the assistant has weight 0" if replies else "none by the assistant"
            raise DataError(
                f"{location}: a dialogue without a reply ({len(turns)} turn(s), {which}) has no targets with "
                "task.loss_on=replies. Remove it, skip such rows with data.max_bad_rows, or set task.loss_on=all"
            )
        return {"turns": turns}

    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())])
    return RowConverter(pa.schema([("turns", pa.list_(turn))]), convert, columns={"turns": column})


def _column(columns: Sequence[str], origin: Origin) -> str:
    configured = configured_columns(columns, origin, ("turns",)).get("turns")
    column = configured or next((name for name in COLUMNS if name in columns), None)
    if column is None:
        error = missing_column("the turns of a dialogue", "turns", COLUMNS, columns, origin)
        first = "train" if "train" in columns else (*columns, "...")[0]
        raise DataError(f"{error}. If these are splits in one JSON file: {cure('data.splits', {'train': first})}")
    return column


def dialogue_row_format(*, needs_reply: bool) -> RowFormat:
    """Returns the row format of dialogues. needs_reply: rows without a reply are bad rows, except in a test split."""
    name = "dialogue-with-reply-2" if needs_reply else "dialogue-2"
    return RowFormat(name, partial(_converter, needs_reply=needs_reply), text_rows=text_dialogues)


def read_prompts(path: Path, encoding: str | None = None) -> Iterator[tuple[int, list[ChatMessage]]]:
    """Yields dialogues to answer, each with its line (or row) number. The last turn is the user's.

    In a text file, each line is a dialogue with its turns separated by tabs. Other files hold dialogues as training data
    do, or one text each in the column `prompt`.

    Raises:
        DataError: the file is unreadable, a row is not a dialogue, or its last turn is not the user's.
    """
    is_text = path.suffix.lower() in TEXT_SUFFIXES
    unit = row_unit(path)
    rows = _lines(path, encoding) if is_text else read_rows(path, delimiter=None, header=None, encoding=encoding)
    for number, values in rows:
        if isinstance(values, DataError):
            raise values
        location = f"{path}, {unit} {number}"
        column = "prompt" if "prompt" in values else _column(list(values), Origin(str(path)))
        value = values[column]
        messages = parse_dialogue([value] if isinstance(value, str) else value, column, location, last="user")
        if messages[-1]["role"] != "user":
            raise DataError(
                f"{location}: the last turn is the {messages[-1]['role']}'s, so there is nothing to answer. End the "
                "dialogue with a turn of the user"
            )
        yield number, messages


def _lines(path: Path, encoding: str | None) -> Iterator[Row]:
    for line, text in text_lines(path, encoding):
        if text.strip():
            yield line, {"turns": text.rstrip("\r\n").split("\t")}


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."

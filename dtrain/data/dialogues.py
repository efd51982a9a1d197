"""Dialogues: turns with a speaker each, from text files, JSON lists and messages.

A plain text file is in one of two formats, told apart by its first 100 lines with text: if one of them has a tab, a line is
a dialogue and tabs part its turns; if none has, a line is an utterance and a blank line ends the dialogue. Turns
without roles alternate, and the user begins. How a dialogue becomes tokens is said in models/chat_format.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrain.data.readers import TEXT_SUFFIXES, Row, Values, read_rows, text_lines, unit_of
from dtrain.data.tables import Layout, Origin, Shape, checked_text, given_columns, missing_column
from dtrain.errors import DataError

ChatMessage = Mapping[str, str]
"""`role` and `content`."""

SHOWN_FIRST = 100
"""Lines that decide which of the two formats a text file is in."""

COLUMNS = ("messages", "turns", "dialog", "dialogue", "conversation", "conversations", "dialogs")
ROLES = ("system", "user", "assistant")
OTHER_ROLES = {"human": "user", "gpt": "assistant"}
"""Names that other collections of dialogues have for the same speakers."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")


def text_dialogues(path: Path) -> Iterator[Row]:
    """Dialogues of a plain text file, each with the line that it begins on."""
    begin = islice(((line, text) for line, text in text_lines(path) if text.strip()), SHOWN_FIRST)
    tab = next((line for line, text in begin if "\t" in text.strip()), None)
    return _utterance_lines(path) if tab is None else _tabbed_lines(path, tab)


def _tabbed_lines(path: Path, tab: int) -> Iterator[Row]:
    for line, text in text_lines(path):
        turns = text.rstrip("\r\n").split("\t")
        if not text.strip():
            continue
        if len(turns) < 2:
            yield (
                line,
                DataError(
                    f"{path}, line {line}: one turn only ({_shown(turns[0])}), where turns parted by tabs are expected, "
                    f"as on line {tab}. If this file has an utterance on each line and a blank line between dialogues, take "
                    f"the tab out of line {tab}"
                ),
            )
            continue
        yield line, {"turns": turns}


def _utterance_lines(path: Path) -> Iterator[Row]:
    begin, turns = 0, list[str]()
    for line, text in text_lines(path):
        if text.strip():
            begin = begin if turns else line
            turns.append(text.rstrip("\r\n"))
        elif turns:
            yield begin, {"turns": turns}
            turns = []
    if turns:
        yield begin, {"turns": turns}


def dialogue_of(value: Any, column: str, place: str, *, last: str | None = None) -> list[ChatMessage]:
    """Checked messages of a row's value: a list of texts, or of objects with role and content.

    Args:
        last: who speaks the last of turns without roles; None: they alternate from the user on.

    Raises:
        DataError: what is no dialogue, with its place.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(
            f'{place}: {column} must be a list of turns, such as ["Hello", "Hi"] or [{{"role": "user", "content": '
            f'"Hello"}}, ...], found {_shown(value)}'
        )
    if not value:
        raise DataError(f"{place}: an empty dialogue: {column} has no turn. Every dialogue needs at least one")
    if isinstance(value[0], Mapping):
        return [_message(turn, f"{place}, turn {number}") for number, turn in enumerate(value, start=1)]
    first = 1 if last is not None and len(value) % 2 == (last == "assistant") else 0
    speakers = ("user", "assistant")
    return [
        {"role": speakers[(first + number) % 2], "content": _said(turn, f"{place}, turn {number + 1}")}
        for number, turn in enumerate(value)
    ]


def _message(turn: Any, place: str) -> ChatMessage:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: expected an object with role and content, as turn 1 is, found {_shown(turn)}")
    role_key = next((key for key in ROLE_KEYS if key in turn), None)
    content_key = next((key for key in CONTENT_KEYS if key in turn), None)
    if role_key is None or content_key is None:
        lacks = "role" if role_key is None else "content"
        raise DataError(f"{place}: a message without {lacks}: it needs role and content, and has {', '.join(turn)}")
    role = turn[role_key]
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"{place}: the role {_shown(role)} is unknown. Expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    return {"role": role, "content": _said(turn[content_key], place, may_be_empty=role == "system")}


def _said(value: Any, place: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: a turn must be text, found {_shown(value)}")
    text = checked_text(value, "a turn", place)
    if not text.strip() and not may_be_empty:
        raise DataError(f"{place}: an empty turn. Leave the turn out, or the dialogue")
    return text


def _layout(first: Values, origin: Origin, *, needs_reply: bool) -> Layout:
    column = _column(list(first), origin)

    def convert(values: Values, place: str) -> dict[str, Any]:
        if column not in values:
            raise DataError(f"{place}: the column {column!r} is missing; the row has {', '.join(values) or 'none'}")
        turns = dialogue_of(values[column], column, place)
        if needs_reply and origin.needs_label and all(turn["role"] != "assistant" for turn in turns):
            raise DataError(
                f"{place}: a dialogue without a reply ({len(turns)} turn(s), none of the assistant's) has nothing to "
                "learn with task.loss_on=replies. Take it out, allow for it with data.max_bad_rows, or set "
                "task.loss_on=all"
            )
        return {"turns": turns}

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return Layout(pa.schema([("turns", pa.list_(turn))]), convert)


def _column(found: Sequence[str], origin: Origin) -> str:
    given = given_columns(found, origin, ("turns",)).get("turns")
    column = given or next((name for name in COLUMNS if name in found), None)
    if column is None:
        error = missing_column("the turns of a dialogue", "turns", COLUMNS, found, origin)
        first = "train" if "train" in found else (*found, "...")[0]
        raise DataError(f"{error}. If these are splits in one JSON file: data.splits={{train: {first}}}")
    return column


def dialogue_shape(*, needs_reply: bool) -> Shape:
    """The shape of dialogues. needs_reply: one in which the assistant says nothing is a bad row, but in a test split."""
    name = "dialogue-with-reply" if needs_reply else "dialogue"
    return Shape(name, partial(_layout, needs_reply=needs_reply), text_rows=text_dialogues)


def read_prompts(path: Path) -> Iterator[tuple[int, list[ChatMessage]]]:
    """Dialogues to be answered, each with its line (or row): the last turn is the user's.

    In a text file a line is a dialogue, its turns parted by tabs; other files hold dialogues as training data do, or
    one text each as `prompt`.

    Raises:
        DataError: an unreadable file, a row that is no dialogue, or one that the assistant has the last word in.
    """
    is_text = path.suffix.lower() in TEXT_SUFFIXES
    unit = unit_of(path)
    rows = _lines(path) if is_text else read_rows(path, delimiter=None, header=None)
    for number, values in rows:
        if isinstance(values, DataError):
            raise values
        place = f"{path}, {unit} {number}"
        column = "prompt" if "prompt" in values else _column(list(values), Origin(str(path)))
        value = values[column]
        messages = dialogue_of([value] if isinstance(value, str) else value, column, place, last="user")
        if messages[-1]["role"] != "user":
            raise DataError(
                f"{place}: the last turn is the {messages[-1]['role']}'s, so that there is nothing to answer. End the "
                "dialogue with a turn of the user's"
            )
        yield number, messages


def _lines(path: Path) -> Iterator[Row]:
    for line, text in text_lines(path):
        if text.strip():
            yield line, {"turns": text.rstrip("\r\n").split("\t")}


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Dialogues in every format, and the error and location of every invalid one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.schema import Data
from dtrain.data.dialogues import FORMAT_SAMPLE_LINES, dialogue_row_format, read_prompts
from dtrain.data.sources import load_sources
from dtrain.errors import DataError

HELLO, GOOD, WHERE = "\u4f60 \u597d", "\u597d \uff01", "\u5728 \u54ea \uff1f"


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(path: Path, *, needs_reply: bool = False, **data: Any) -> list[tuple[int, list[tuple[str, str]]]]:
    """Returns line and (role, content) of each dialogue."""
    settings = Data.model_validate({"path": str(path), **data})
    rows = load_sources(settings, dialogue_row_format(needs_reply=needs_reply))["train"].rows
    return [(row["line"], [(turn["role"], turn["content"]) for turn in row["turns"]]) for row in rows]


# Text files


def test_a_tab_anywhere_in_the_first_lines_makes_each_line_a_dialogue(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", f"{HELLO}\t{GOOD}\r\n\n{WHERE}\t{GOOD}\t{HELLO}\n")

    assert read(file) == [
        (1, [("user", HELLO), ("assistant", GOOD)]),
        (3, [("user", WHERE), ("assistant", GOOD), ("user", HELLO)]),
    ]


def test_without_a_tab_a_blank_line_ends_a_dialogue(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", f"\n{HELLO}\n{GOOD}\n\n  \n{WHERE}\r\n{GOOD}\n{HELLO}")

    assert read(file) == [
        (2, [("user", HELLO), ("assistant", GOOD)]),
        (6, [("user", WHERE), ("assistant", GOOD), ("user", HELLO)]),
    ]


def test_a_tab_after_the_sampled_lines_is_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a\nb\n\n" * (FORMAT_SAMPLE_LINES // 2) + "c\td\ne\n")

    assert read(file)[-1] == (3 * (FORMAT_SAMPLE_LINES // 2) + 1, [("user", "c\td"), ("assistant", "e")])


def test_a_line_with_one_turn_in_a_tab_separated_file_is_refused_naming_a_line_with_a_tab(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "hello\nhi\there\n\nwhere\n")

    with pytest.raises(DataError, match=r"a\.txt, line 1: only one turn \('hello'\).*as on line 2.*tab from line 2"):
        read(file)


@pytest.mark.parametrize(("text", "turn"), [("a\t\tb\n", 2), ("a\tb\t\n", 3), ("\ta\n", 1), ("a\t  \n", 2)])
def test_an_empty_turn_is_refused(tmp_path: Path, text: str, turn: int) -> None:
    file = write(tmp_path / "a.txt", f"hi\tyes\n{text}")

    with pytest.raises(DataError, match=rf"a\.txt, line 2, turn {turn}: an empty turn"):
        read(file)


# JSON and JSONL


def test_a_json_list_of_lists_is_dialogues(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [[HELLO, GOOD], [WHERE, GOOD, HELLO]])

    assert [[text for _, text in turns] for _, turns in read(file)] == [[HELLO, GOOD], [WHERE, GOOD, HELLO]]


def test_a_json_file_with_a_list_for_each_split_is_read_by_their_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"valid": [["a", "b"]], "train": [["c", "d"], ["e", "f"]], "test": [["g"]]})
    data = Data.model_validate({"path": str(file), "splits": {"train": "train", "validation": "valid"}})

    sources = load_sources(data, dialogue_row_format(needs_reply=True))

    assert {split: [row["turns"][0]["content"] for row in source.rows] for split, source in sources.items()} == {
        "train": ["c", "e"],
        "validation": ["a"],
    }
    with pytest.raises(
        DataError, match=r"data.splits names 'dev' in it, but the file holds an object with valid, train"
    ):
        read(file, splits={"train": "dev"})
    with pytest.raises(
        DataError, match=r"no column with a usual name for the turns .*valid, train, test.*data.splits="
    ):
        read(file)


@pytest.mark.parametrize("column", ["turns", "dialog", "conversation", "messages"])
def test_a_dialogue_is_found_by_the_usual_names_of_its_column(tmp_path: Path, column: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"id": 1, column: ["a", "b"]}])

    assert read(file) == [(1, [("user", "a"), ("assistant", "b")])]


def test_messages_have_roles_also_by_their_aliases(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": ""},
        {"from": "human", "value": "a"},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    file = write(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": [{"from": "gpt", "value": "c"}]}])

    assert read(file) == [
        (1, [("system", ""), ("user", "a"), ("assistant", "b")]),
        (2, [("assistant", "c")]),
    ]


def test_data_columns_names_the_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"turns": 7, "talk": ["a", "b"]}])

    assert read(file, columns={"turns": "talk"}) == [(1, [("user", "a"), ("assistant", "b")])]


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "line 2: an empty dialogue: messages has no turns. Every dialogue needs at least one"),
        ("a", "line 2: messages must be a list of turns, such as .*, found 'a'"),
        (None, "line 2: messages must be a list of turns, .*, found None"),
        (
            [USER, {"content": "a"}],
            "line 2, turn 2: a message without role: it needs role and content, and has content",
        ),
        ([{"role": "user"}], "line 2, turn 1: a message without content: it needs role and content, and has role"),
        ([USER, {"role": "boss", "content": "a"}], "turn 2: the role 'boss' is unknown. Expected system, user or ass"),
        ([{"role": 1, "content": "a"}], "line 2, turn 1: the role 1 is unknown"),
        ([{"role": "user", "content": None}], "line 2, turn 1: a turn must be text, found None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"line 2, turn 1: a turn must be text, found \[\{'type'"),
        ([{"role": "user", "content": " "}], "line 2, turn 1: an empty turn"),
        ([{"role": "user", "content": "\ud800"}], "line 2, turn 1: a turn has the character .*half of a surrogate"),
        (["a", 3], "line 2, turn 2: a turn must be text, found 3"),
        (["a", USER], "line 2, turn 2: a turn must be text, found .*role"),
        ([USER, "a"], "line 2, turn 2: expected an object with role and content, like turn 1, found 'a'"),
    ],
)
def test_an_invalid_dialogue_is_named_by_line_and_turn(tmp_path: Path, messages: Any, said: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"messages": [USER]}, {"messages": messages}])

    with pytest.raises(DataError, match=f"{re.escape(str(file))}, {said}" if said.startswith("line") else said):
        read(file)


def test_a_row_without_the_column_of_the_first_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"messages": [USER]}, {"text": "a"}])

    with pytest.raises(DataError, match="line 2: the column 'messages' is missing; the row has text"):
        read(file)


def test_bad_dialogues_can_be_skipped(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"turns": ["a", "b"]}, {"turns": []}, {"turns": ["c", "d"]}])

    assert [line for line, _ in read(file, max_bad_rows=1)] == [1, 3]


@pytest.mark.parametrize("turns", [["a"], [USER], [{"role": "system", "content": "a"}, USER]])
def test_a_dialogue_without_a_reply_is_refused_if_only_replies_are_targets(tmp_path: Path, turns: list[Any]) -> None:
    file = write(tmp_path / "a.jsonl", [{"turns": ["a", "b"]}, {"turns": turns}])

    assert len(read(file)) == 2
    with pytest.raises(DataError, match=r"line 2: a dialogue without a reply .* no targets with task.loss_on=rep"):
        read(file, needs_reply=True)


def test_weights_are_read_and_what_would_not_be_learned_is_refused(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "b"}

    def rows(*, turn: dict[str, Any] | None = None, **columns: Any) -> Path:
        return write(tmp_path / "a.jsonl", [{"messages": [USER, {**reply, **(turn or {})}], **columns}])

    for harmless in (rows(tools=None), rows(tools=[]), rows(turn={"tool_calls": None, "id": 3})):
        assert len(read(harmless)) == 1
    settings = Data.model_validate({"path": str(rows(turn={"weight": 0}))})
    found = load_sources(settings, dialogue_row_format(needs_reply=False))["train"].rows[0]["turns"]
    assert [turn["weight"] for turn in found] == [None, 0]
    with pytest.raises(
        DataError, match=r"line 1: a dialogue without a reply \(2 turn\(s\), the assistant has weight 0\)"
    ):
        read(rows(turn={"weight": 0}), needs_reply=True)
    with pytest.raises(DataError, match=r"line 1, turn 2: weight must be 1 .* or 0 .*, found 0\.5"):
        read(rows(turn={"weight": 0.5}))
    with pytest.raises(
        DataError, match=r"line 1: the row has tools, which would not be learned.*remove the column tools"
    ):
        read(rows(tools=[{"name": "search"}]))
    with pytest.raises(DataError, match=r"line 1, turn 2: the message has tool_calls, which would not be learned"):
        read(rows(turn={"tool_calls": [{"name": "search"}]}))
    with pytest.raises(DataError, match="the message has reasoning_content"):
        read(rows(turn={"reasoning_content": "because"}))


# Prompts


def test_prompts_end_with_the_user_in_every_format(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "hi\n\na\tb\tc\nd\te\n")
    rows = write(
        tmp_path / "a.jsonl",
        [{"prompt": "hi"}, {"turns": ["a", "b", "c"]}, {"turns": ["d", "e"]}, {"messages": [USER]}],
    )

    roles = [(line, [message["role"][0] for message in messages]) for line, messages in read_prompts(text)]
    contents = [[message["content"] for message in messages] for _, messages in read_prompts(text)]

    assert roles == [(1, ["u"]), (3, ["u", "a", "u"]), (4, ["a", "u"])]
    assert contents == [["hi"], ["a", "b", "c"], ["d", "e"]]
    with pytest.raises(DataError, match=r"b\.jsonl has no column with a usual name"):
        list(read_prompts(write(tmp_path / "b.jsonl", [{"prompt": "a"}, {"x": 1}])))
    assert [len(messages) for _, messages in read_prompts(rows)] == [1, 3, 2, 1]


def test_a_prompt_that_ends_with_the_assistant_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"messages": [USER, {"role": "assistant", "content": "b"}]}])

    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the last turn is the assistant's"):
        list(read_prompts(file))

"""YAML and JSON of a user or a stranger: what is too large, too deep or too long is named with its place, at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.config import bounded_json
from dtrain.config.load import load_config
from dtrain.config.yaml_dialect import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_NODES
from dtrain.data.readers import read_rows
from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.models.hub_errors import explain

TASK = "task: {name: causal_lm}\n"

pytestmark = pytest.mark.timeout(20)  # each of these took minutes, or all memory


def bomb(levels: int = 9) -> str:
    """Returns a short text of which each line stands for nine times the line before it."""
    lines = ["l0: &l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


def chain(links: int) -> str:
    """Returns aliases in aliases: two levels of brackets to look at, `links` levels when they are replaced."""
    return "l0: &l0 [1]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}]\n" for n in range(1, links))


FILES = {
    "an alias bomb": (TASK + bomb(), 7, f"there are more than {MAX_NODES:,} values"),
    "an alias bomb of mappings": (
        TASK + bomb().replace("[", "{a: [").replace("]", "]}"),
        7,
        f"there are more than {MAX_NODES:,} values",
    ),
    "aliases in aliases": (TASK + chain(3000), MAX_DEPTH + 1, f"nested more than {MAX_DEPTH} levels deep"),
    "deep lists": (
        TASK + "model:\n  config: " + "[" * 5000 + "]" * 5000,
        3,
        f"nested more than {MAX_DEPTH} levels deep",
    ),
    "deep lists without an end": (TASK + "x: " + "[" * 5000, 2, f"nested more than {MAX_DEPTH} levels deep"),
    "deep mappings": (TASK + "x: " + "{a: " * 900 + "}" * 900, 2, f"nested more than {MAX_DEPTH} levels deep"),
    "deep by indentation": (
        "".join(f"{' ' * depth}a:\n" for depth in range(900)),
        MAX_DEPTH,
        f"nested more than {MAX_DEPTH} levels deep",
    ),
    "an alias in itself": ("task: &again {name: *again}\n", 1, "an alias (*name) contains itself"),
    "digits": (
        TASK + "train:\n  max_steps: " + "9" * 5000,
        3,
        f"train.max_steps is a number of 5,000 characters, where at most {MAX_DIGITS} are read.",
    ),
    "digits of a float": (TASK + "optim:\n  learning_rate: 0." + "9" * 5000, 3, "is a number of 5,002 characters"),
    "digits below a mapping": (
        TASK + "model: {config: {n: [1, " + "9" * 5000 + "]}}",
        2,
        "model.config.n[1] is a number",
    ),
    "tagged digits": (TASK + "run: {seed: !!int '" + "9" * 5000 + "'}", 2, "run.seed is a number of 5,000 characters"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_beyond_a_limit_is_refused_with_its_line_and_the_limit(tmp_path: Path, kind: str) -> None:
    text, line, message = FILES[kind]
    path = tmp_path / "own.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_config(path, [])

    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{path}, line {line}: ")
    assert message in first
    assert len(first) < 300


def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^/dev/zero has more than {MAX_BYTES:,} bytes"):
        load_config(Path("/dev/zero"), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=" + "9" * 5000, "train.max_steps is a number of 5,000 characters"),
        ("model.config=" + "[" * 5000 + "]" * 5000, f"values are nested more than {MAX_DEPTH} levels deep"),
        ("model.config" + ".a" * 5000 + "=1", f"is nested more than {MAX_DEPTH} levels deep"),
        ("model.config={" + bomb().replace("\n", ", ") + "}", f"there are more than {MAX_NODES:,} values"),
    ],
)
def test_an_override_beyond_a_limit_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])

    first = str(caught.value).splitlines()[0]
    assert first.startswith("command line: ")
    assert message in first
    assert len(first) < 300


def test_what_is_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    labels = "".join(f"      {n}: label {n}\n" for n in range(2000))
    shared = "model: {config: {a: &a [1, 2], b: *a, c: [*a, *a]}}\n"
    path.write_text(f"{TASK}{shared}talk: {{system: {'9' * 5000}}}\n")

    config = load_config(path, ["model.from_scratch=true", "model.config.model_type=gpt2"])

    assert config.model.config == {"a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]], "model_type": "gpt2"}
    assert config.talk.system == "9" * 5000
    path.write_text(f"{TASK}model:\n  name_or_path: m\n  config:\n    id2label:\n{labels}")
    assert len(load_config(path, []).model.config["id2label"]) == 2000
    assert load_config(None, ["predict.text=" + "[" * 5000]).predict.text == "[" * 5000


DEEP, DIGITS = "[" * 50_000 + "]" * 50_000, "9" * 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"a":\n {DEEP}}}', "nested more than 100 levels deep: line 2 column 101"),
        ('["[", ' + "[" * 101 + "]" * 102, "nested more than 100 levels deep: line 1 column 106"),
        ('{"a":\n ' + DIGITS + "}", "a number of 5,000 characters, where at most 100 are read: line 2 column 2"),
        ("-" + DIGITS, "a number of 5,001 characters"),
        ("[1,", "Expecting value"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_json_beyond_a_limit_is_one_kind_of_error_with_its_place(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded_json.loads(text)


def test_json_within_the_limits_is_read_as_by_python() -> None:
    for text in (
        "[" * 100 + "]" * 100,
        json.dumps({"a": "[" * 5000, "b": DIGITS, "c": [1, -2, 1.5, None, True]}),
        "9" * 100,
        f"0.{DIGITS}",
    ):
        assert bounded_json.loads(text) == json.loads(text)
        assert bounded_json.loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize("value", [DEEP, DIGITS])
def test_rows_of_a_data_file_beyond_a_limit_are_named_with_file_and_line(tmp_path: Path, value: str) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n{{"text": "b"}}\n')
    table.write_text(f'[{{"text": "a"}},\n{{"text": {value}}}]')

    rows = list(read_rows(lines, delimiter=None, header=None))

    assert [line for line, row in rows if not isinstance(row, DataError)] == [1, 3]
    assert str(rows[1][1]).startswith(f"{lines}, line 2: not JSON: ")
    with pytest.raises(
        DataError, match=rf"^{table}, line 2, column \d+: not JSON: (nested more than 100|a number of 5,000)"
    ):
        list(read_rows(table, delimiter=None, header=None))


@pytest.mark.parametrize("value", [DEEP, DIGITS])
def test_a_model_folder_beyond_a_limit_is_named_with_the_file(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text(f'{{"x": {value}}}')
    raised: list[DtrainError] = []
    try:
        json.loads((tmp_path / "tokenizer_config.json").read_text())
    except (ValueError, RecursionError) as error:
        raised.append(explain(error, name=str(tmp_path), setting="model.name_or_path"))

    assert [error.exit_code for error in raised] == [6]
    assert str(raised[0]).startswith(f"model.name_or_path={tmp_path}: tokenizer_config.json is damaged (")

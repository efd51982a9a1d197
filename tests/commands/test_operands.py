"""Words of the command line that are no settings: the model and what a command does with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.commands.arguments import parse
from dtrain.config.load import load_config
from dtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["evaluate", "runs/x"], ['model.name_or_path="runs/x"']),
        (["predict", "runs/x", "a b"], ['model.name_or_path="runs/x"', 'predict.text="a b"']),
        (["predict", "runs/x", ""], ['model.name_or_path="runs/x"', 'predict.text=""']),
        (["generate", "run.seed=1", "m", "The"], ['model.name_or_path="m"', 'generate.prompt="The"', "run.seed=1"]),
        (["inspect", "m", "A cat = 3."], ['model.name_or_path="m"', 'inspect.text="A cat = 3."']),
        (["export", "runs/lr=1e-4", "out"], ['model.name_or_path="runs/lr=1e-4"', 'export.to="out"']),
        (["chat", "m", "talk.system=x"], ['model.name_or_path="m"', "talk.system=x"]),
        (["download", "m"], ['model.name_or_path="m"']),
        (["evaluate", "model.name_or_path=m"], ["model.name_or_path=m"]),
    ],
)
def test_words_become_settings(argv: list[str], overrides: list[str]) -> None:
    assert parse(argv).overrides == overrides


def test_a_word_too_many_and_a_setting_given_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'b' is one word too many: predict takes model\.name_or_path and predict"):
        parse(["predict", "m", "a", "b"])
    with pytest.raises(ConfigError, match=r"'b' is one word too many: chat takes a model, then settings"):
        parse(["chat", "m", "b"])
    with pytest.raises(ConfigError, match=r"model\.name_or_path is set twice: as 'm' and as model\.name_or_path="):
        parse(["evaluate", "m", "model.name_or_path=n"])


def test_a_file_of_rows_is_not_answered_as_a_text(tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    assert parse(["predict", "m", str(file)]).overrides[1] == f'predict.text="{file}"', "there is no such file"
    file.write_text("text\na\n")

    with pytest.raises(ConfigError, match=r"new\.csv is a file: to answer its rows, write predict\.file=/"):
        parse(["predict", "m", str(file)])


def test_an_empty_text_is_a_text() -> None:
    given = ["task.name=classification", "model.name_or_path=m", "predict.text="]

    assert load_config(None, given, command="predict").predict.text == ""

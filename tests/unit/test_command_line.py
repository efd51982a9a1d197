"""What the command line takes, before anything runs."""

from __future__ import annotations

import pytest

from dtrain.config import load_config
from dtrain.errors import ConfigError
from dtrain.main import parse


def test_short_options_are_the_settings_that_they_stand_for() -> None:
    assert parse(["export", "--merge", "export.to=out"]).overrides == ["export.to=out", "export.merge=true"]
    assert parse(["train.max_steps=3"]).overrides == ["train.max_steps=3"]


@pytest.mark.parametrize("words", [["--text", "a"], ["evaluate", "--text", "a"], ["predict", "--merge"]])
def test_a_short_option_of_another_command_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"belongs to the command (predict|export), not to"):
        parse(words)


@pytest.mark.parametrize(
    "text",
    [
        "a: b # c",
        "null",
        "",
        " ",
        "3",
        "[1",
        "'quoted'",
        '"quoted"',
        "a\nb\tc\\n",
        "---",
        "\u732b\x7f\U0001f408",
        "x" * 9000,
    ],
)
def test_a_text_to_predict_is_that_text_whatever_yaml_makes_of_it(text: str) -> None:
    arguments = parse(["predict", "model.name_or_path=m", "task.name=classification", f"--text={text}"])
    assert load_config(None, arguments.overrides, command="predict").predict.text == text


def test_a_mistyped_command_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"predikt is not a command\. Did you mean predict\?"):
        parse(["predikt"])
    with pytest.raises(ConfigError, match="xyz is not a command: expected one of train, evaluate"):
        parse(["xyz"])

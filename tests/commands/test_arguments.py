"""Parsing of the command line."""

from __future__ import annotations

import pytest

from dtrain.commands.arguments import parse
from dtrain.config.load import load_config
from dtrain.errors import ConfigError


def test_short_options_expand_to_their_settings() -> None:
    assert parse(["export", "--merge", "export.to=out"]).overrides == ["export.to=out", "export.merge=true"]
    assert parse(["train.max_steps=3"]).overrides == ["train.max_steps=3"]


@pytest.mark.parametrize("argv", [["--text", "a"], ["evaluate", "--text", "a"], ["predict", "--merge"]])
def test_a_short_option_of_another_command_is_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"works only with (predict|export), not with"):
        parse(argv)


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
def test_a_text_to_predict_is_not_read_as_yaml(text: str) -> None:
    arguments = parse(["predict", "model.name_or_path=m", "task.name=classification", f"--text={text}"])
    assert load_config(None, arguments.overrides, command="predict").predict.text == text


def test_ranks_and_restarts_are_checked() -> None:
    assert parse(["--ranks", "2", "--max-restarts", "3"]).max_restarts == 3
    assert parse(["evaluate", "--ranks=4", "model.name_or_path=m"]).ranks == 4
    with pytest.raises(ConfigError, match="--max-restarts works only with --ranks"):
        parse(["--max-restarts", "3"])
    for wrong in ("0", "-1", "two"):
        with pytest.raises(ConfigError, match="--ranks"):
            parse(["--ranks", wrong])
    with pytest.raises(ConfigError, match="doctor runs in one process, so --ranks does not work with it"):
        parse(["doctor", "--ranks", "2"])


def test_a_mistyped_command_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"predikt is not a command\. Did you mean predict\?"):
        parse(["predikt"])
    with pytest.raises(ConfigError, match="xyz is not a command: expected one of train, evaluate"):
        parse(["xyz"])


def test_a_mistyped_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^--dryrun is not an option\. Did you mean --dry-run\? See dtrain/main.py"):
        parse(["train.max_steps=3", "--dryrun", "train.seed=1"])
    with pytest.raises(ConfigError, match=r"^--frobnicate is not an option\. See dtrain/main.py --help\.$"):
        parse(["--frobnicate=3"])
    with pytest.raises(ConfigError, match=r"Settings have no dashes: train\.max_steps=3\. See"):
        parse(["--train.max_steps=3"])
    with pytest.raises(ConfigError, match=r"Settings have no dashes: train\.max_steps=VALUE\. See"):
        parse(["--train.max_steps", "3"])

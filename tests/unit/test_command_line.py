"""What the command line takes, before anything runs."""

from __future__ import annotations

import pytest

from dtrain.errors import ConfigError
from dtrain.main import parse


def test_short_options_are_the_settings_that_they_stand_for() -> None:
    assert parse(["predict", "model.name_or_path=m", "--text", "a: b"]).overrides == [
        "model.name_or_path=m",
        "predict.text=a: b",
    ]
    assert parse(["export", "--merge", "export.to=out"]).overrides == ["export.to=out", "export.merge=true"]
    assert parse(["train.max_steps=3"]).overrides == ["train.max_steps=3"]


@pytest.mark.parametrize("words", [["--text", "a"], ["evaluate", "--text", "a"], ["predict", "--merge"]])
def test_a_short_option_of_another_command_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"belongs to the command (predict|export), not to"):
        parse(words)

"""A run that an earlier version began, without the settings of today, goes on as it began."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.config import load
from dtrain.config.load import as_begun, differences, load_config, to_yaml
from dtrain.config.schema import Config
from dtrain.errors import ConfigError
from tests.support import resuming
from tests.support.multirank import run_ranks
from tests.support.resuming import STEPS, weights_and_moments

NAME = "train.sort_by_length"
BASE: dict[str, Any] = {"run": {"name": "test"}, "task": {"name": "causal_lm"}}


def config(**train: Any) -> Config:
    return Config.model_validate({**BASE, "train": train})


def earlier() -> str:
    """A config.yaml without the setting."""
    return re.sub(r"\n +sort_by_length:.*", "", to_yaml(config()))


@pytest.mark.parametrize("old", [earlier(), to_yaml(config(sort_by_length=False))], ids=["earlier", "gone on with"])
def test_what_is_not_named_goes_on_as_it_began(old: str) -> None:
    found = as_begun(old, config())

    assert not found.train.sort_by_length
    assert differences(old, found) == []
    assert as_begun(old, found) == found, "and so does the start after it"


def test_what_is_named_counts_as_a_change_and_a_new_run_keeps_the_default() -> None:
    named = config(sort_by_length=True)
    assert as_begun(earlier(), named) == named
    assert [(c.key, c.old, c.new, c.resume) for c in differences(earlier(), named)] == [
        (NAME, "false", "true", "refuse")
    ]
    assert as_begun(to_yaml(config()), config()).train.sort_by_length
    assert as_begun(None, config()).train.sort_by_length
    assert as_begun("- no config", config()).train.sort_by_length


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("earlier"))


def earlier_life(context: Any, folder: str, name: str, changes: dict[str, Any], death: dict[str, Any]) -> Any:
    """A start of an earlier version: its config.yaml lacks the setting."""
    real = load.dump
    load.dump = lambda values: real(
        {**values, "train": {k: v for k, v in values["train"].items() if k != "sort_by_length"}}
    )  # type: ignore[assignment]
    return resuming.life(context, folder, name, changes, **death)


def life(context: Any, folder: str, name: str, changes: dict[str, Any], death: dict[str, Any]) -> Any:
    try:
        return resuming.life(context, folder, name, changes, **death)
    except ConfigError as error:
        return str(error)


@pytest.mark.ranks
def test_an_earlier_versions_run_ends_with_every_bit_it_would_have_had(folder: Path) -> None:
    old = {NAME: "false"}
    run_ranks(life, 1, str(folder), "plain", old, {})
    run_ranks(life, 1, str(folder), "sorted", {}, {})

    began = run_ranks(earlier_life, 1, str(folder), "earlier", old, {"die_in": 5})[0]
    saved = folder / "runs" / "earlier" / "config.yaml"
    assert "sort_by_length" not in saved.read_text(encoding="utf-8")
    refused = run_ranks(life, 1, str(folder), "earlier", {NAME: "true"}, {})[0]
    again = run_ranks(life, 1, str(folder), "earlier", {}, {"die_in": 9})[0]
    then = run_ranks(life, 1, str(folder), "earlier", {}, {})[0]

    assert (began["ended"], again["ended"], then["ended"]) == ("died", "died", "done")
    assert f"{NAME}: false -> true" in refused
    assert "sort_by_length: false" in saved.read_text(encoding="utf-8")
    assert weights_and_moments(folder, "earlier", STEPS) == weights_and_moments(folder, "plain", STEPS)
    assert weights_and_moments(folder, "sorted", STEPS) != weights_and_moments(folder, "plain", STEPS)
    assert load_config(saved, []).train.sort_by_length is False

"""A hub that does not answer, and names that do not exist: the error, its message, and how quickly it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.config import schema
from dtrain.errors import ConfigError, DataError
from dtrain.models import hub_errors
from dtrain.models.hub_errors import check_reachable, quiet
from dtrain.models.load import pretrained_label_names
from dtrain.models.tokenizer import load_tokenizer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Simulates an unreachable hub: every request fails and is recorded."""
    requests: list[str] = []

    def refuse(url: str, *, timeout: float) -> Any:
        assert timeout <= 10
        requests.append(url)
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(hub_errors, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(hub_errors, "try_to_load_from_cache", lambda name, file: None)
    return requests


def test_an_unreachable_hub_is_contacted_once_and_the_error_names_the_file_and_the_offline_steps(
    asked: list[str],
) -> None:
    with pytest.raises(DataError) as error:
        pretrained_label_names(schema.Model(name_or_path="someone/some-model"))

    assert len(asked) == 1
    command = "dtrain download model.name_or_path=someone/some-model download.to=FOLDER"
    for words in ("someone/some-model/config.json", "nobody is there", command):
        assert words in str(error.value)


@pytest.mark.parametrize("is_set", [False, True])
def test_the_offline_steps_name_the_hubs_variable_if_it_is_not_set(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, is_set: bool
) -> None:
    monkeypatch.setattr(hub_errors.constants, "HF_HUB_OFFLINE", is_set)
    with pytest.raises(DataError) as error:
        pretrained_label_names(schema.Model(name_or_path="someone/some-model"))

    assert ("HF_HUB_OFFLINE=1" in str(error.value)) is not is_set


def test_a_tokenizer_on_a_hub_that_does_not_answer_is_named_by_its_setting(asked: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"model.tokenizer=someone/words: could not get someone/words/tokenizer_config.json"
    ):
        load_tokenizer(schema.Model(tokenizer="someone/words"), training_texts=list)


def test_a_downloaded_model_needs_no_hub(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_errors, "try_to_load_from_cache", lambda name, file: "/cache/config.json")

    assert check_reachable("someone/some-model", file="config.json", setting="model.name_or_path") is True


def test_a_folder_is_never_looked_up_on_the_hub(asked: list[str], tmp_path: Path) -> None:
    assert check_reachable(str(tmp_path), file="config.json", setting="model.name_or_path") is True
    assert asked == []


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/mine", "~/mine", "a/b/c"])
def test_a_missing_path_is_not_looked_up_on_the_hub(asked: list[str], name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        check_reachable(name, file="config.json", setting="model.name_or_path")

    assert asked == []


def test_a_file_and_an_impossible_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()

    with pytest.raises(ConfigError, match="is a file"):
        check_reachable(str(tmp_path / "model.bin"), file="config.json", setting="model.name_or_path")
    with pytest.raises(ConfigError, match="nor a valid name on the hub"):
        check_reachable("two words", file="config.json", setting="model.name_or_path")


def test_quiet_restores_the_log_level_of_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError

    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before

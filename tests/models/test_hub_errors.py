"""A hub that does not answer, and names that nobody has: which error, in which words, how soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.config import schema
from dtrain.errors import ConfigError, DataError
from dtrain.models import hub_errors
from dtrain.models.hub_errors import quiet, reach
from dtrain.models.load import label_names_of
from dtrain.models.tokenizer import load_tokenizer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for a network without a hub: every request fails, and is counted."""
    requests: list[str] = []

    def refuse(url: str, *, timeout: float) -> Any:
        assert timeout <= 10
        requests.append(url)
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(hub_errors, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(hub_errors, "try_to_load_from_cache", lambda name, file: None)
    return requests


def test_a_hub_that_does_not_answer_is_asked_once_and_the_file_and_the_offline_way_are_named(asked: list[str]) -> None:
    with pytest.raises(DataError) as error:
        label_names_of(schema.Model(name_or_path="someone/some-model"))

    assert len(asked) == 1
    command = "dtrain download model.name_or_path=someone/some-model download.to=FOLDER"
    for words in ("someone/some-model/config.json", "nobody is there", command):
        assert words in str(error.value)


@pytest.mark.parametrize("is_set", [False, True])
def test_the_offline_way_names_the_hubs_variable_where_it_is_not_set(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, is_set: bool
) -> None:
    monkeypatch.setattr(hub_errors.constants, "HF_HUB_OFFLINE", is_set)
    with pytest.raises(DataError) as error:
        label_names_of(schema.Model(name_or_path="someone/some-model"))

    assert ("HF_HUB_OFFLINE=1" in str(error.value)) is not is_set


def test_a_tokenizer_on_a_hub_that_does_not_answer_is_named_by_its_setting(asked: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"model.tokenizer=someone/words: could not get someone/words/tokenizer_config.json"
    ):
        load_tokenizer(schema.Model(tokenizer="someone/words"), training_texts=list)


def test_a_downloaded_model_needs_no_hub(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_errors, "try_to_load_from_cache", lambda name, file: "/cache/config.json")

    assert reach("someone/some-model", file="config.json", setting="model.name_or_path") is True


def test_a_folder_is_never_looked_up_on_the_hub(asked: list[str], tmp_path: Path) -> None:
    assert reach(str(tmp_path), file="config.json", setting="model.name_or_path") is True
    assert asked == []


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/mine", "~/mine", "a/b/c"])
def test_a_path_that_is_not_there_is_no_name_for_the_hub(asked: list[str], name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        reach(name, file="config.json", setting="model.name_or_path")

    assert asked == []


def test_a_file_and_an_impossible_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()

    with pytest.raises(ConfigError, match="is a file"):
        reach(str(tmp_path / "model.bin"), file="config.json", setting="model.name_or_path")
    with pytest.raises(ConfigError, match="nor a name that the hub could have"):
        reach("two words", file="config.json", setting="model.name_or_path")


def test_transformers_speaks_again_after_quiet() -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError

    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before

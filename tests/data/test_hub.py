"""Errors if the hub has no such data set, is unreachable, or HF_HUB_OFFLINE is set. No server, no network."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from dtrain.config.schema import Data
from dtrain.data import hub
from dtrain.data.sources import load_sources, source_key
from dtrain.data.tables import LABELED
from dtrain.errors import ConfigError, DataError


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Returns the address of a hub that refuses connections: a port that is reserved but not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield address


def test_an_unreachable_hub_is_named_quickly_with_the_offline_steps(closed_hub: str) -> None:
    begin = time.monotonic()

    for attempt in (source_key, lambda data: load_sources(data, LABELED)):
        with pytest.raises(DataError) as raised:
            attempt(Data(name="tester/tiny-data"))
        for words in (
            "tester/tiny-data",
            closed_hub,
            "refused",
            "dtrain download data.name=tester/tiny-data download.to=FOLDER",
            "data.path=FOLDER",
            "HF_HUB_OFFLINE=1",
        ):
            assert words in str(raised.value)
        assert raised.value.__suppress_context__

    assert time.monotonic() - begin < 5


def test_offline_a_data_set_that_is_not_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    with pytest.raises(DataError, match=r"tester/tiny-data .* is not in the cache, and HF_HUB_OFFLINE is set") as error:
        source_key(Data(name="tester/tiny-data", config="small"))

    assert "dtrain download data.name=tester/tiny-data data.config=small " in str(error.value)
    assert "HF_HUB_OFFLINE=1" not in str(error.value), "it is set"


def test_a_glue_task_without_a_folder_is_loaded_from_the_hub(closed_hub: str) -> None:
    with pytest.raises(DataError, match=r"dtrain download data\.name=nyu-mll/glue data.config=cola "):
        load_sources(Data(name="cola"), LABELED)


def test_a_hub_name_that_is_also_a_local_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews").mkdir()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"data\.path=reviews"):
        hub.load("reviews", None, {})

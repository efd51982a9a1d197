"""The folder that a misspelled path may mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config.near_folder import did_you_mean


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "quickstart" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "notes").write_text("a file\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["run/quickstart", "runs/quikstart", "./run/quickstart", "quickstart", "quikstart"])
def test_a_name_spelled_almost_like_a_run_is_answered_with_it(name: str) -> None:
    assert did_you_mean(name) == " Did you mean runs/quickstart?"


def test_an_absolute_path_too(tmp_path: Path) -> None:
    assert did_you_mean(f"{tmp_path}/run/quickstart") == f" Did you mean {tmp_path}/runs/quickstart?"


@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "gpt2", "runs/note", "", "runs/cola"])
def test_a_name_that_is_near_to_no_folder_gets_no_offer(name: str) -> None:
    assert did_you_mean(name) == ""

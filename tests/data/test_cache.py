"""The cache of prepared data: built once and atomically, and compared between nodes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from dtrain.data.cache import Build, PreparedData, fingerprint, prepare, save_split
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import DataError


class Plan:
    """Counts how often it is called and how often it builds."""

    def __init__(self, texts: list[str], key: str = "k") -> None:
        self.texts = texts
        self.key = key
        self.asked = self.built = 0

    def __call__(self) -> tuple[Mapping[str, Any], Build]:
        self.asked += 1
        return {"key": self.key}, self._build

    def _build(self, folder: Path) -> Mapping[str, Any]:
        self.built += 1
        save_split(folder, "validation", datasets.Dataset.from_dict({"text": self.texts[:1]}))
        save_split(folder, "train", datasets.Dataset.from_dict({"text": self.texts}))
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("v")
        return {"labels": ["x", "y"]}


def prepared(plan: Plan, cache: Path) -> PreparedData:
    return prepare(plan, cache_dir=cache, context=ONE_PROCESS)


def test_a_second_call_opens_what_the_first_one_built(tmp_path: Path) -> None:
    first, plan = prepared(Plan(["a", "b"]), tmp_path), Plan(["a", "b"])

    second = prepared(plan, tmp_path)

    assert (plan.asked, plan.built) == (1, 0)
    assert second.folder == first.folder
    assert second.meta == first.meta
    assert second.meta["labels"] == ["x", "y"]
    assert list(second.splits) == ["train", "validation"]
    assert list(second.splits["train"]["text"]) == ["a", "b"]
    assert (second.folder / "tokenizer" / "vocab.txt").read_text() == "v"
    assert [entry.name for entry in tmp_path.iterdir()] == [first.folder.name]


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    assert prepared(Plan(["a"]), tmp_path).folder != prepared(Plan(["a"], key="other"), tmp_path).folder


@pytest.mark.parametrize("damage", ["meta.json", "train/state.json", "train", "tokenizer/vocab.txt"])
def test_an_incomplete_folder_is_rebuilt_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = prepared(Plan(["a", "b"]), tmp_path).folder
    target = folder / damage
    target.rename(folder.parent / "elsewhere")
    plan = Plan(["a", "b"])

    with caplog.at_level(logging.WARNING, logger="dtrain"):
        again = prepared(plan, tmp_path)

    assert plan.built == 1
    assert list(again.splits["train"]["text"]) == ["a", "b"]
    assert "damaged" in caplog.text
    assert str(folder) in caplog.text


def test_a_truncated_file_is_detected(tmp_path: Path) -> None:
    folder = prepared(Plan(["a", "b"]), tmp_path).folder
    (arrow,) = (folder / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-8])
    plan = Plan(["a", "b"])

    prepared(plan, tmp_path)

    assert plan.built == 1


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(Plan):
        def _build(self, folder: Path) -> Mapping[str, Any]:
            super()._build(folder)
            raise DataError("row 3 is bad")

    with pytest.raises(DataError, match="row 3 is bad"):
        prepared(Failing(["a"]), tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_job_that_was_faster_wins_and_its_folder_is_used(tmp_path: Path) -> None:
    class Slow(Plan):
        def _build(self, folder: Path) -> Mapping[str, Any]:
            prepared(Plan(["a"]), tmp_path)  # the other job, between our check and our publishing
            return super()._build(folder)

    folder = prepared(Slow(["a"]), tmp_path).folder

    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_named_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match=r"file.* cannot be written.*data\.cache_dir"):
        prepared(Plan(["a"]), tmp_path / "file" / "cache")


def test_a_fingerprint_depends_on_the_rows_and_their_order_and_not_on_chunks() -> None:
    rows = datasets.Dataset.from_dict({"ids": [[1, 2], [3], []], "text": ["a", "b", "\u00e4"]})
    parts = datasets.concatenate_datasets([rows.select([0]), rows.select([1, 2])])
    turned = rows.select_columns(["text", "ids"]).with_format("torch")

    assert fingerprint(parts) == fingerprint(turned) == fingerprint(rows)
    assert fingerprint(rows.select([1, 0, 2])) != fingerprint(rows)
    assert fingerprint(rows.select([0, 1])) != fingerprint(rows)
    assert fingerprint(rows.rename_column("text", "words")) != fingerprint(rows)


def test_the_log_has_rows_and_fingerprint_of_each_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dtrain"):
        meta = prepared(Plan(["a", "b"]), tmp_path).meta

    train, validation = (of["fingerprint"][:12] for of in meta["splits"].values())
    assert f"data: train 2 rows {train}, validation 1 rows {validation}" in caplog.text


def test_meta_json_records_what_the_folder_was_built_from(tmp_path: Path) -> None:
    content = json.loads((prepared(Plan(["a"], key="from here"), tmp_path).folder / "meta.json").read_text())

    assert content["key"] == {"key": "from here"}

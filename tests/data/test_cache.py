"""The cache of prepared data: built once and atomically, and compared between nodes."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from dtrain.data.cache import META, Build, PreparedData, _checksum, prepare, save_split
from dtrain.data.fingerprint import fingerprint
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


def flip(file: Path, position: int) -> None:
    """Changes one byte in place: neither size nor modification time tell."""
    before = file.stat()
    with file.open("r+b") as content:
        content.seek(position)
        byte = content.read(1)[0]
        content.seek(position)
        content.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_a_row(folder: Path) -> None:
    (arrow,) = (folder / "train").glob("*.arrow")
    flip(arrow, arrow.read_bytes().index(b"second"))


def flip_a_label(folder: Path) -> None:
    meta = folder / META
    meta.write_text(meta.read_text().replace('"x"', '"z"'))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_row,
        flip_a_label,
        lambda folder: flip(folder / "tokenizer" / "vocab.txt", 0),
        lambda folder: flip(folder / META, (folder / META).read_text().index('"bytes": ') + 9),
    ],
    ids=["a byte of a row", "a label's name", "a byte of the tokenizer", "a size"],
)
def test_content_that_was_changed_in_place_is_moved_aside_and_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    opened = prepared(Plan(["first", "second"]), tmp_path)
    damage(opened.folder)
    plan = Plan(["first", "second"])

    again = prepared(plan, tmp_path)

    assert plan.built == 1
    assert list(again.splits["train"]["text"]) == ["first", "second"]
    assert again.meta["labels"] == ["x", "y"]
    assert "the cache is damaged and will be rebuilt" in caplog.text
    assert len(list(tmp_path.glob("*-damaged-*"))) == 1
    assert len(opened.splits["train"]["text"]) == 2, "another job may still use the damaged folder"


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / META).read_text())
    change(content)
    (folder / META).write_text(json.dumps({**content, "checksum": _checksum(content)}))


def lists(name: str) -> Callable[[Path], None]:
    return lambda folder: forged(folder, lambda content: content["files"].update({name: {"bytes": 0, "sha256": ""}}))


def renames_split(name: str) -> Callable[[Path], None]:
    def rename(content: dict[str, Any]) -> None:
        splits = content["meta"]["splits"]
        splits[name] = splits.pop("train")

    return lambda folder: forged(folder, rename)


def replaced_by_a_pipe(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def with_wild_offsets(folder: Path) -> None:
    (file,) = (folder / "train").glob("*.arrow")
    offsets = struct.pack("<iii", 0, 5, 11)
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, struct.pack("<iii", 0, 5, 2**31 - 1)))


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lists("/dev/zero"), "meta.json lists '/dev/zero', which is not in the folder"),
        (lists("../other"), "meta.json lists '../other', which is not in the folder"),
        (renames_split("../train"), "meta.json lists the split '../train', which is not in the folder"),
        (replaced_by_a_pipe("meta.json"), "meta.json is missing"),
        (replaced_by_a_pipe("tokenizer/vocab.txt"), "tokenizer/vocab.txt is missing or has another size"),
        (with_wild_offsets, "its rows cannot be read"),
    ],
    ids=["device", "outside", "split", "pipe", "pipe inside", "offsets"],
)
def test_a_cache_that_another_user_forged_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forge: Callable[[Path], None], message: str
) -> None:
    forge(prepared(Plan(["five5", "sixsix"]), tmp_path).folder)
    plan = Plan(["five5", "sixsix"])

    with caplog.at_level(logging.WARNING, logger="dtrain"):
        again = prepared(plan, tmp_path)

    assert message in caplog.text
    assert plan.built == 1
    assert list(again.splits["train"]["text"]) == ["five5", "sixsix"]


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    folder = prepared(Plan(["a"]), tmp_path).folder
    state = folder / "train" / "state.json"
    state.unlink()
    state.symlink_to(state)  # opening it is an OSError that says nothing about the content
    plan = Plan(["a"])

    with pytest.raises(
        DataError, match=r"cannot be read: Too many levels.*left as it is.*data\.cache_dir=~/dtrain-cache"
    ):
        prepared(plan, tmp_path)
    assert plan.built == 0
    assert state.is_symlink()


@pytest.mark.parametrize("is_link", [True, False])
@pytest.mark.parametrize("is_entry", [True, False])
def test_a_link_to_nothing_or_a_file_in_the_place_of_a_folder_is_named(
    tmp_path: Path, *, is_link: bool, is_entry: bool
) -> None:
    cache = tmp_path / "cache"
    folder = prepared(Plan(["a"]), cache).folder
    place = folder if is_entry else cache
    place.rename(tmp_path / "moved")
    if is_link:
        place.symlink_to("nothing")
    else:
        place.write_text("mine")

    found = "a symbolic link to nothing, which is not a folder" if is_link else "a file, which is not a folder"
    with pytest.raises(DataError, match=rf"cannot use {place}: it is {found}.*\(rm {place}\)"):
        prepared(Plan(["a"]), cache)
    assert place.is_symlink() == is_link


@pytest.mark.parametrize(("shared", "file_mode"), [(0o755, 0o644), (0o2775, 0o664), (0o700, 0o600)])
def test_who_may_read_the_folder_of_caches_may_read_a_cache(tmp_path: Path, shared: int, file_mode: int) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(shared)
    before = os.umask(0o077)
    try:
        folder = prepared(Plan(["a"]), cache).folder
    finally:
        os.umask(before)

    modes = {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}
    folders = {file.stat().st_mode & 0o777 for file in [folder, *folder.rglob("*")] if file.is_dir()}
    assert (modes, folders) == ({file_mode}, {shared & 0o777})


def test_an_error_that_is_not_of_the_cache_is_not_blamed_on_it(tmp_path: Path) -> None:
    class Failing(Plan):
        def _build(self, folder: Path) -> Mapping[str, Any]:
            (tmp_path / "elsewhere").read_text()
            return {}

    with pytest.raises(FileNotFoundError):
        prepared(Failing(["a"]), tmp_path / "cache")


ROWS = {
    "ids": [[1, 2], [3], [], None],
    "text": ["a", "b", "\u00e4", None],
    "flag": [True, False, None, True],
    "number": [1.5, None, float("nan"), 0.0],
    "turns": [[{"from": "x", "weight": 1}], [], None, [{"from": "y", "weight": 0}, {"from": None, "weight": 2}]],
}


def test_a_fingerprint_depends_on_the_rows_and_their_order_and_not_on_chunks() -> None:
    rows = datasets.Dataset.from_dict(ROWS)
    parts = datasets.concatenate_datasets([rows.select([0]), rows.select([1, 2]), rows.select([3])])
    turned = rows.select_columns(list(ROWS)[::-1]).with_format("torch")
    longer = datasets.concatenate_datasets([rows, rows, rows])

    assert fingerprint(parts) == fingerprint(turned) == fingerprint(rows)
    assert fingerprint(longer.select(range(4, 8))) == fingerprint(longer.select([8, 9, 10, 11])) == fingerprint(rows)
    assert fingerprint(rows.select([1, 0, 2, 3])) != fingerprint(rows)
    assert fingerprint(rows.select([0, 1])) != fingerprint(rows)
    assert fingerprint(rows.rename_column("text", "words")) != fingerprint(rows)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("ids", [[1], [2, 3], [], None]),
        ("ids", [[1, 2], [3], None, []]),
        ("ids", [[1, 2], [4], [], None]),
        ("text", ["ab", "", "\u00e4", None]),
        ("text", ["a", "b", None, "\u00e4"]),
        ("flag", [True, None, False, True]),
        ("number", [1.5, float("nan"), None, 0.0]),
        ("turns", [[{"from": "x", "weight": 1}], None, [], [{"from": "y", "weight": 0}, {"from": None, "weight": 2}]]),
        ("turns", [[{"from": "x", "weight": 1}], [], None, [{"from": "y", "weight": 0}, {"from": None, "weight": 3}]]),
    ],
)
def test_a_fingerprint_sees_every_value_its_place_and_its_absence(column: str, values: list[Any]) -> None:
    features = datasets.Dataset.from_dict(ROWS).features

    changed = datasets.Dataset.from_dict({**ROWS, column: values}, features=features)

    assert fingerprint(changed) != fingerprint(datasets.Dataset.from_dict(ROWS, features=features))


def test_the_log_has_rows_and_fingerprint_of_each_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dtrain"):
        meta = prepared(Plan(["a", "b"]), tmp_path).meta

    train, validation = (of["fingerprint"][:12] for of in meta["splits"].values())
    assert f"data: train 2 rows {train}, validation 1 rows {validation}" in caplog.text


def test_meta_json_records_what_the_folder_was_built_from(tmp_path: Path) -> None:
    content = json.loads((prepared(Plan(["a"], key="from here"), tmp_path).folder / "meta.json").read_text())

    assert content["key"] == {"key": "from here"}

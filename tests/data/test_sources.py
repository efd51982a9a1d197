"""Splits from files, folders, save_to_disk and Python itself; cuts and limits; labels; and errors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import datasets
import pytest

from dtrain.config.schema import Data
from dtrain.data.sources import Source, label_names, load_sources, source_key
from dtrain.data.tables import LABELED, TEXT, RowFormat
from dtrain.errors import ConfigError, DataError


def load(shape: RowFormat = LABELED, **settings: Any) -> dict[str, Source]:
    return load_sources(Data(**settings), shape)


def texts(source: Source) -> list[str]:
    return list(source.rows["text"])


def csv_folder(folder: Path) -> Path:
    (folder / "train.csv").write_text("sentence,label\na,x\nb,y\nc,x\n")
    (folder / "dev.csv").write_text("sentence,label\nd,y\n")
    return folder


# Which file is which split


def test_a_folder_has_train_and_validation_by_their_usual_names(tmp_path: Path) -> None:
    sources = load(path=csv_folder(tmp_path))

    assert list(sources) == ["train", "validation"]
    assert sources["train"].rows[1] == {"text": "b", "label": "y", "line": 3}


def test_splits_name_files_and_train_comes_first(tmp_path: Path) -> None:
    csv_folder(tmp_path)

    sources = load(path=tmp_path, splits={"validation": "dev.csv", "test_two": "dev.csv", "train": "train.csv"})

    assert list(sources) == ["train", "validation", "test_two"]


def test_one_file_is_the_training_split_alone(tmp_path: Path) -> None:
    assert list(load(path=csv_folder(tmp_path) / "train.csv")) == ["train"]


@pytest.mark.parametrize("divided", [True, False])
def test_a_folder_of_save_to_disk_keeps_its_class_names_and_their_order(tmp_path: Path, divided: bool) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"text": ["p", "q"], "label": [1, 0]}, features=features)
    whole = datasets.DatasetDict({"train": rows, "validation": rows, "test": rows}) if divided else rows
    whole.save_to_disk(str(tmp_path / "saved"))

    sources = load(path=tmp_path / "saved")

    assert list(sources) == (["train", "validation"] if divided else ["train"])
    assert sources["train"].rows["label"] == ["a", "z"]
    assert label_names(sources) == ("z", "a")


def test_rows_of_save_to_disk_that_point_outside_of_their_file_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["the dog", "a cat"], "label": ["x", "y"]}).save_to_disk(
        str(tmp_path / "saved")
    )
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    offsets = struct.pack("<iii", 0, 7, 12)
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, struct.pack("<iii", 0, 7, 2**31 - 1)))

    with pytest.raises(DataError, match=r"cannot be loaded: .*offsets"):
        load(path=tmp_path / "saved")


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_single_file_of_the_datasets_library_keeps_its_class_names(tmp_path: Path, suffix: str) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"text": ["p", "q"], "label": [1, 0]}, features=features)
    file = tmp_path / f"train.{suffix}"
    if suffix == "arrow":
        rows.save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    else:
        rows.to_parquet(str(file))

    alone, beside = load(path=file)["train"], load(path=tmp_path)["train"]

    for source in (alone, beside):
        assert (source.rows["label"][:], source.label_names, source.unit) == (["a", "z"], ("z", "a"), "row")


def test_splits_of_a_saved_folder_can_be_swapped(tmp_path: Path) -> None:
    rows = {split: datasets.Dataset.from_dict({"text": [split], "label": ["x"]}) for split in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "saved"))

    sources = load(path=tmp_path / "saved", splits={"train": "test", "validation": "train"})

    assert [texts(source) for source in sources.values()] == [["test"], ["train"]]
    with pytest.raises(DataError, match=r"no split 'tset', .* Its splits: train, test"):
        load(path=tmp_path / "saved", splits={"train": "tset"})


def test_a_class_number_of_minus_one_means_no_label(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = datasets.Dataset.from_dict({"text": ["p", "q"], "label": [-1, -1]}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))

    assert load(path=tmp_path / "saved", splits={"test": "train"})["test"].rows.column_names == ["text", "line"]
    with pytest.raises(DataError, match=r"saved \(train\), row 1: no label"):
        load(path=tmp_path / "saved")


def test_a_test_split_has_labels_in_all_rows_or_in_none(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"path": tmp_path, "splits": {"test": "a.jsonl"}}
    rows = [json.dumps({"text": "p", "label": label}) for label in (1, None)]

    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: no label"):
        load(**settings)
    (tmp_path / "a.jsonl").write_text("\n".join(reversed(rows)))
    assert load(**settings)["test"].rows.column_names == ["text", "line"]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"path": "nowhere"}, DataError, r"data\.path=.*nowhere does not exist\. In .*: other\.csv\. Expected: a file"),
        ({"path": "nowhere", "name": "cola"}, DataError, r"nowhere does not exist.* train\.tsv and dev\.tsv"),
        ({"path": "", "splits": {"train": "no.csv"}}, DataError, r"no\.csv is missing: .* In .*: other\.csv"),
        ({"path": ""}, DataError, r"holds no train\{.*In .*: other\.csv.*data\.splits='\{train"),
        ({"path": "other.csv", "splits": {"train": "a.csv"}}, DataError, "is one file"),
        ({"path": "other.csv", "name": "python_docs"}, ConfigError, r"data\.name=null"),
        ({"path": "other.csv", "name": "some/name"}, ConfigError, "only the files of GLUE tasks"),
        ({}, ConfigError, r"set data\.name .* or data\.path"),
    ],
)
def test_a_missing_source_is_named_with_what_is_expected(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    (tmp_path / "other.csv").write_text("text\na\n")
    if "path" in settings:
        settings = {**settings, "path": tmp_path / settings["path"]}

    for attempt in (lambda: load(**settings), lambda: source_key(Data(**settings))):
        with pytest.raises(error, match=said):
            attempt()


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    (csv_folder(tmp_path) / "train.jsonl").write_text("{}")

    with pytest.raises(DataError, match=r"train\.csv and train\.jsonl: which one is the split train\?"):
        load(path=tmp_path)


# Bad rows


def test_as_many_bad_rows_as_allowed_are_skipped_each_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "p", "label": "x"}\n{"text": 3, "label": "x"}\n{\n{"text": "q", "label": "y"}'
    )

    source = load(path=tmp_path / "a.jsonl", max_bad_rows=2)["train"]

    assert (texts(source), list(source.rows["line"]), source.skipped) == (["p", "q"], [1, 4], 2)
    assert "a.jsonl, line 2: text must be text, found 3" in caplog.text
    assert "a.jsonl, line 3: not JSON" in caplog.text
    with pytest.raises(DataError, match=r"line 3: not JSON.*\(data\.max_bad_rows=1 were skipped before it\)"):
        load(path=tmp_path / "a.jsonl", max_bad_rows=1)


def test_a_split_of_bad_rows_only_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n{")

    with pytest.raises(DataError, match=r"a\.jsonl has no rows"):
        load(path=tmp_path / "a.jsonl", max_bad_rows=9)


# TextColumns


@pytest.mark.parametrize(
    ("header", "columns", "row"),
    [
        ("id,sentence1,sentence2,label", {}, {"text": "p", "text_pair": "q", "label": "r"}),
        ("id,question,passage,label", {}, {"text": "p", "text_pair": "q", "label": "r"}),
        ("id,text,note,label", {}, {"text": "p", "label": "r"}),
        ("id,note,review,sentiment", {}, {"text": "q", "label": "r"}),
        ("id,a,b,c", {"text": "a", "label": "c"}, {"text": "p", "label": "r"}),
        ("id,a,b,label", {"text": "a", "text_pair": "b"}, {"text": "p", "text_pair": "q", "label": "r"}),
        ("id,sentence1,sentence2,label", {"text": "sentence1"}, {"text": "p", "label": "r"}),
        ("text,sentence1,sentence2,label", {"text_pair": "sentence1"}, {"text": "0", "text_pair": "p", "label": "r"}),
        ("id,text,review,label", {"text_pair": "text"}, {"text": "q", "text_pair": "p", "label": "r"}),
    ],
)
def test_columns_are_found_by_usual_names_unless_the_config_names_them(
    tmp_path: Path, header: str, columns: dict[str, str], row: dict[str, str]
) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n0,p,q,r\n")

    assert load(path=tmp_path / "a.csv", columns=columns)["train"].rows[0] == {**row, "line": 2}


@pytest.mark.parametrize(
    ("columns", "error", "said"),
    [
        ({}, DataError, r"a\.csv has no column with a usual name for text .* Its columns: foo, bar"),
        ({"text": "foo"}, DataError, r"usual name for the label .* Its columns: foo, bar"),
        ({"text": "fooo"}, DataError, r"no column 'fooo', which data\.columns\.text names\. Its columns: foo, bar"),
        ({"texts": "foo"}, ConfigError, r"data\.columns\.texts .*text, text_pair and label"),
    ],
)
def test_columns_that_cannot_be_found_are_listed(
    tmp_path: Path, columns: dict[str, str], error: type[Exception], said: str
) -> None:
    (tmp_path / "a.csv").write_text("foo,bar\n1,2\n")

    with pytest.raises(error, match=said):
        load(path=tmp_path / "a.csv", columns=columns)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"text": "b"}, r"a\.jsonl, line 2: the column 'label' is missing; the row has text"),
        ({"label": 1}, r"line 2: the column 'text' is missing"),
        ({"text": None, "label": 1}, r"line 2: text must be text, found None"),
        ({"text": "b", "label": None}, r"line 2: no label"),
        ({"text": "b", "label": [1]}, r"line 2: a label is a name or a number"),
        ({"text": "\ud800", "label": 1}, r"line 2: text has the character"),
    ],
)
def test_an_incomplete_row_is_named_by_line(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a", "label": 0}) + "\n" + json.dumps(second) + "\n")

    with pytest.raises(DataError, match=said):
        load(path=file)


# Labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["b", "a", "10"], ("10", "a", "b")),
        (["1.5", "-1", "0"], ("-1", "0", "1.5")),
    ],
)
def test_label_names_are_the_training_labels_sorted_numbers_by_value(
    tmp_path: Path, labels: list[str], expected: tuple[str, ...]
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))

    assert label_names(load(path=tmp_path / "a.csv")) == expected


def test_an_evaluation_label_that_training_lacks_is_named_by_file_and_line_with_the_known_labels(
    tmp_path: Path,
) -> None:
    csv_folder(tmp_path)
    (tmp_path / "dev.csv").write_text("sentence,label\nd,y\ne,seven\n")

    with pytest.raises(DataError, match=r"dev\.csv, line 3: 'seven' is not one of the known labels: x, y"):
        label_names(load(path=tmp_path))


def test_labels_need_a_train_split_or_a_source_that_defines_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train split"):
        label_names(load(path=csv_folder(tmp_path), splits={"validation": "dev.csv"}))


# Text, limit and fraction


def test_a_text_file_is_one_row_with_all_its_characters(tmp_path: Path) -> None:
    content = " a\r\n\n\u2028b\x0b \n"
    (tmp_path / "a.txt").write_bytes(content.encode())

    assert [dict(row) for row in load(TEXT, path=tmp_path / "a.txt")["train"].rows] == [{"text": content, "line": 1}]


def test_text_is_cut_by_characters_and_limited_by_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0\n2\n4\n6\n8\n")

    halves = load(TEXT, path=tmp_path / "a.txt", validation_fraction=0.3)
    limited = load(TEXT, path=tmp_path / "a.txt", validation_fraction=0.3, limit=2)

    assert (texts(halves["train"]), texts(halves["validation"])) == (["0\n2\n4\n6"], ["\n8\n"])
    assert halves["validation"].rows["line"] == [4]
    assert (texts(limited["train"]), texts(limited["validation"])) == (["0\n2\n"], ["\n8\n"])


def test_a_table_can_be_cut_at_its_end_and_then_limited(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{k},x\n" for k in range(10)))
    end: dict[str, Any] = {"path": tmp_path / "a.csv", "validation_fraction": 0.25, "split": "end"}

    halves = load(**end)
    limited = load(**end, limit=2)

    assert (texts(halves["train"]), texts(halves["validation"])) == (list("0123456"), list("789"))
    assert (texts(limited["train"]), texts(limited["validation"])) == (list("01"), list("78"))


def test_a_limit_can_keep_the_first_rows_and_read_no_further(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\nbroken\n")

    assert texts(load(path=tmp_path / "a.csv", limit=2, split="end")["train"]) == ["a", "b"]
    assert texts(load(path=tmp_path / "a.csv", limit=1, split="end")["train"]) == ["a"]


def test_a_validation_fraction_is_refused_with_a_validation_split_or_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction=0\.5 .*train, validation"):
        load(path=csv_folder(tmp_path), validation_fraction=0.5)
    with pytest.raises(DataError, match="1 rows"):
        load(path=tmp_path / "dev.csv", validation_fraction=0.5)


def test_the_same_rows_come_from_memory_and_from_scratch_files(tmp_path: Path) -> None:
    data = Data(path=csv_folder(tmp_path), limit=2)
    (tmp_path / "scratch").mkdir()

    in_memory = load_sources(data, LABELED)
    on_disk = load_sources(data, LABELED, scratch=tmp_path / "scratch")

    assert [list(s.rows) for s in in_memory.values()] == [list(s.rows) for s in on_disk.values()]
    assert on_disk["train"].rows.cache_files[0]["filename"].startswith(str(tmp_path / "scratch"))


def test_more_rows_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{k},{k % 3}\n" for k in range(2345)))

    rows = load(path=tmp_path / "a.csv")["train"].rows

    assert list(rows["text"]) == [str(k) for k in range(2345)]
    assert list(rows["line"]) == list(range(2, 2347))


def test_pythons_documentation_is_always_available() -> None:
    sources = load(TEXT, name="python_docs", validation_fraction=0.1)

    ((train,), (validation,)) = (texts(source) for source in sources.values())
    assert len(train) > 100_000
    assert len(validation) == pytest.approx(len(train) / 9, abs=1)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_text_is_an_empty_split(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)

    with pytest.raises(DataError, match=r"a\.txt: the split train is empty"):
        load(TEXT, path=tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("content", ["", "text\n"])
def test_a_file_without_rows_is_an_empty_split(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text("" if name == "a.jsonl" else content)

    with pytest.raises(DataError, match=rf"{name} has no rows"):
        load(TEXT, path=tmp_path / name)


def test_plain_text_is_refused_for_a_task_with_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")

    with pytest.raises(ConfigError, match=r"a\.txt is plain text without labels"):
        load(path=tmp_path / "a.txt")


def test_text_can_be_taken_from_a_table_with_labels(tmp_path: Path) -> None:
    assert load(TEXT, path=csv_folder(tmp_path))["train"].rows.column_names == ["text", "line"]


# Identity


def test_a_key_depends_on_content_and_settings_and_not_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    key = source_key(Data(path=csv_folder(tmp_path / "one")))

    assert source_key(Data(path=csv_folder(tmp_path / "two"))) == key
    assert str(tmp_path) not in json.dumps(key)
    assert source_key(Data(path=tmp_path / "one", limit=1)) != key
    assert source_key(Data(path=tmp_path / "one", splits={"train": "train.csv", "validation": "train.csv"})) != key
    (tmp_path / "two" / "dev.csv").write_text("sentence,label\nd,x\n")
    assert source_key(Data(path=tmp_path / "two")) != key


def test_using_a_saved_folder_does_not_change_its_key(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["p"], "label": ["x"]}).save_to_disk(str(tmp_path / "saved"))
    key = source_key(Data(path=tmp_path / "saved"))

    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"n": 1})

    assert list((tmp_path / "saved").glob("cache-*"))
    assert source_key(Data(path=tmp_path / "saved")) == key

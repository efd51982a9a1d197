"""The quirks of the GLUE files, each on a file of a few lines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from dtrain.config.schema import Data
from dtrain.data.glue import TASKS, submission_lines
from dtrain.data.scores import SCORED
from dtrain.data.sources import label_names, load_sources
from dtrain.data.tables import LABELED
from dtrain.errors import ConfigError, DataError

HEADERS = {
    "cola": None,
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
MNLI_COLUMNS = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
)
MNLI_TRAIN = [*MNLI_COLUMNS.split(), "sentence1", "sentence2", "label1", "gold_label"]
MNLI_DEV = [*MNLI_TRAIN[:-1], "label2", "label3", "label4", "label5", "gold_label"]


def write(folder: Path, **lines: list[str]) -> Path:
    for name, content in lines.items():
        (folder / f"{name}.tsv").write_bytes(("\n".join(content) + "\n").encode())
    return folder


def read(folder: Path, name: str, split: str = "train", **settings: Any) -> list[dict[str, Any]]:
    rows = load_sources(Data(name=name, path=folder, **settings), LABELED)[split].rows
    return [dict(row) for row in rows]


def test_cola_has_no_header_so_its_first_line_is_a_row_and_an_empty_third_column_counts(tmp_path: Path) -> None:
    folder = write(tmp_path, train=["gj04\t1\t\tA cat.", "gj04\t0\t*\tCat a."], dev=["x\t1\t\tB."])

    assert read(folder, "cola") == [
        {"text": "A cat.", "label": "acceptable", "line": 1},
        {"text": "Cat a.", "label": "unacceptable", "line": 2},
    ]


def test_a_test_file_has_a_header_and_no_labels_also_for_cola(tmp_path: Path) -> None:
    folder = write(tmp_path, train=["x\t1\t\tA."], dev=["x\t1\t\tB."], test=["index\tsentence", "0\tC.", "1\tD."])

    rows = read(folder, "cola", "test", splits={"train": "train.tsv", "test": "test.tsv"})

    assert rows == [{"text": "C.", "line": 2}, {"text": "D.", "line": 3}]


def test_a_test_file_is_not_read_unless_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, train=["x\t1\t\tA."], dev=["x\t1\t\tB."], test=["index\tsentence"])

    assert list(load_sources(Data(name="cola", path=folder), LABELED)) == ["train", "validation"]


@pytest.mark.parametrize(
    ("name", "row", "text", "pair", "label"),
    [
        ("sst2", 'a "b \t1', 'a "b ', None, "positive"),
        ("mrpc", "1\t7\t8\tone\ttwo", "one", "two", "equivalent"),
        ("qqp", '0\t1\t2\t"one\ttwo"\t0', '"one', 'two"', "not_duplicate"),
        ("qnli", "0\tone\ttwo\tnot_entailment", "one", "two", "not_entailment"),
        ("rte", "0\tone\ttwo\tentailment", "one", "two", "entailment"),
        ("wnli", "0\tone\ttwo\t1", "one", "two", "entailment"),
    ],
)
def test_texts_and_labels_come_from_the_tasks_columns_with_the_hubs_names(
    tmp_path: Path, name: str, row: str, text: str, pair: str | None, label: str
) -> None:
    folder = write(tmp_path, train=[str(HEADERS[name]), row + "\r"], dev=[str(HEADERS[name]), row])

    expected = {"text": text, **({"text_pair": pair} if pair else {}), "label": label, "line": 2}
    assert read(folder, name) == [expected]
    assert read(folder, name, "validation") == [expected]


def test_mnli_finds_its_label_in_train_and_dev_files_of_different_width(tmp_path: Path) -> None:
    train = ["x"] * 8 + ["one", "two", "neutral", "contradiction"]
    dev = ["x"] * 8 + ["three", "four", "neutral", "neutral", "neutral", "neutral", "neutral", "entailment"]
    lines = ["\t".join(MNLI_DEV), "\t".join(dev)]
    folder = write(tmp_path, train=["\t".join(MNLI_TRAIN), "\t".join(train)], dev_matched=lines, dev_mismatched=lines)

    sources = load_sources(Data(name="mnli", path=folder), LABELED)

    assert list(sources) == ["train", "validation", "validation_mismatched"]
    assert sources["train"].rows[0] == {"text": "one", "text_pair": "two", "label": "contradiction", "line": 2}
    assert sources["validation_mismatched"].rows[0]["label"] == "entailment"
    assert label_names(sources) == ("entailment", "neutral", "contradiction")


def test_label_names_come_from_the_task_in_the_hubs_order_even_if_no_row_has_them(tmp_path: Path) -> None:
    folder = write(tmp_path, train=["x\t1\t\tA."], dev=["x\t1\t\tB."])

    assert label_names(load_sources(Data(name="cola", path=folder), LABELED)) == ("unacceptable", "acceptable")


STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]


def test_stsb_has_scores_for_labels_and_keeps_their_digits(tmp_path: Path) -> None:
    rows = [["0", "main", "f", "2012", "1", "a", "b", "one", "two", score] for score in ("3.800", "0.000", "5")]
    lines = ["\t".join(row) for row in (STSB, *rows)]
    folder = write(tmp_path, train=lines, dev=lines)

    source = load_sources(Data(name="stsb", path=folder), SCORED)["train"]

    assert source.rows[0] == {"text": "one", "text_pair": "two", "label": 3.8, "line": 2}
    assert source.rows["label"] == [3.8, 0.0, 5.0]
    assert source.label_names is None


def test_an_invalid_stsb_score_is_named_by_file_and_line(tmp_path: Path) -> None:
    row = ["0", "main", "f", "2012", "1", "a", "b", "one", "two"]
    lines = ["\t".join(fields) for fields in (STSB, [*row, "1.0"], [*row, "alike"])]
    folder = write(tmp_path, train=lines, dev=lines)

    with pytest.raises(DataError, match=r"train\.tsv, line 3: the label 'alike' is not a finite number"):
        load_sources(Data(name="stsb", path=folder), SCORED)


# Test files: no labels, a header in every task


TESTS = {
    "cola": ("index sentence", "0|one"),
    "sst2": ("index sentence", "0|one"),
    "mrpc": ("index|#1 ID|#2 ID|#1 String|#2 String", "0|7|8|one|two"),
    "qqp": ("id question1 question2", "0|one|two"),
    "mnli": (f"{MNLI_COLUMNS} sentence1 sentence2", "0|1|2|g|(b)|(b)|(p)|(p)|one|two"),
    "qnli": ("index question sentence", "0|one|two"),
    "rte": ("index sentence1 sentence2", "0|one|two"),
    "wnli": ("index sentence1 sentence2", "0|one|two"),
    "stsb": (" ".join(STSB[:-1]), "0|main|f|2012|1|a|b|one|two"),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_test_files_of_every_task_give_its_texts_and_no_label(tmp_path: Path, name: str) -> None:
    header, row = TESTS[name]
    task = TASKS[name]
    lines = [header.replace("|" if "|" in header else " ", "\t"), row.replace("|", "\t")]
    folder = write(tmp_path, **{file.removesuffix(".tsv"): lines for file in task.test_files.values()})

    shape = LABELED if task.labels else SCORED
    sources = load_sources(Data(name=name, path=folder, splits=dict(task.test_files)), shape)

    assert set(sources) == set(task.submission)
    for source in sources.values():
        pair = {"text_pair": "two"} if len(task.texts) == 2 else {}
        assert [dict(read_row) for read_row in source.rows] == [{"text": "one", **pair, "line": 2}]
        assert source.label_names == (tuple(task.labels.values()) or None)  # known without a row that has one


def test_a_malformed_row_of_a_test_file_is_an_error_because_skipping_would_shift_later_answers(tmp_path: Path) -> None:
    folder = write(tmp_path, test=["id\tquestion1\tquestion2", *["0\ta\tb"] * 2000, "1\tcut off"])

    with pytest.raises(DataError, match=r"test\.tsv, line 2002: 2 columns where this file has 3"):
        load_sources(Data(name="qqp", path=folder, splits={"test": "test.tsv"}), LABELED)


@pytest.mark.parametrize(("name", "label"), [("stsb", -1.0), ("rte", -1)])
def test_minus_one_in_the_hubs_test_splits_means_no_label(tmp_path: Path, name: str, label: float) -> None:
    columns: dict[str, Any] = {"sentence1": ["one"], "sentence2": ["two"], "label": [label], "idx": [0]}
    rows = datasets.Dataset.from_dict(columns)
    if name == "rte":
        rows = rows.cast_column("label", datasets.ClassLabel(names=["entailment", "not_entailment"]))
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path))

    shape = SCORED if name == "stsb" else LABELED
    source = load_sources(Data(name=name, path=tmp_path, splits={"test": "test"}), shape)["test"]

    assert source.rows[0] == {"text": "one", "text_pair": "two", "line": 1}
    assert source.label_names == (None if name == "stsb" else ("entailment", "not_entailment"))


# What the server takes


@pytest.mark.parametrize(
    ("name", "found", "written"),
    [
        ("cola", ["acceptable", "unacceptable"], ["1", "0"]),
        ("wnli", ["entailment", "not_entailment"], ["1", "0"]),
        ("mrpc", ["equivalent", "not_equivalent"], ["1", "0"]),
        ("qqp", ["duplicate", "not_duplicate"], ["1", "0"]),
        ("sst2", ["negative", "positive"], ["0", "1"]),
        ("mnli", ["neutral", "contradiction", "entailment"], ["neutral", "contradiction", "entailment"]),
        ("qnli", ["not_entailment", "entailment"], ["not_entailment", "entailment"]),
        ("rte", ["not_entailment", "entailment"], ["not_entailment", "entailment"]),
        ("stsb", [3.14159, -0.2, 5.01, 2.0], ["3.142", "0.000", "5.000", "2.000"]),
    ],
)
def test_a_submission_counts_from_0_and_uses_the_labels_of_the_files(
    name: str, found: list[str | float], written: list[str]
) -> None:
    lines = [f"{index}\t{answer}\n" for index, answer in enumerate(written)]

    assert list(submission_lines(TASKS[name], found)) == ["index\tprediction\n", *lines]


def test_a_submission_with_other_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'POSITIVE', which is not a label of this GLUE task \(negative, positive\)"):
        list(submission_lines(TASKS["sst2"], ["POSITIVE"]))


def qqp_lines(rows: int, *malformed: str) -> list[str]:
    return [str(HEADERS["qqp"]), *(f"{k}\t1\t2\tone\ttwo\t1" for k in range(rows)), *malformed]


def test_qqp_skips_and_counts_malformed_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, train=qqp_lines(1999, "7\t1\t2\tcut off"), dev=qqp_lines(1))

    with caplog.at_level(logging.INFO, logger="dtrain"):
        source = load_sources(Data(name="qqp", path=folder), LABELED)["train"]

    assert len(source.rows) == 1999
    assert "train.tsv: skipped 1 of 2000 rows" in caplog.text


def test_qqp_with_more_malformed_rows_than_the_original_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, train=qqp_lines(1997, "7\t1\t2\tcut off", "8", "a\tb\tc\td\te\tf\tg"), dev=qqp_lines(1))

    with pytest.raises(DataError, match=r"train\.tsv: 3 of 2000 rows"):
        load_sources(Data(name="qqp", path=folder), LABELED)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["x\t1\t\tA.", "made\t1"], r"train\.tsv, line 2: 2 columns where this file has 4"),
        (["x\t1\t\tA.", "x\tseven\t\tB."], r"train\.tsv, line 2: 'seven' is not a label.*: 0, 1"),
        ([""], r"train\.tsv has no rows"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, lines: list[str], said: str) -> None:
    folder = write(tmp_path, train=lines, dev=["x\t1\t\tB."])

    with pytest.raises(DataError, match=said):
        load_sources(Data(name="cola", path=folder), LABELED)


def test_a_file_of_another_task_is_detected_by_its_header(tmp_path: Path) -> None:
    folder = write(tmp_path, train=["sentence\tlabel", "a\t1"], dev=["sentence\tlabel", "a\t1"])

    with pytest.raises(DataError, match=r"train\.tsv, line 1: no column 'sentence1' in the header \(sentence, label\)"):
        load_sources(Data(name="rte", path=folder), LABELED)


def test_an_empty_dev_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, train=["x\t1\t\tA."])
    (folder / "dev.tsv").write_bytes(b"")

    with pytest.raises(DataError, match=r"dev\.tsv has no rows"):
        load_sources(Data(name="cola", path=folder), LABELED)


def test_a_missing_dev_file_is_named_with_what_the_folder_holds(tmp_path: Path) -> None:
    folder = write(tmp_path, train=["x\t1\t\tA."])

    with pytest.raises(DataError, match=r"dev\.tsv is missing: .* In .*: train\.tsv"):
        load_sources(Data(name="cola", path=folder), LABELED)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.header has no effect"):
        load_sources(Data(name="cola", path=tmp_path, header=True), LABELED)


def test_every_task_is_in_the_table() -> None:
    assert set(TASKS) == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}


@pytest.mark.data
def test_the_real_cola_has_its_published_numbers_of_rows(real_data: Path) -> None:
    sources = load_sources(Data(name="cola", path=real_data / "CoLA"), LABELED)

    assert [len(source.rows) for source in sources.values()] == [8551, 1043]
    assert sources["train"].rows[0]["text"].startswith("Our friends won't buy this analysis")

"""Pairs of texts from files: languages, columns, their usual names, and the errors of bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dtrain.config.schema import Data
from dtrain.data.sources import load_sources
from dtrain.data.translations import translation_row_format
from dtrain.errors import ConfigError, DataError


def write(folder: Path, rows: list[Any], split: str = "train", suffix: str = "jsonl") -> Path:
    text = "\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows)
    (folder / f"{split}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def pair(english: Any, romanian: Any) -> dict[str, Any]:
    return {"translation": {"en": english, "ro": romanian}}


def read(
    folder: Path, source: str | None = "en", target: str | None = "ro", **data: Any
) -> dict[str, list[dict[str, Any]]]:
    sources = load_sources(Data(path=folder, **data), translation_row_format(source, target))
    return {split: list(found.rows) for split, found in sources.items()}


GOOD = [pair("a cat", "o pisic\u0103"), pair("", "c\u00e2ine")]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_both_languages_of_a_translation_are_read_unchanged(tmp_path: Path, suffix: str) -> None:
    rows = read(write(tmp_path, GOOD, suffix=suffix))["train"]

    assert [(row["source"], row["target"]) for row in rows] == [("a cat", "o pisic\u0103"), ("", "c\u00e2ine")]
    assert [row["line"] for row in rows] == [1, 2]


def test_the_settings_decide_the_direction(tmp_path: Path) -> None:
    rows = read(write(tmp_path, GOOD), source="ro", target="en")["train"]

    assert (rows[0]["source"], rows[0]["target"]) == ("o pisic\u0103", "a cat")


def test_translations_without_a_direction_are_refused_with_the_languages_in_the_data(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has translations \(en, ro\): set the languages .* task.source=en task.target="
    ):
        read(write(tmp_path, GOOD), source=None, target=None)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"translation": {"en": "x"}}, r"line 2: translation has no language 'ro'; it has en"),
        ({"translation": {}}, r"line 2: translation has no language 'en'; it has none"),
        (pair("x", None), r"line 2: translation.ro must be text, found None"),
        (pair(7, "x"), r"line 2: translation.en must be text, found 7"),
        (pair(["x"], "x"), r"line 2: translation.en must be text, found \['x'\]"),
        (pair("\ud800", "x"), r"line 2: translation.en has the character .*surrogate"),
        ({"translation": "x"}, r"line 2: translation must have a text for each language.*found 'x'"),
        ({"translation": None}, r"line 2: translation must have a text for each language.*found None"),
        ({"text": "x"}, r"line 2: the column 'translation' is missing; the row has text"),
    ],
)
def test_a_missing_or_invalid_text_is_named_by_file_line_and_language(tmp_path: Path, bad: Any, says: str) -> None:
    write(tmp_path, [GOOD[0], bad])

    with pytest.raises(DataError, match=rf"train.jsonl, {says}"):
        read(tmp_path)
    assert len(read(tmp_path, max_bad_rows=1)["train"]) == 1


def test_a_language_that_no_row_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl, line 1: translation has no language 'de'; it has en, ro"):
        read(write(tmp_path, GOOD), target="de")


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (("source", "target"), {"target": "B", "source": "A"}),
        (("article", "highlights"), {"article": "A", "highlights": "B", "id": "7"}),
        (("document", "summary"), {"document": "A", "summary": "B", "id": 7}),
        (("text", "summary"), {"summary": "B", "text": "A", "title": "C"}),
        (("dialogue", "summary"), {"id": "1", "dialogue": "A", "summary": "B"}),
    ],
)
def test_pairs_of_columns_are_found_by_their_usual_names(
    tmp_path: Path, names: tuple[str, str], row: dict[str, Any]
) -> None:
    found = read(write(tmp_path, [row]), source=None, target=None)["train"][0]

    assert (found["source"], found["target"]) == ("A", "B")
    assert (row[names[0]], row[names[1]]) == ("A", "B")


def test_the_settings_override_the_usual_column_names(tmp_path: Path) -> None:
    write(tmp_path, [{"text": "A", "summary": "B", "title": "C"}])

    by_data = read(tmp_path, None, None, columns={"source": "text", "target": "title"})["train"][0]
    by_task = read(tmp_path, "text", "title")["train"][0]

    assert (by_data["source"], by_data["target"]) == (by_task["source"], by_task["target"]) == ("A", "C")


def test_configured_columns_are_used_even_if_there_are_translations(tmp_path: Path) -> None:
    write(tmp_path, [{**GOOD[0], "one": "A", "two": "B"}])

    row = read(tmp_path, columns={"source": "one", "target": "two"})["train"][0]

    assert (row["source"], row["target"]) == ("A", "B")


def test_tab_separated_pairs_keep_their_quotation_marks(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('en\tro\na "cat\tb\n', encoding="utf-8")

    row = read(tmp_path)["train"][0]

    assert (row["source"], row["target"], row["line"]) == ('a "cat', "b", 2)


def test_comma_separated_pairs_without_a_header_go_by_number(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('"a, b",c\n', encoding="utf-8")

    row = read(tmp_path, "0", "1", header=False)["train"][0]

    assert (row["source"], row["target"]) == ("a, b", "c")


def test_missing_columns_are_named_with_the_existing_ones(tmp_path: Path) -> None:
    write(tmp_path, [{"one": "A", "two": "B"}])

    with pytest.raises(DataError, match=r"no column with a usual name for the source .*Its columns: one, two"):
        read(tmp_path, None, None)
    with pytest.raises(DataError, match=r"no column 'ro', which task.target names.*Its columns: one, two"):
        read(tmp_path, "one", "ro")
    with pytest.raises(DataError, match=r"no column 'six', which data.columns.target names"):
        read(tmp_path, None, None, columns={"source": "one", "target": "six"})
    with pytest.raises(
        ConfigError, match=r"data.columns.label is not a column that this task reads. Those are source and targ"
    ):
        read(tmp_path, None, None, columns={"label": "one"})
    with pytest.raises(DataError, match=r"no column with a usual name for the target"):
        read(write(tmp_path, [{"text": "A", "two": "B"}]), None, None)


def test_a_column_without_text_is_named_by_line(tmp_path: Path) -> None:
    write(tmp_path, [{"text": "A", "summary": "B"}, {"text": "A", "summary": None}])

    with pytest.raises(DataError, match=r"train.jsonl, line 2: summary must be text, found None"):
        read(tmp_path, None, None)


@pytest.mark.parametrize(
    ("good", "bare", "names"),
    [
        (GOOD[0], {"translation": {"en": "x"}}, ("en", "ro")),
        (GOOD[0], pair("x", None), ("en", "ro")),
        ({"text": "A", "summary": "B"}, {"text": "x"}, (None, None)),
        ({"en": "A", "ro": "B"}, {"en": "x"}, ("en", "ro")),
    ],
)
def test_a_test_split_may_lack_its_targets(tmp_path: Path, good: Any, bare: Any, names: Any) -> None:
    write(tmp_path, [good])
    write(tmp_path, [bare], "test")

    found = read(tmp_path, *names, splits={"train": "train.jsonl", "test": "test.jsonl"})

    assert set(found["train"][0]) == {"source", "target", "line"}
    assert found["test"] == [{"source": "x", "line": 1}]


def test_a_saved_data_set_of_the_hubs_form_is_read(tmp_path: Path) -> None:
    features = datasets.Features({"translation": datasets.Translation(languages=["en", "ro"])})
    rows = datasets.Dataset.from_list(GOOD, features=features)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path / "saved"))

    found = read(tmp_path / "saved")

    assert [row["target"] for row in found["validation"]] == ["o pisic\u0103", "c\u00e2ine"]


def test_plain_text_is_refused_for_pairs(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\n")

    with pytest.raises(ConfigError, match=r"train.txt is plain text"):
        read(tmp_path)

"""One class has one name, and labels that cannot be classes are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.schema import Data
from dtrain.data.label_names import check_classes, label_text
from dtrain.data.sources import label_names, load_sources
from dtrain.data.tables import LABELED
from dtrain.errors import DataError


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (" pos ", "pos"),
        ("pos\u3000", "pos"),
        ("pos\u00a0", "pos"),
        ("cafe\u0301", "caf\u00e9"),
        ("1.0", "1"),
        (1.0, "1"),
        (1, "1"),
        ("-2.00", "-2"),
        (1.5, "1.5"),
        ("1.10", "1.10"),
        (True, "True"),
        ("none", "none"),
        ("NA", "NA"),
        ("", None),
        ("  ", None),
        (None, None),
        (math.nan, None),
    ],
)
def test_the_name_of_a_label(value: Any, name: str | None) -> None:
    assert label_text(value, "a.csv, line 2") == name


@pytest.mark.parametrize("value", ["nan", "NaN", " nan ", "<NA>"])
def test_a_missing_value_written_as_text_is_no_class(value: str) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 2: the label is the text .* pandas writes for a missing value"):
        label_text(value, "a.csv, line 2")


def test_rows_of_one_class_with_two_spellings_are_one_class(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": label} for label in ("1", "1.0", 1, 1.0, " 1", 0)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    assert label_names(load_sources(Data(path=tmp_path / "a.jsonl"), LABELED)) == ("0", "1")


def test_a_row_whose_label_is_nan_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "s", "label": "x"}\n{"text": "t", "label": NaN}\n')

    with pytest.raises(DataError, match=r"line 2: no label \(label is nan\)"):
        load_sources(Data(path=tmp_path / "a.jsonl"), LABELED)
    assert load_sources(Data(path=tmp_path / "a.jsonl", max_bad_rows=1), LABELED)["train"].skipped == 1


def test_a_quantity_is_no_class() -> None:
    prices = {f"{k}.{k}5": 1 for k in range(40)}

    with pytest.raises(DataError, match=r"40 different numbers \(0\.05, .* quantity .* task\.name=regression"):
        check_classes(prices, "a.csv")


def test_one_class_is_nothing_to_learn() -> None:
    with pytest.raises(DataError, match=r"all 7 training rows have the label 'x', so there is nothing to learn"):
        check_classes({"x": 7}, "a.csv")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({str(k): 9 for k in range(150)}, []),  # numbered classes
        ({f"class {k}": 9 for k in range(150)}, []),
        ({"0": 5, "1": 5}, []),
        ({"0": 5, "2.5": 5, "5": 9}, ["3 different numbers"]),
        ({str(k * k): 9 for k in range(40)}, ["40 different numbers"]),
        ({"Pos": 4, "pos": 5, "neg": 5}, ["'Pos' and 'pos' are different classes (4, 5 rows)"]),
        ({"1.1": 4, "1.10": 5, "x": 5}, ["'1.1' and '1.10' are different classes"]),
        ({"\uff11": 4, "1": 5, "b": 1}, ["different classes"]),
        ({f"text {k}": 1 for k in range(30)}, ["30 classes for 30 training rows"]),
    ],
)
def test_odd_classes_are_said(counts: dict[str, int], said: list[str]) -> None:
    found = check_classes(counts, "a.csv")

    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))

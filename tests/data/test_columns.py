"""Rows read from Arrow's buffers are those that `datasets` returns, whatever the layout of the split."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Features, LargeList, List, Value

from dtrain.data.columns import ColumnRows, ListColumn, column_values, fast_rows, value_counts
from dtrain.data.lengths import list_lengths
from tests.support import tiny

COLUMNS: dict[str, tuple[Any, list[Any]]] = {
    "input_ids": (List(Value("int32")), [[1, 2, 3], [], [4], None, [5, 6], [7, 8, 9, 10]]),
    "long": (LargeList(Value("int64")), [[1], [2, 2**40], [], [3], None, [-4, 5]]),
    "small": (List(Value("int8")), [[0, 1], [1], [], [0], [1, 1, 1], [0]]),
    "with_nulls": (List(Value("int64")), [[1, None], [2], [None], [], None, [3]]),
    "choices": (List(List(Value("int32"))), [[[1, 2], [3]], [], [[4]], None, [[5], [], [6, 7, 8]], [[9]]]),
    "flags": (List(Value("bool")), [[True] * 9, [False, True], [], None, [True, False, True], [False] * 17]),
    "label": (Value("int64"), [0, 1, None, 3, 4, -5]),
    "whole": (Value("int64"), [0, 1, 2, 3, 4, -5]),
    "score": (Value("float32"), [0.5, 1.25, None, 3.0, 4.0, float("inf")]),
    "kept": (Value("bool"), [True, False, None, True, True, False]),
    "text": (Value("string"), ["a", "", None, "d", "e", "f"]),
    "answers": (
        List({"text": Value("string"), "start": Value("int32")}),
        [[{"text": "a", "start": 1}], [], None, [], [], []],
    ),
}


def dataset() -> datasets.Dataset:
    features = Features({name: kind for name, (kind, _) in COLUMNS.items()})
    return datasets.Dataset.from_dict({name: values for name, (_, values) in COLUMNS.items()}, features=features)


def saved(rows: datasets.Dataset, folder: Path, *, files: int) -> datasets.Dataset:
    rows.save_to_disk(str(folder), num_shards=files)
    return datasets.load_from_disk(str(folder))


def layouts(folder: Path) -> dict[str, datasets.Dataset]:
    whole = dataset()
    chunked = saved(whole, folder / "chunked", files=3)
    return {
        "one chunk": whole,
        "several chunks": chunked,
        "a slice that starts inside a list buffer": datasets.Dataset(whole.data.slice(1, 4)),
        "slices of chunks": datasets.concatenate_datasets([chunked, datasets.Dataset(whole.data.slice(3, 3)), whole]),
        "selected": chunked.select([5, 0, 3, 3]),
        "shuffled": datasets.concatenate_datasets([chunked, whole]).shuffle(seed=1),
        "fewer columns": chunked.select_columns(["text", "input_ids"]),
    }


def same(found: Any, expected: Any) -> bool:
    """Compares values and their types, which `==` does not: 1 == True == 1.0."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, list(found), expected))
    return type(found) is type(expected) and found == expected


def test_rows_are_those_of_the_dataset_in_every_layout(tmp_path: Path) -> None:
    for layout, rows in layouts(tmp_path).items():
        fast, number = fast_rows(rows), len(rows)
        assert isinstance(fast, ColumnRows)
        assert len(fast) == number
        backwards = [] if rows._indices is not None else [[-1, -number]]  # which `datasets` refuses after `select`
        for indices in ([0], list(range(number)), [number - 1, 0, number - 1], [], *backwards):
            found, expected = fast[indices], rows[indices]
            assert list(found) == list(expected), layout
            for name in expected:
                assert same(found[name], list(expected[name])), (layout, name, indices)
                assert found[name] == expected[name], (layout, name)


def test_a_row_of_tokens_is_a_view_of_the_memory_map(tmp_path: Path) -> None:
    rows = saved(dataset(), tmp_path, files=2)

    column = ColumnRows(rows)[[0, 5]]["input_ids"]

    assert isinstance(column, ListColumn)
    chunks = rows.data.column("input_ids").chunks
    whole = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
    assert len(chunks) == 2
    assert [np.shares_memory(part, values) for part, values in zip(column.parts, whole, strict=True)] == [True, True]


def test_an_index_that_is_out_of_range_is_refused_like_by_the_dataset() -> None:
    for indices in ([6], [-7], [0, 6]):
        with pytest.raises(IndexError, match="out of range for 6 rows"):
            ColumnRows(dataset())[indices]


def test_other_splits_and_datasets_with_a_format_are_left_as_they_are() -> None:
    table, formatted = object(), dataset().with_format("numpy")

    assert fast_rows(table) is table
    assert fast_rows(formatted) is formatted


def test_a_column_reads_like_the_list_of_lists_that_it_stands_for() -> None:
    column = ColumnRows(dataset())[[0, 4]]["input_ids"]

    assert column[0] + [9] == [1, 2, 3, 9]
    assert column[-1:] == [[5, 6]]
    assert column + [[1]] == [[1, 2, 3], [5, 6], [1]]
    assert [[1]] + column == [[1], [1, 2, 3], [5, 6]]
    assert [row + [0] for row in column] == [[1, 2, 3, 0], [5, 6, 0]]
    assert repr(column) == "[[1, 2, 3], [5, 6]]"
    assert bool(column)
    assert not ColumnRows(dataset())[[]]["input_ids"]


def test_texts_are_read_once_and_only_if_they_are_used() -> None:
    rows = ColumnRows(dataset())
    reads: list[list[int]] = []

    class Counted:
        def __getitem__(self, indices: list[int]) -> Any:
            reads.append(indices)
            return dataset()[indices]

    rows._others = Counted()  # type: ignore[assignment]

    found = rows[[3, 4]]
    assert (len(found["text"]), reads) == (2, [])
    assert list(found["text"]) == ["d", "e"]
    assert found["answers"][1] == []
    assert reads == [[3, 4]]


def test_rows_can_be_sent_to_another_process() -> None:
    rows = ColumnRows(dataset().select([4, 1]))

    assert pickle.loads(pickle.dumps(rows))[[0, 1]]["input_ids"] == [[5, 6], []]


def test_torch_numpy_and_a_tokenizer_take_a_column_for_a_list_of_lists() -> None:
    rows = dataset().select([0, 4])
    found = ColumnRows(rows.select([0, 0]))[[0, 1]]

    assert torch.tensor(found["input_ids"]).tolist() == [[1, 2, 3]] * 2
    assert np.array(found["input_ids"]).tolist() == [[1, 2, 3]] * 2
    padded = tiny.tokenizer().pad({"input_ids": ColumnRows(rows)[[0, 1]]["input_ids"]}, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[1, 2, 3], [5, 6, 0]]


def test_columns_are_counted_and_measured_without_reading_them_row_by_row(tmp_path: Path) -> None:
    texts = datasets.Dataset.from_dict({"label": ["b", "a", "b", "c", "a", "b"]})
    for rows in (
        texts,
        saved(texts, tmp_path / "saved", files=3),
        texts.select([3, 2, 1, 0, 4, 5]).select([3, 2, 1, 0, 4, 5]),
    ):
        assert list(value_counts(rows, "label").items()) == [("b", 3), ("a", 2), ("c", 1)]
    for layout, rows in layouts(tmp_path).items():
        expected = rows[:]["input_ids"]
        assert list_lengths(rows, "input_ids").tolist() == [len(row or ()) for row in expected], layout
        assert list(column_values(rows, "text")) == rows[:]["text"], layout

"""Prepared data on several nodes: one rank of each builds, all compare. Ranks of one machine simulate two nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from dtrain.data.cache import Build, prepare, save_split
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from tests.support.contexts import placed
from tests.support.multirank import run_ranks

pytestmark = pytest.mark.ranks


def two_nodes_of_two_ranks(context: RankContext, folder: str, texts: list[list[str]]) -> dict[str, Any]:
    node = context.rank // 2
    place = placed(context, node_rank=node, num_nodes=2, local_rank=context.rank % 2, local_world_size=2)
    built = []

    def build(folder: Path) -> Mapping[str, Any]:
        built.append(context.rank)
        for split, rows in (("train", texts[node]), ("validation", ["v"])):
            save_split(folder, split, datasets.Dataset.from_dict({"text": rows}))
        return {}

    def plan() -> tuple[Mapping[str, Any], Build]:
        return {}, build

    try:
        rows = list(prepare(plan, cache_dir=Path(folder) / f"node{node}", context=place).splits["train"]["text"])
        return {"rows": rows, "built": built}
    except DataError as error:
        return {"error": str(error)}


def test_one_rank_of_each_node_builds_and_all_open_the_result(tmp_path: Path) -> None:
    results = run_ranks(two_nodes_of_two_ranks, 4, str(tmp_path), [["a", "b"], ["a", "b"]])

    assert [result["built"] for result in results] == [[0], [], [2], []]
    assert [result["rows"] for result in results] == [["a", "b"]] * 4


def test_different_data_on_two_nodes_stops_all_ranks_with_a_table_of_both(tmp_path: Path) -> None:
    results = run_ranks(two_nodes_of_two_ranks, 4, str(tmp_path), [["a", "b"], ["a", "c", "d"]])

    (message,) = {result["error"] for result in results}
    rows = [line.split() for line in message.splitlines() if line[:1].isdigit()]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("0", "train", "2"),
        ("0", "validation", "1"),
        ("1", "train", "3"),
        ("1", "validation", "1"),
    ]
    assert rows[0][4] != rows[2][4]
    assert rows[1][4] == rows[3][4]


def failing_on_node_one(context: RankContext, folder: str) -> str:
    place = placed(context, node_rank=context.rank, num_nodes=2, local_rank=0, local_world_size=1)

    def build(folder: Path) -> Mapping[str, Any]:
        if context.rank == 1:
            raise DataError("line 7 is bad")
        save_split(folder, "train", datasets.Dataset.from_dict({"text": ["a"]}))
        return {}

    try:
        prepare(lambda: ({}, build), cache_dir=Path(folder) / str(context.rank), context=place)
        return "no error"
    except DataError as error:
        return str(error)


def test_a_bad_row_on_one_node_is_the_same_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(failing_on_node_one, 2, str(tmp_path))

    assert "line 7 is bad" in first
    assert first == second

"""Checkpoints on nodes that share no disk: copies, the loss of one node's disk, and parts that lie apart."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.layout import verify
from dtrain.commands.train import run_train
from dtrain.config import load_config
from dtrain.errors import DtrainError
from dtrain.topology import Topology
from tests import resuming
from tests.multirank import run_ranks
from tests.resuming import STEPS, Died, DieIn, settings

SHARDED = {"checkpoint.format": "sharded"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resuming.material(tmp_path_factory.mktemp("nodes"))


def one_rank_a_node(topology: Topology, folder: str, name: str, changes: dict[str, Any], die_in: int | None) -> str:
    """Collective. Every rank is a node, with a working folder, and so a run folder, of its own."""
    home = Path(folder) / f"node{topology.rank}"
    home.mkdir(exist_ok=True)
    os.chdir(home)
    place = replace(topology, node_rank=topology.rank, num_nodes=topology.world_size, local_rank=0, local_world_size=1)
    changes = {"run.output_dir": "runs", "data.cache_dir": home / "cache", **changes}
    config = load_config(None, settings(Path(folder), name, changes))
    try:
        run_train(config, place, monitors=[] if die_in is None else [DieIn(die_in)])
    except Died:
        return "died"
    except DtrainError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def start(folder: Path, name: str, world: int, changes: dict[str, Any], *, die_in: int | None = None) -> list[str]:
    ended: list[str] = run_ranks(one_rank_a_node, world, str(folder), name, changes, die_in)
    return ended


def checkpoints(folder: Path, node: int, name: str) -> Path:
    return folder / f"node{node}" / "runs" / name / "checkpoints"


def tensors(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / f"step-{STEPS:06d}").glob("*.safetensors")}


@pytest.fixture(scope="module")
def steady(folder: Path) -> dict[str, bytes]:
    assert start(folder, "steady", 3, {}) == ["done"] * 3
    return tensors(checkpoints(folder, 0, "steady"))


def test_two_nodes_keep_a_copy_and_either_one_is_enough(folder: Path, steady: dict[str, bytes]) -> None:
    assert start(folder, "lost", 3, {}, die_in=7) == ["died"] * 3
    for node in (0, 1):
        verify(checkpoints(folder, node, "lost") / "step-000006")
    assert not checkpoints(folder, 2, "lost").exists()

    shutil.rmtree(folder / "node0" / "runs" / "lost")
    assert start(folder, "lost", 3, {}) == ["done"] * 3

    assert tensors(checkpoints(folder, 0, "lost")) == steady
    assert tensors(checkpoints(folder, 1, "lost")) == steady


def test_a_copy_that_is_newer_than_rank_0s_is_the_one_to_go_on_from(folder: Path, steady: dict[str, bytes]) -> None:
    start(folder, "behind", 3, {}, die_in=7)
    for step in (5, 6):
        shutil.rmtree(checkpoints(folder, 0, "behind") / f"step-{step:06d}")

    assert start(folder, "behind", 3, {}) == ["done"] * 3
    assert tensors(checkpoints(folder, 0, "behind")) == steady


def test_what_no_node_has_any_more_stops_the_start_on_every_rank(folder: Path) -> None:
    start(folder, "gone", 3, {}, die_in=7)
    for node in (0, 1):
        shutil.rmtree(checkpoints(folder, node, "gone") / "step-000006")

    ended = start(folder, "gone", 3, {})

    assert all(words.startswith("CheckpointError: ") for words in ended)
    assert "has saved a checkpoint of step 6" in ended[0]


def test_parts_that_lie_on_three_nodes_make_one_checkpoint(folder: Path) -> None:
    start(folder, "parts", 3, SHARDED, die_in=7)
    assert [len(list((checkpoints(folder, node, "parts") / "step-000006").glob("shard-*"))) for node in range(3)] == [
        1
    ] * 3
    assert start(folder, "parts-steady", 3, SHARDED) == ["done"] * 3

    assert start(folder, "parts", 3, SHARDED) == ["done"] * 3

    for node in range(3):
        assert tensors(checkpoints(folder, node, "parts")) == tensors(checkpoints(folder, node, "parts-steady"))


def test_a_part_that_is_missing_makes_the_checkpoint_before_it_the_newest(folder: Path) -> None:
    start(folder, "hole", 3, SHARDED, die_in=7)
    file = checkpoints(folder, 1, "hole") / "step-000006" / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])

    ended = start(folder, "hole", 3, SHARDED)

    assert ended == ["done"] * 3
    assert (checkpoints(folder, 1, "hole") / "damaged-step-000006").is_dir()

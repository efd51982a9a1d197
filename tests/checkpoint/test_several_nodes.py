"""Checkpoints on nodes without a shared disk: copies, the loss of one node's disk, and parts on separate disks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint import writer_process
from dtrain.checkpoint.format import list_checkpoints, verify
from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DtrainError
from tests.support import resuming
from tests.support.contexts import placed
from tests.support.multirank import run_ranks
from tests.support.resuming import STEPS, Died, DieIn, settings

pytestmark = pytest.mark.ranks

SHARDED = {"checkpoint.format": "sharded"}


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("nodes"))


FULL_FROM = """
import os
def write(handle, data):
    place = os.readlink("/proc/self/fd/%d" % handle)
    if "/.tmp-step-" in place and place.split("/.tmp-step-")[1][:6] >= "000005" and "shard-" in place:
        raise OSError(28, "No space left on device")
    return real(handle, data)
real, os.write = os.write, write
"""
"""Source text for a node's writer process: from step 5 on, its disk is full."""


def one_rank_a_node(
    context: RankContext, folder: str, name: str, changes: dict[str, Any], die_in: int | None, full: int | None = None
) -> str:
    """Collective. Every rank is a node with a separate working folder, and so a separate run folder.

    Args:
        full: rank whose disk is full from step 5 on.
    """
    if context.rank == full:
        writer_process._START = FULL_FROM + writer_process._START
    home = Path(folder) / f"node{context.rank}"
    home.mkdir(exist_ok=True)
    os.chdir(home)
    place = placed(context, node_rank=context.rank, num_nodes=context.world_size, local_rank=0, local_world_size=1)
    changes = {"run.output_dir": "runs", "data.cache_dir": home / "cache", **changes}
    config = load_config(None, settings(Path(folder), name, changes))
    try:
        run_train(config, place, monitors=[] if die_in is None else [DieIn(die_in)])
    except Died:
        return "died"
    except DtrainError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def start(
    folder: Path, name: str, world: int, changes: dict[str, Any], *, die_in: int | None = None, full: int | None = None
) -> list[str]:
    ended: list[str] = run_ranks(one_rank_a_node, world, str(folder), name, changes, die_in, full)
    return ended


def checkpoints(folder: Path, node: int, name: str) -> Path:
    return folder / f"node{node}" / "runs" / name / "checkpoints"


def tensors(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / f"step-{STEPS:06d}").glob("*.safetensors")}


@pytest.fixture(scope="module")
def steady(folder: Path) -> dict[str, bytes]:
    assert start(folder, "steady", 3, {}) == ["done"] * 3
    return tensors(checkpoints(folder, 0, "steady"))


def test_two_nodes_keep_a_copy_and_one_of_them_is_enough(folder: Path, steady: dict[str, bytes]) -> None:
    assert start(folder, "lost", 3, {}, die_in=7) == ["died"] * 3
    for node in (0, 1):
        verify(checkpoints(folder, node, "lost") / "step-000006")
    assert not checkpoints(folder, 2, "lost").exists()

    shutil.rmtree(folder / "node0" / "runs" / "lost")
    assert start(folder, "lost", 3, {}) == ["done"] * 3

    assert tensors(checkpoints(folder, 0, "lost")) == steady
    assert tensors(checkpoints(folder, 1, "lost")) == steady


def test_a_run_resumes_from_a_copy_that_is_newer_than_rank_0s(folder: Path, steady: dict[str, bytes]) -> None:
    start(folder, "behind", 3, {}, die_in=7)
    for step in (5, 6):
        shutil.rmtree(checkpoints(folder, 0, "behind") / f"step-{step:06d}")

    assert start(folder, "behind", 3, {}) == ["done"] * 3
    assert tensors(checkpoints(folder, 0, "behind")) == steady


def test_a_saved_step_that_no_node_has_any_more_is_an_error_on_every_rank(folder: Path) -> None:
    start(folder, "gone", 3, {}, die_in=7)
    for node in (0, 1):
        shutil.rmtree(checkpoints(folder, node, "gone") / "step-000006")

    ended = start(folder, "gone", 3, {})

    assert all(end.startswith("CheckpointError: ") for end in ended)
    assert "has saved a checkpoint of step 6" in ended[0]


def test_parts_on_three_nodes_make_one_checkpoint(folder: Path) -> None:
    start(folder, "parts", 3, SHARDED, die_in=7)
    assert [len(list((checkpoints(folder, node, "parts") / "step-000006").glob("shard-*"))) for node in range(3)] == [
        1
    ] * 3
    assert start(folder, "parts-steady", 3, SHARDED) == ["done"] * 3

    assert start(folder, "parts", 3, SHARDED) == ["done"] * 3

    for node in range(3):
        assert tensors(checkpoints(folder, node, "parts")) == tensors(checkpoints(folder, node, "parts-steady"))


def test_a_checkpoint_with_a_damaged_part_is_skipped(folder: Path) -> None:
    start(folder, "hole", 3, SHARDED, die_in=7)
    file = checkpoints(folder, 1, "hole") / "step-000006" / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])

    ended = start(folder, "hole", 3, SHARDED)

    assert ended == ["done"] * 3
    assert (checkpoints(folder, 1, "hole") / "damaged-step-000006").is_dir()


def test_a_node_that_cannot_write_is_reported_and_every_node_keeps_the_last_complete_checkpoint(folder: Path) -> None:
    one = {**SHARDED, "checkpoint.keep": 1}
    assert start(folder, "full", 2, one, die_in=9, full=1) == ["died"] * 2

    assert sorted(list_checkpoints(checkpoints(folder, 0, "full"))) == [4, 8]
    assert sorted(path.name for path in checkpoints(folder, 1, "full").iterdir()) == ["step-000003", "step-000004"]
    lines = (folder / "node0" / "runs" / "full" / "metrics.jsonl").read_text().splitlines()
    faults = [event for event in map(json.loads, lines) if event["event"] == "fault"]
    assert [fault["step"] for fault in faults] == [5, 6, 7, 8]
    assert "rank 1: step-000005 cannot be written" in faults[0]["message"]

    assert start(folder, "full", 2, one) == ["done"] * 2
    assert start(folder, "never-full", 2, one) == ["done"] * 2
    for node in (0, 1):
        assert tensors(checkpoints(folder, node, "full")) == tensors(checkpoints(folder, node, "never-full"))
        assert (checkpoints(folder, node, "full") / "left-step-000008").exists() == (node == 0)


def test_parts_of_two_starts_are_not_combined(folder: Path) -> None:
    start(folder, "two-lives", 2, SHARDED, die_in=7)
    aside = shutil.move(checkpoints(folder, 1, "two-lives") / "step-000006", folder / "first-life")
    shutil.rmtree(checkpoints(folder, 0, "two-lives") / "step-000006")
    resume = {"checkpoint.resume": Path("runs") / "two-lives" / "checkpoints" / "step-000005"}
    start(folder, "two-lives", 2, {**SHARDED, **resume}, die_in=7)
    shutil.rmtree(checkpoints(folder, 1, "two-lives") / "step-000006")
    shutil.move(aside, checkpoints(folder, 1, "two-lives") / "step-000006")

    ended = start(folder, "two-lives", 2, SHARDED)

    assert all(
        "has saved a checkpoint of step 6 (according to metrics.jsonl), but no node has it" in end for end in ended
    )
    assert start(folder, "two-lives", 2, {**SHARDED, **resume}) == ["done"] * 2
    assert (checkpoints(folder, 1, "two-lives") / "left-step-000006").is_dir()


def test_an_overwritten_run_leaves_no_copy_to_resume_from(folder: Path) -> None:
    start(folder, "redo", 2, {}, die_in=7)

    assert start(folder, "redo", 2, {"run.overwrite": True, "optim.learning_rate": 1e-4}, die_in=3) == ["died"] * 2

    assert (
        max(list_checkpoints(checkpoints(folder, 0, "redo")))
        == max(list_checkpoints(checkpoints(folder, 1, "redo")))
        == 2
    )

"""What is read is the same, bit for bit, whichever ranks and nodes computed it, and a run goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.data.frozen_store import FrozenStore
from dtrain.distributed.rank_context import RankContext
from tests.support import tiny, training
from tests.support.contexts import placed
from tests.support.multirank import run_ranks
from tests.support.training import Setting, worst
from tests.support.whole_runs import commands

pytestmark = pytest.mark.ranks

FROZEN = ("embeddings", "encoder.layer[0]")


def trained(context: RankContext, folder: str, cache: str, engine: str) -> dict[str, Any]:
    zero = int(engine[4:]) if engine.startswith("zero") else None
    setting = Setting(freeze=FROZEN, cache=cache, cache_dir=folder, learning_rate=0.2, zero_stage=zero, engine="auto")
    built = training.build(context, setting)
    recorder, cached = training.Recorder(), built.prepared.frozen_cache
    built.go(recorder).release()
    return {"steps": recorder.steps, "hits": cached.hits, "misses": cached.misses, "why": cached._why_off}


def thawed(context: RankContext, folder: str, cache: str, engine: str) -> dict[str, Any]:
    """A run in which layer 1 begins to learn in epoch 2, and the rest below it stays frozen for two epochs more."""
    zero = int(engine[4:]) if engine.startswith("zero") else None
    frozen, thaw = ("embeddings", "encoder.layer[:2]"), ((2, "encoder.layer[1]"),)
    setting = Setting(
        freeze=frozen, thaw=thaw, steps=12, cache=cache, cache_dir=folder, learning_rate=0.2, zero_stage=zero
    )
    built = training.build(context, setting, tiny.bert(layers=3))
    recorder = training.Recorder()
    built.go(recorder).release()
    return {"steps": recorder.steps, "hits": built.prepared.frozen_cache.hits}


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_a_thaw_goes_on_with_what_is_still_frozen_on_every_engine(tmp_path: Path, engine: str) -> None:
    off = run_ranks(thawed, 2, str(tmp_path), "off", engine)[0]
    on = run_ranks(thawed, 2, str(tmp_path), "auto", engine)[0]

    assert worst(off, on) < 1e-5
    assert (on["hits"] > 0) == (engine != "zero3")


def rows_of(folder: Path) -> dict[bytes, bytes]:
    """Every stored row of the one store in a folder."""
    (place,) = (folder / "frozen").iterdir()
    store = FrozenStore(place, vector_bytes=32 * 4)
    store.load()
    found = {key: store.read([key], [count]) for key, (_, _, count) in store._rows.items()}
    return {key: vectors.tobytes() for key, vectors in found.items() if vectors is not None}


@pytest.fixture(scope="module")
def alone(memory_path: Callable[[str], Path]) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    folder = memory_path("alone")
    (found,) = run_ranks(trained, 1, str(folder), "auto", "auto")
    return found, rows_of(folder)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_and_store_the_bits_of_one_process(
    alone: tuple[dict[str, Any], dict[bytes, bytes]], tmp_path: Path, world: int
) -> None:
    found = run_ranks(trained, world, str(tmp_path), "auto", "auto")
    (plain,) = run_ranks(trained, 1, str(tmp_path), "off", "auto")

    assert rows_of(tmp_path) == alone[1]
    assert len(list((tmp_path / "frozen").glob("*/*.part"))) == world
    for rank in found:
        assert worst(alone[0], rank) < 1e-6
        assert worst(plain, rank) < 1e-5
        assert (rank["hits"] > 0, rank["misses"]) == (True, 0)


def test_sharded_engines_compute_and_say_why_and_others_read(tmp_path: Path) -> None:
    for engine, reads in (("zero2", True), ("zero3", False)):
        for found in run_ranks(trained, 2, str(tmp_path), "auto", engine):
            assert (found["hits"] > 0, found["misses"]) == (reads, 0)
            assert ("shards the model" in str(found["why"])) != reads


def on_two_nodes(context: RankContext, folder: str) -> dict[str, Any]:
    """Each rank is a node of its own, with its own disk."""
    node = placed(context, node_rank=context.rank, num_nodes=2, local_rank=0, local_world_size=1)
    return trained(node, f"{folder}/node{context.rank}", "auto", "auto")


def test_each_node_has_all_rows_on_its_own_disk(
    alone: tuple[dict[str, Any], dict[bytes, bytes]], tmp_path: Path
) -> None:
    for rank, found in enumerate(run_ranks(on_two_nodes, 2, str(tmp_path))):
        assert found["misses"] == 0
        assert rows_of(tmp_path / f"node{rank}") == alone[1]


def one_cannot_write(context: RankContext, folder: str) -> dict[str, Any]:
    place = Path(folder) / f"node{context.rank}"
    place.mkdir()
    if context.rank == 1:
        (place / "frozen").write_text("a file")
    return on_two_nodes(context, folder)


def test_if_one_node_cannot_write_all_compute(alone: tuple[dict[str, Any], dict[bytes, bytes]], tmp_path: Path) -> None:
    for found in run_ranks(one_cannot_write, 2, str(tmp_path)):
        assert (found["hits"], found["misses"]) == (0, 0)
        assert worst(alone[0], found) < 1e-5


# Whole runs


def settings(folder: Path, name: str, **more: str) -> list[str]:
    told = {
        "run.name": name,
        "run.output_dir": str(folder / "runs"),
        "task.name": "classification",
        "model.name_or_path": str(folder / "model"),
        "freeze.modules": "[base_model]",
        "data.name": "cola",
        "data.path": str(folder / "cola"),
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": "32",
        "train.epochs": "3",
        "train.global_batch_size": "8",
        "train.micro_batch_size": "3",
        "train.log_every": "1",
        "optim.learning_rate": "0.05",
        "evaluation.micro_batch_size": "4",
        "tracking.tensorboard": "false",
        **more,
    }
    return [f"{key}={value}" for key, value in told.items()]


def test_a_run_goes_on_with_what_is_stored_and_ends_as_one_that_never_stopped(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", layers=1)
    tiny.write_cola(tmp_path / "cola", train=21, dev=11)
    saves = {"checkpoint.every": "4"}
    runs = [
        ("train", settings(tmp_path, "plain", **{"freeze.cache": "off"})),
        ("train", settings(tmp_path, "whole", **saves)),
        ("train", settings(tmp_path, "parted", **saves, **{"train.max_steps": "4", "schedule.name": "constant"})),
        ("train", settings(tmp_path, "steady", **saves, **{"schedule.name": "constant"})),
    ]
    plain, whole, _, steady = run_ranks(commands, 1, runs)[0]
    stores = sorted((tmp_path / "cache" / "frozen").glob("*/*.part"))
    rest = [("train", settings(tmp_path, "parted", **saves, **{"schedule.name": "constant"}))]
    went_on = run_ranks(commands, 2, rest)[0][0]

    assert whole["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert whole["metrics"] == pytest.approx(plain["metrics"], rel=1e-5)
    assert whole["predictions"] == [
        {**one, "loss": pytest.approx(one["loss"], rel=1e-5)} for one in plain["predictions"]
    ]
    assert went_on["losses"] == pytest.approx(steady["losses"], rel=1e-6)
    assert sorted((tmp_path / "cache" / "frozen").glob("*/*.part")) == stores

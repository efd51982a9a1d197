"""configs/own_model.yaml unchanged: a custom module on one, two and three ranks, and evaluated from its folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.multirank import run_ranks
from tests.support.tiny import WORDS
from tests.support.whole_runs import commands

pytestmark = pytest.mark.ranks

CONFIG = Path(__file__).parents[2] / "configs" / "own_model.yaml"


def settings(folder: Path, name: str, **more: str) -> list[str]:
    told = {
        "run.name": name,
        "run.output_dir": str(folder / "runs"),
        "data.path": str(folder / "reviews.csv"),
        "data.cache_dir": str(folder / "cache"),
        "train.epochs": "2",
        "train.global_batch_size": "8",
        "train.micro_batch_size": "3",
        "train.log_every": "1",
        "evaluation.micro_batch_size": "2",
        "tracking.tensorboard": "false",
        **more,
    }
    return [f"{key}={value}" for key, value in told.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    rng = random.Random(0)
    rows = [f"{rng.choice(['good', 'bad'])},{' '.join(rng.choices(WORDS, k=rng.randint(2, 9)))}" for _ in range(26)]
    (folder / "reviews.csv").write_text("\n".join(["label,text", *rows]) + "\n")
    return folder


def runs(place: Path, world_size: int) -> list[dict[str, Any]]:
    trained = {"model.name_or_path": str(place / "runs" / f"on-{world_size}" / "model")}
    found: list[dict[str, Any]] = run_ranks(
        commands,
        world_size,
        [
            ("train", settings(place, f"on-{world_size}")),
            ("evaluate", settings(place, f"again-{world_size}", **trained)),
        ],
        CONFIG,
    )[0]
    return found


def test_a_custom_module_trains_the_same_on_any_number_of_ranks_and_its_folder_evaluates_the_same(place: Path) -> None:
    single, again = runs(place, 1)

    assert len(single["losses"]) == 6  # 20 rows in batches of 8, 8 and 4, twice
    assert single["losses"][-1] < single["losses"][0]
    assert len(single["predictions"]) == 6
    assert (again["metrics"], again["predictions"]) == (single["metrics"], single["predictions"])
    for world_size in (2, 3):
        several, measured = runs(place, world_size)
        assert several["losses"] == pytest.approx(single["losses"], rel=1e-6)
        assert several["metrics"]["accuracy"] == single["metrics"]["accuracy"]
        assert (measured["metrics"], measured["predictions"]) == (several["metrics"], several["predictions"])

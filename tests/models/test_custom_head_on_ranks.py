"""A frozen backbone with a new head, trained, saved and evaluated from its folder on one, two and three ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.support import tiny
from tests.support.multirank import run_ranks
from tests.support.whole_runs import commands

pytestmark = pytest.mark.ranks

STEPS = 6
"""21 rows in batches of 8, twice: 8, 8 and 5."""


def settings(folder: Path, name: str, **more: str) -> list[str]:
    told = {
        "run.name": name,
        "run.output_dir": str(folder / "runs"),
        "task.name": "classification",
        "model.name_or_path": str(folder / "base"),
        "model.head": "{pooling: mean, hidden: 6, dropout: 0.2}",
        "freeze.modules": "[backbone]",
        "data.name": "cola",
        "data.path": str(folder / "cola"),
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": "32",
        "train.epochs": "2",
        "train.global_batch_size": "8",
        "train.micro_batch_size": "3",
        "train.log_every": "1",
        "train.eval_every": "epoch",
        "optim.learning_rate": "0.05",
        "evaluation.micro_batch_size": "4",
        "tracking.tensorboard": "false",
        **more,
    }
    return [f"{key}={value}" for key, value in told.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headed")
    tiny.bert(layers=1).bert.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    tiny.write_cola(folder / "cola", train=21, dev=11)
    return folder


@pytest.fixture(scope="module")
def single(place: Path) -> dict[str, Any]:
    """Trains on one process with each method, and evaluates the folder with and without model.head."""
    again = {"model.name_or_path": str(place / "runs" / "plain" / "model"), "freeze.modules": "[]"}
    below = {"freeze.modules": '["encoder"]'}
    runs = {
        "plain": ("train", settings(place, "plain")),
        "no_grad": ("train", settings(place, "no_grad", **{"freeze.method": "no_grad"})),
        "again": ("evaluate", settings(place, "again", **again)),
        "by itself": ("evaluate", settings(place, "by-itself", **again, **{"model.head": "null"})),
        "below": ("train", settings(place, "below", **below)),
        "below, no_grad": ("train", settings(place, "below-no_grad", **below, **{"freeze.method": "no_grad"})),
    }
    return dict(zip(runs, run_ranks(commands, 1, list(runs.values()))[0], strict=True))


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    folder = place / "runs" / name / "model"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "head.safetensors")}


def test_a_fully_frozen_backbone_gives_the_same_bits_with_either_method(place: Path, single: dict[str, Any]) -> None:
    assert len(single["plain"]["losses"]) == STEPS
    assert single["no_grad"] == single["plain"]
    first, second = weights(place, "plain"), weights(place, "no_grad")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_only_the_head_has_learned(place: Path, single: dict[str, Any]) -> None:
    before = AutoModel.from_pretrained(place / "base").state_dict()
    after = AutoModel.from_pretrained(place / "runs" / "plain" / "model").state_dict()

    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert single["plain"]["losses"][-1] != single["plain"]["losses"][0]


def test_the_methods_differ_if_something_below_the_frozen_part_should_train(
    place: Path, single: dict[str, Any]
) -> None:
    name = "embeddings.word_embeddings.weight"
    before = AutoModel.from_pretrained(place / "base").state_dict()[name]

    assert not torch.equal(weights(place, "below")[name], before)
    assert torch.equal(weights(place, "below-no_grad")[name], before)
    assert single["below"]["losses"][-1] != single["below, no_grad"]["losses"][-1]


def test_the_unused_pooler_is_frozen_and_does_not_change(place: Path, single: dict[str, Any]) -> None:
    before = AutoModel.from_pretrained(place / "base").state_dict()

    assert torch.equal(weights(place, "below")["pooler.dense.weight"], before["pooler.dense.weight"])


@pytest.mark.parametrize("how", ["again", "by itself"])
def test_the_saved_folder_evaluates_the_same(single: dict[str, Any], how: str) -> None:
    assert single[how]["metrics"] == single["plain"]["metrics"]
    assert single[how]["predictions"] == single["plain"]["predictions"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_more_ranks_give_the_same_losses_and_metrics(place: Path, single: dict[str, Any], world_size: int) -> None:
    name = f"on-{world_size}"
    trained, measured = run_ranks(
        commands,
        world_size,
        [
            # Everything learns: ddp has the unused pooler to cope with.
            ("train", settings(place, name, **{"freeze.modules": "[encoder]"})),
            ("evaluate", settings(place, f"{name}-again", **{"model.name_or_path": f"{place}/runs/plain/model"})),
        ],
    )[0]

    assert trained["losses"] == pytest.approx(single["below"]["losses"], rel=1e-6)
    assert measured["metrics"] == single["plain"]["metrics"]
    assert trained["losses"] != pytest.approx(single["plain"]["losses"], rel=1e-6)  # a control: other runs differ

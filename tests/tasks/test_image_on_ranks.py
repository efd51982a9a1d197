"""Images from folder to folder: the same losses and digits on one rank, two and three, and by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.support import pictures
from tests.support.multirank import run_ranks
from tests.support.whole_runs import commands

pytestmark = pytest.mark.ranks


def settings(folder: Path, name: str, **more: str) -> list[str]:
    told = {
        "run.name": name,
        "run.output_dir": str(folder / "runs"),
        "task.name": "image_classification",
        "task.image_size": "16",
        "model.from_scratch": "true",
        "model.config": json.dumps(pictures.RESNET),
        "data.path": str(folder / "colours"),
        "data.cache_dir": str(folder / "cache"),
        "train.epochs": "2",
        "train.global_batch_size": "6",
        "train.micro_batch_size": "2",
        "train.log_every": "1",
        "optim.learning_rate": "0.01",
        "evaluation.micro_batch_size": "2",
        "tracking.tensorboard": "false",
        **more,
    }
    return [f"{key}={value}" for key, value in told.items()]


def landmarks(folder: Path, name: str, **more: str) -> list[str]:
    numbers = {"task.name": "image_regression", "task.targets": "[x, y]", "model.config": json.dumps(pictures.VIT)}
    return settings(folder, name, **{**numbers, "data.path": str(folder / "faces"), **more})


def trained(folder: Path, name: str) -> dict[str, str]:
    return {"model.name_or_path": str(folder / "runs" / name / "model")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pictures.write_class_folders(folder / "colours", train=14, validation=5)
    pictures.write_landmarks(folder / "faces", train=7, validation=3)
    return folder


@pytest.fixture(scope="module")
def single(place: Path) -> dict[str, Any]:
    runs = {
        "classes": ("train", settings(place, "classes")),
        "classes again": ("evaluate", settings(place, "classes-again", **trained(place, "classes"))),
        "numbers": ("train", landmarks(place, "numbers")),
        "numbers again": ("evaluate", landmarks(place, "numbers-again", **trained(place, "numbers"))),
        "moving": ("train", settings(place, "moving", **{"model.batch_norm": "train"})),
        "headed": ("train", settings(place, "headed", **{"model.head": "{pooling: mean}"})),
        "headed again": ("evaluate", settings(place, "headed-again", **trained(place, "headed"))),
    }
    return dict(zip(runs, run_ranks(commands, 1, list(runs.values()))[0], strict=True))


def test_the_loss_falls_and_every_image_is_counted_once(single: dict[str, Any]) -> None:
    losses = single["classes"]["losses"]

    assert len(losses) == 6  # 14 images in batches of 6, 6 and 2, twice
    assert losses[-1] < losses[0]
    assert len(single["classes"]["predictions"]) == 5
    assert set(single["numbers"]["metrics"]) == {"loss", "mean_squared_error", "mean_absolute_error"}
    assert single["numbers"]["metrics"]["loss"] == pytest.approx(single["numbers"]["metrics"]["mean_squared_error"])


@pytest.mark.parametrize("kind", ["classes", "numbers", "headed"])
def test_the_saved_folder_gives_the_same_digits(single: dict[str, Any], kind: str) -> None:
    assert single[f"{kind} again"]["metrics"] == single[kind]["metrics"]
    assert single[f"{kind} again"]["predictions"] == single[kind]["predictions"]


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_plain_transformers_computes_the_same_from_the_saved_folder(
    place: Path, single: dict[str, Any], kind: str
) -> None:
    folder = place / "runs" / kind / "model"
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    data = place / ("colours" if kind == "classes" else "faces")

    for record in single[kind]["predictions"]:
        with Image.open(data / record["image"]) as image, torch.no_grad():
            logits = model.eval()(**processor(images=image.convert("RGB"), return_tensors="pt")).logits[0]
        if kind == "classes":
            truth = model.config.label2id[record["reference"]]
            assert model.config.id2label[int(logits.argmax())] == record["prediction"]
            assert float(-logits.log_softmax(0)[truth]) == pytest.approx(record["loss"], rel=1e-5)
        else:
            assert record["prediction"] == pytest.approx(logits.tolist(), rel=1e-5)


def test_running_statistics_change_only_with_batch_norm_train(place: Path, single: dict[str, Any]) -> None:
    name = "resnet.embedder.embedder.normalization.running_mean"
    still, moved = (
        load_file(place / "runs" / run / "model" / "model.safetensors")[name] for run in ("classes", "moving")
    )

    assert still.abs().max() == 0.0  # as a new model begins
    assert moved.abs().max() > 0.0


@pytest.mark.parametrize("world_size", [2, 3])
def test_more_ranks_give_the_same_losses_and_digits(place: Path, single: dict[str, Any], world_size: int) -> None:
    classes, numbers, measured, repeated = run_ranks(
        commands,
        world_size,
        [
            ("train", settings(place, f"classes-{world_size}")),
            ("train", landmarks(place, f"numbers-{world_size}")),
            ("evaluate", settings(place, f"measured-{world_size}", **trained(place, "classes"))),
            ("train", settings(place, f"other-{world_size}", **{"run.seed": "1"})),
        ],
    )[0]

    assert classes["losses"] == pytest.approx(single["classes"]["losses"], rel=1e-6)
    assert numbers["losses"] == pytest.approx(single["numbers"]["losses"], rel=1e-6)
    assert measured["metrics"] == single["classes"]["metrics"]
    assert measured["predictions"] == single["classes"]["predictions"]
    assert repeated["losses"] != pytest.approx(single["classes"]["losses"], rel=1e-6)  # a control


def test_fsdp_gives_the_same_losses_and_digits(place: Path, single: dict[str, Any]) -> None:
    fsdp = {"engine.name": "fsdp"}
    classes, numbers, measured = run_ranks(
        commands,
        2,
        [
            ("train", settings(place, "classes-fsdp", **fsdp)),
            ("train", landmarks(place, "numbers-fsdp", **fsdp)),
            ("evaluate", settings(place, "measured-fsdp", **fsdp, **trained(place, "classes"))),
        ],
    )[0]

    assert classes["losses"] == pytest.approx(single["classes"]["losses"], rel=1e-5)
    assert numbers["losses"] == pytest.approx(single["numbers"]["losses"], rel=1e-5)
    assert measured["metrics"] == pytest.approx(single["classes"]["metrics"], rel=1e-6)
    assert [row["prediction"] for row in measured["predictions"]] == [
        row["prediction"] for row in single["classes"]["predictions"]
    ]

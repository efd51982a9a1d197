"""Images: found in class folders or a table, looked at once, batches and sums, and each bad input with its place."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import mean_absolute_error, mean_squared_error
from torch import nn

from dtrain.config.schema import Config, Data, Model
from dtrain.data.images import image_row_format
from dtrain.data.resolve_source import source_kind
from dtrain.data.sources import load_sources, source_key
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from dtrain.models.compatibility import check_images
from dtrain.models.image_processor import load_processor
from dtrain.models.load import load_model
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Targets
from dtrain.training import build
from tests.support import pictures, tiny
from tests.support.fixed_logits import Says

LANDMARKS = {"name": "image_regression", "targets": ["x", "y"]}


def config(folder: Path, cache: Path, *, task: dict[str, Any] | None = None, **data: Any) -> Config:
    return Config.model_validate(
        {
            "task": task or {"name": "image_classification"},
            "model": {"from_scratch": True, "config": pictures.VIT},
            "data": {"path": folder, "cache_dir": cache, **data},
        }
    )


def prepared(folder: Path, **more: Any) -> Any:
    return build_task(config(folder, folder.parent / "cache", **more), ONE_PROCESS)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return pictures.write_class_folders(tmp_path / "colours", train=7, validation=4)


@pytest.fixture
def landmarks(tmp_path: Path) -> Path:
    return pictures.write_landmarks(tmp_path / "faces", train=5, validation=3)


# Class folders


def test_class_folders_are_found_and_their_names_are_the_labels(folders: Path) -> None:
    task = prepared(folders)

    assert source_kind(Data(path=folders)) == "class_folders"
    assert task.labels == ("blue", "green", "red")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 7, "validation": 4}
    rows = task.splits["train"][list(range(7))]
    assert all(
        path.split("/")[1] == task.labels[label] for path, label in zip(rows["image"], rows["label"], strict=True)
    )
    assert {len(digest) for digest in rows["digest"]} == {64}


def test_the_order_of_images_mixes_the_classes(tmp_path: Path) -> None:
    folder = pictures.write_class_folders(tmp_path / "colours", train=30, validation=0)

    sources = load_sources(Data(path=folder, validation_fraction=0.5), image_row_format(folder))

    assert {len(source.rows.unique("label")) for source in sources.values()} == {3}


def test_the_cache_key_has_names_sizes_and_times_of_images(folders: Path) -> None:
    before = source_key(Data(path=folders))
    assert source_key(Data(path=folders)) == before

    pictures.write_class_folders(folders, train=7, validation=4, seed=1)
    assert source_key(Data(path=folders)) != before


def test_other_pixels_under_the_same_name_change_the_row(tmp_path: Path) -> None:
    """What nodes are compared by."""
    digests = []
    for number in (0, 1):
        folder = pictures.write_class_folders(tmp_path / str(number), train=3, validation=0, seed=number)
        digests.append(load_sources(Data(path=folder), image_row_format(folder))["train"].rows["digest"][:])
    assert digests[0] != digests[1]


def test_a_batch_has_pixels_and_labels_also_for_one_image(folders: Path) -> None:
    task = prepared(folders)
    batch = task.collate(task.splits["train"][[2, 0]], tiny.HERE)
    alone = task.collate(task.splits["train"][[0]], tiny.HERE)

    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((2, 3, 16, 16), torch.float32)
    assert batch["labels"].tolist() == task.splits["train"][[2, 0]]["label"]
    assert torch.equal(alone["pixel_values"][0], batch["pixel_values"][1])
    assert task.targets(batch) == Targets(2.0, 2)


def test_records_name_the_file(folders: Path) -> None:
    records = prepared(folders).records("validation", [0, 1, 2, 0])

    assert [record["prediction"] for record in records] == ["blue", "green", "red", "blue"]
    assert all(record["image"].startswith(f"validation/{record['reference']}/") for record in records)


# Tables


def test_a_table_has_paths_relative_to_its_folder(landmarks: Path) -> None:
    task = prepared(landmarks, task=LANDMARKS)

    rows = task.splits["train"][[0, 1]]
    assert rows["image"] == ["images/train-0.png", "images/train-1.png"]
    assert task.collate(rows, tiny.HERE)["labels"].shape == (2, 2)
    assert task.head_config["id2label"] == {0: "x", 1: "y"}


def test_a_table_may_have_labels_and_columns_of_any_name(landmarks: Path) -> None:
    lines = (landmarks / "train.csv").read_text().splitlines()[1:]
    table = [f"{line.split(',')[0]},{['cat', 'dog'][number % 2]}" for number, line in enumerate(lines)]
    (landmarks / "pets.csv").write_text("\n".join(["photo,animal", *table]) + "\n")

    task = prepared(landmarks / "pets.csv", columns={"image": "photo", "label": "animal"})

    assert task.labels == ("cat", "dog")
    assert task.collate(task.splits["train"][[0]], tiny.HERE)["pixel_values"].shape == (1, 3, 16, 16)


# Numbers


def test_the_loss_is_the_sum_over_values_and_each_has_weight_one(landmarks: Path) -> None:
    task = prepared(landmarks, task=LANDMARKS)
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.tensor([[1.0, 2.0], [float("nan")] * 2])}
    model = Says([[1.5, 0.0], [9.0, 9.0]])

    scored = task.score(model, batch, lock_step=False)

    assert float(task.loss(model, batch)) == pytest.approx(0.25 + 4.0)
    assert task.targets(batch) == Targets(2.0, 2)
    assert (scored.loss.tolist(), scored.targets.tolist()) == ([4.25, 0.0], [2, 0])
    assert scored.prediction is not None
    assert scored.prediction.tolist() == [[1.5, 0.0], [9.0, 9.0]]


def test_metrics_are_those_of_scikit_learn(landmarks: Path) -> None:
    task = prepared(landmarks, task=LANDMARKS)
    truth, found = task.splits["validation"][[0, 1, 2]]["values"], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]

    assert task.metrics("validation", loss=0.0, predictions=found) == {
        "mean_squared_error": mean_squared_error(truth, found),
        "mean_absolute_error": mean_absolute_error(truth, found),
    }
    assert task.records("validation", found)[1] == {
        "image": "images/validation-1.png",
        "prediction": [0.3, 0.4],
        "reference": truth[1],
    }


def test_a_test_split_without_values_is_predicted_without_metrics(landmarks: Path) -> None:
    (landmarks / "test.csv").write_text("file\nimages/validation-0.png\n")

    task = prepared(landmarks, task=LANDMARKS, splits={"train": "train.csv", "test": "test.csv"})

    batch = task.collate(task.splits["test"][[0]], tiny.HERE)
    assert task.targets(batch) == Targets(0.0, 0)
    assert task.metrics("test", loss=0.0, predictions=[[0.0, 0.0]]) == {}


# Models


@pytest.mark.parametrize("shape", [pictures.VIT, pictures.RESNET], ids=["vit", "resnet"])
def test_a_new_image_model_has_an_output_for_each_label(folders: Path, shape: Any) -> None:
    task = prepared(folders)
    settings = config(folders, folders).model.model_copy(update={"config": shape})

    model: nn.Module = load_model(settings, head=task.head, head_config=task.head_config, tokenizer=None, seed=0)

    batch = task.collate(task.splits["train"][[0, 1]], tiny.HERE)
    assert model(pixel_values=batch["pixel_values"]).logits.shape == (2, 3)
    assert torch.isfinite(task.loss(model, batch))


def test_a_wrong_image_size_is_refused_before_the_first_step(folders: Path) -> None:
    settings = config(folders, folders.parent / "cache", task={"name": "image_classification", "image_size": 24})

    with pytest.raises(ConfigError, match=r"The images are 24 x 24 with 3 channel\(s\).*Set task.image_size=16"):
        build.load(settings, build_task(settings, ONE_PROCESS), ONE_PROCESS)


def test_checking_the_image_size_keeps_running_statistics() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3)).train()
    module.forward = lambda pixel_values: module[0](pixel_values + 1.0)  # type: ignore[method-assign]

    check_images(module, (3, 4, 4))

    assert module.training
    assert module[0].training
    assert float(module[0].running_mean.abs().max()) == 0.0


# What a viewer shows


def test_images_of_more_bits_and_landmarks_on_rotated_photos_are_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The pixels of the two classes differ by their upper byte alone, and by the photo's rotation."""
    dark, light = (np.full((8, 8), value, np.uint16) for value in (1000, 60000))
    folder = pictures.write_classes(
        tmp_path / "deep",
        {
            "dark": [("a.png", Image.fromarray(dark), {})],
            "light": [("b.png", Image.fromarray(light), {}), ("notes.txt.png", Image.new("RGBA", (4, 4)), {})],
        },
    )
    (folder / "train" / "dark" / "c.heic").write_bytes(b"?")
    (folder / "train" / "dark" / "._a.png").write_bytes(b"?")

    with caplog.at_level(logging.INFO, logger="dtrain"):
        task = prepared(folder)

    rows = task.splits["train"][[0, 1, 2]]
    mean = dict(zip(rows["image"], task.collate(rows, tiny.HERE)["pixel_values"].mean((1, 2, 3)).tolist(), strict=True))
    assert mean["train/dark/a.png"] == pytest.approx(1000 / 65535 * 2 - 1, abs=1e-5)
    assert mean["train/light/b.png"] == pytest.approx(60000 / 65535 * 2 - 1, abs=1e-5)
    assert mean["train/light/notes.txt.png"] == pytest.approx(1.0)
    assert "2 image(s) have more than 8 bits per pixel" in caplog.text
    assert "1 image(s) have transparent pixels, which are read as white" in caplog.text
    assert "train/dark: 1 file(s) are not read, such as c.heic" in caplog.text


def test_a_rotated_photo_gives_the_pixels_of_the_upright_one(landmarks: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, rotated = landmarks / "images" / "train-0.png", landmarks / "images" / "train-1.png"
    with Image.open(upright) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(rotated, exif=exif)

    with caplog.at_level(logging.INFO, logger="dtrain"):
        task = prepared(landmarks, task=LANDMARKS)

    pixels = task.collate(task.splits["train"][[0, 1]], tiny.HERE)["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])
    assert "train: 1 image(s) have an EXIF orientation and are read upright" in caplog.text


def test_the_range_of_pixels_is_a_setting_and_saved_with_the_model(tmp_path: Path) -> None:
    folder = pictures.write_classes(
        tmp_path / "scans",
        {
            name: [(f"{name}.tif", Image.fromarray(np.full((8, 8), value, np.int32)), {})]
            for name, value in {"dark": 0, "light": 4000}.items()
        },
    )
    with pytest.raises(DataError, match=r"32-bit integers .*task.pixel_range='\[0, 0\]'"):
        prepared(folder)

    task = prepared(folder, task={"name": "image_classification", "pixel_range": [0, 4000]})
    task.processor.save_pretrained(str(tmp_path))
    model = Model(from_scratch=True, config=pictures.VIT)

    pixels = task.collate(task.splits["train"][[0, 1]], tiny.HERE)["pixel_values"].mean((1, 2, 3))
    assert sorted(pixels.tolist()) == [-1.0, 1.0]
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["pixel_range"] == [0.0, 4000.0]
    assert load_processor(model, image_size=None).pixel_range is None


# What is refused


def test_a_truncated_photo_is_a_bad_row_before_training(landmarks: Path) -> None:
    file = landmarks / "images" / "train-2.png"
    with Image.open(file) as image:
        image.resize((64, 64)).save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:-300])

    with pytest.raises(DataError, match=r"train.csv, line 4: .*train-2.png cannot be decoded: .*truncated"):
        prepared(landmarks, task=LANDMARKS)
    assert len(prepared(landmarks, task=LANDMARKS, max_bad_rows=1).splits["train"]) == 4


def test_an_image_that_changes_after_the_check_is_named(landmarks: Path) -> None:
    task = prepared(landmarks, task=LANDMARKS)
    pictures.draw(landmarks / "images" / "train-0.png", (1, 2, 3), random.Random(9))

    with pytest.raises(DataError, match=r"train-0.png has changed since the data was prepared. Restore it"):
        task.collate(task.splits["train"][[0]], tiny.HERE)


def test_a_file_that_is_not_an_image_is_named_by_line_and_can_be_skipped(landmarks: Path) -> None:
    (landmarks / "images" / "train-2.png").write_text("not an image")

    with pytest.raises(
        DataError, match=r"train.csv, line 4: .*images/train-2.png is not an image: Pillow does not recognize"
    ):
        prepared(landmarks, task=LANDMARKS)
    assert len(prepared(landmarks, task=LANDMARKS, max_bad_rows=1).splits["train"]) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/gone.png,0.1,0.2", r"train.csv, line 7: the image .*images/gone.png cannot be read: No such file"),
        ("images,0.1,0.2", r"line 7: the image .*images cannot be read: it is not a file with content, but a folder"),
        ("/dev/zero,0.1,0.2", r"line 7: the image /dev/zero cannot be read: .* but a device or a pipe"),
        (",0.1,0.2", r"line 7: an image is the path of a file, found ''"),
        ("images/train-0.png,left,0.2", r"line 7: x must be a number, found 'left'"),
        ("images/train-0.png,0.1,nan", r"line 7: y must be a number, found 'nan'"),
        ("images/train-0.png,,0.2", r"line 7: x must be a number, found ''"),
    ],
)
def test_a_bad_row_is_named(landmarks: Path, line: str, message: str) -> None:
    with (landmarks / "train.csv").open("a") as file:
        file.write(f"{line}\n")

    with pytest.raises(DataError, match=message):
        prepared(landmarks, task=LANDMARKS)


def test_a_damaged_image_of_a_class_is_named(folders: Path) -> None:
    file = sorted((folders / "train" / "red").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])

    with pytest.raises(DataError, match=rf"train/red/{file.name} cannot be decoded: .*truncated"):
        prepared(folders)


def test_a_class_without_images_is_refused(folders: Path) -> None:
    (folders / "train" / "black").mkdir()

    with pytest.raises(DataError, match=r"train/black holds no image"):
        prepared(folders)


def test_a_class_that_was_not_trained_on_is_refused(folders: Path) -> None:
    (folders / "validation" / "red").rename(folders / "validation" / "white")

    with pytest.raises(DataError, match=r"'white' is not one of the known labels: blue, green, red"):
        prepared(folders)


def test_columns_that_are_not_there_are_refused(landmarks: Path, folders: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'z', which task.targets names. Its columns: file, x, y"):
        prepared(landmarks, task={**LANDMARKS, "targets": ["x", "z"]})
    with pytest.raises(DataError, match=r"no column with a usual name for the label"):
        prepared(landmarks)
    with pytest.raises(DataError, match=r"no column 'x', which task.targets names. Its columns: image, label"):
        prepared(folders, task=LANDMARKS)
    (landmarks / "train.csv").write_text("number,x,y\n1,0.1,0.2\n")
    with pytest.raises(DataError, match=r"no column with a usual name for the image"):
        prepared(landmarks, task=LANDMARKS)


def test_images_come_from_a_path(tmp_path: Path) -> None:
    settings = config(tmp_path, tmp_path).model_copy(update={"data": Data(name="cola")})

    with pytest.raises(ConfigError, match=r"task.name=image_classification reads images from data.path"):
        build_task(settings, ONE_PROCESS)

"""Images are processed as transformers' own processors do, or the processor is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, ResNetConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dtrain.config import schema
from dtrain.errors import CheckpointError, ConfigError, DataError
from dtrain.models.image_processor import load_processor
from tests.support import pictures

SQUARE = {"do_resize": True, "size": {"height": 12, "width": 10}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3}
CLIP = {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 11}, "resample": 3}
CONVNEXT = {"size": {"shortest_edge": 14}, "crop_pct": 0.875, "resample": 3}
WARPED = {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3}
NEW = schema.Model(from_scratch=True, config=pictures.VIT)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "wide.png"
    pictures.draw(file, (120, 60, 200), random.Random(0), size=(31, 17))
    return file


def brings(folder: Path, content: dict[str, Any]) -> schema.Model:
    """Returns a model folder with this preprocessor_config.json and empty weights."""
    ResNetConfig().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return schema.Model(name_or_path=str(folder))


@pytest.mark.parametrize("shape", [(31, 17), (17, 31), (9, 9)])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (ViTImageProcessorPil, SQUARE),
        (CLIPImageProcessorPil, CLIP),
        (ConvNextImageProcessorPil, CONVNEXT),
        (ConvNextImageProcessorPil, WARPED),
    ],
    ids=["square", "cropped", "convnext", "warped"],
)
def test_pixels_equal_those_of_transformers(
    tmp_path: Path, kind: Any, content: dict[str, Any], shape: tuple[int, int]
) -> None:
    file = tmp_path / "image.png"
    pictures.draw(file, (120, 60, 200), random.Random(0), size=shape)
    theirs = kind(**content)
    written = theirs.to_dict()

    ours = load_processor(brings(tmp_path, written), image_size=None)(file)

    with Image.open(file) as opened:
        expected = theirs(images=opened.convert("RGB"), return_tensors="np")["pixel_values"][0]
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-5


def test_a_model_without_a_processor_gets_its_own_size_and_mean_one_half(image: Path, tmp_path: Path) -> None:
    processor = load_processor(NEW, image_size=None)

    pixels = processor(image)
    assert pixels.shape == (3, 16, 16)
    with Image.open(image) as opened:
        by_hand = np.asarray(opened.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float64) / 127.5 - 1
    assert np.abs(pixels.transpose(1, 2, 0) - by_hand).max() < 1e-6


def test_transformers_reads_the_saved_processor_with_the_same_pixels(image: Path, tmp_path: Path) -> None:
    processor = load_processor(NEW, image_size=12)
    processor.save_pretrained(str(tmp_path))

    theirs = ViTImageProcessorPil.from_pretrained(tmp_path)
    with Image.open(image) as opened:
        expected = theirs(images=opened, return_tensors="np")["pixel_values"][0]
    assert expected.shape == (3, 12, 12)
    assert np.abs(processor(image) - expected).max() < 1e-6


def test_a_models_processor_is_saved_unchanged_and_its_size_can_be_overridden(image: Path, tmp_path: Path) -> None:
    model = brings(tmp_path / "model", CONVNEXT | {"image_mean": [0.1, 0.2, 0.3], "strange": 1})
    load_processor(model, image_size=None).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["strange"] == 1

    square = load_processor(model, image_size=9)
    assert square(image).shape == (3, 9, 9)
    assert square.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"size": 13}, (13, 13)),
        ({"size": 14, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor"}, (14, 14)),
        ({"size": 14, "crop_size": 9, "do_center_crop": True}, (9, 9)),
    ],
    ids=["square", "convnext", "cropped"],
)
def test_plain_numbers_of_older_files_are_understood(
    image: Path, tmp_path: Path, content: dict[str, Any], size: tuple[int, int]
) -> None:
    assert load_processor(brings(tmp_path, content), image_size=None)(image).shape == (3, *size)


def test_gray_images_for_a_gray_model(image: Path) -> None:
    gray = schema.Model(from_scratch=True, config={**pictures.VIT, "num_channels": 1})

    assert load_processor(gray, image_size=None)(image).shape == (1, 16, 16)


@pytest.mark.parametrize(
    "content",
    [
        {"size": {"longest_edge": 30}},
        {"size": {"shortest_edge": 30}},
        {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": 12},
        {"size": {"height": 8, "width": 8}, "do_pad": True},
        {"size": {"height": 8, "width": 8}, "do_resize": False},
    ],
)
def test_a_processor_that_gives_images_of_different_sizes_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"does not support the image sizes in its preprocessor_config.json .*Set task.image_size"
    ):
        load_processor(brings(tmp_path, content), image_size=None)


def test_channels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 means and 3 deviations for 3 channels"):
        load_processor(brings(tmp_path, {**SQUARE, "image_mean": [0.5, 0.5]}), image_size=None)
    with pytest.raises(ConfigError, match="vit model with 4 channels"):
        load_processor(schema.Model(from_scratch=True, config={**pictures.VIT, "num_channels": 4}), image_size=None)


def test_a_damaged_file_of_the_model_is_a_checkpoint_error(tmp_path: Path) -> None:
    model = brings(tmp_path, SQUARE)
    (tmp_path / "preprocessor_config.json").write_text("{")

    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is damaged"):
        load_processor(model, image_size=None)


def test_an_image_that_was_damaged_after_the_check_is_named(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=r"wide.png cannot be decoded"):
        load_processor(NEW, image_size=None)(image)

    image.unlink()
    with pytest.raises(DataError, match=r"wide.png cannot be decoded.*No such file"):
        load_processor(NEW, image_size=None)(image)


def test_a_text_model_gets_the_default_processor(image: Path) -> None:
    """Images get the default size. Loading the model later reports that it has no image head."""
    assert isinstance(BertConfig(), object)
    text = schema.Model(from_scratch=True, config={"model_type": "bert"})
    assert torch.from_numpy(load_processor(text, image_size=None)(image)).shape == (3, 224, 224)


@pytest.mark.parametrize(
    "content",
    [
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": {"height": 8, "width": 0}},
        {"size": {"height": "wide", "width": 8}},
        {"size": {"shortest_edge": 10**9}, "crop_size": 8, "do_center_crop": True},
        {"size": {"shortest_edge": 300}, "crop_pct": 1e-300, "image_processor_type": "ConvNextImageProcessor"},
        {"size": {"shortest_edge": 300}, "crop_pct": 1e-9, "image_processor_type": "ConvNextImageProcessor"},
    ],
    ids=str,
)
def test_sizes_that_no_image_has_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config.json .*[Ss]et task.image_size"):
        load_processor(brings(tmp_path, content), image_size=None)

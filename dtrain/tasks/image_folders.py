"""Functions that image tasks share: the folder of the files, their rows, and batches of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.config.schema import Config
from dtrain.data.images import image_row_format
from dtrain.data.resolve_source import source_kind, source_path
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.image_processor import PixelProcessor
from dtrain.tasks.prepare import Examples, Meta, Recipe, prepare_examples
from dtrain.tasks.protocol import Batch


def image_folder(config: Config) -> Path:
    """Returns the folder that the paths in rows are relative to.

    Raises:
        ConfigError: the data cannot name image files.
    """
    if config.data.path is None or source_kind(config.data) not in ("class_folders", "files"):
        raise ConfigError(
            f"task.name={config.task.name} reads images from data.path: a folder with train/<class>/*.png, or a table "
            "(CSV, ...) with a column of paths. Set data.path and remove data.name."
        )
    place = source_path(config.data)
    return place if place.is_dir() else place.parent


def prepare_images(
    config: Config, context: RankContext, *, targets: Sequence[str], encode: Any, describe: Any, options: Meta
) -> Examples:
    """Collective. Prepares rows with paths, digests, and labels or values. One rank per node checks each file once."""
    recipe = Recipe(
        config.task.name,
        image_row_format(image_folder(config), targets),
        texts=lambda _source: (),
        encode=encode,
        describe=describe,
        options=options,
        needs_padding=False,
        has_text=False,
    )
    return prepare_examples(recipe, config, context)


def read_pixels(rows: Mapping[str, Sequence[Any]], folder: Path, processor: PixelProcessor) -> Batch:
    """Reads the images of these rows: pixel_values (batch, channels, height, width) float32.

    Raises:
        DataError: an image is missing or cannot be decoded.
    """
    return {"pixel_values": torch.from_numpy(np.stack([processor(folder / path) for path in rows["image"]]))}

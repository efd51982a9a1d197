"""What the tasks of images share: where their files are, their rows, and batches of pixels."""

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


def folder_of(config: Config) -> Path:
    """The folder that kept paths are relative to.

    Raises:
        ConfigError: the data is not of a kind that can name image files.
    """
    if config.data.path is None or source_kind(config.data) not in ("class_folders", "files"):
        raise ConfigError(
            f"task.name={config.task.name} reads images from data.path: a folder with train/<class>/*.png, or a table "
            "(CSV, ...) with a column of paths. Set it, without data.name"
        )
    place = source_path(config.data)
    return place if place.is_dir() else place.parent


def prepare_images(
    config: Config, context: RankContext, *, targets: Sequence[str], encode: Any, describe: Any, options: Meta
) -> Examples:
    """Collective. Paths, digests and what `encode` makes of labels or values; each file is looked at once per node."""
    recipe = Recipe(
        config.task.name,
        image_row_format(folder_of(config), targets),
        texts=lambda _source: (),
        encode=encode,
        describe=describe,
        options=options,
        needs_padding=False,
        has_text=False,
    )
    return prepare_examples(recipe, config, context)


def pixels(rows: Mapping[str, Sequence[Any]], folder: Path, processor: PixelProcessor) -> Batch:
    """The images of these rows, read now: pixel_values (batch, channels, height, width) float32.

    Raises:
        DataError: an image that is gone or cannot be decoded.
    """
    return {"pixel_values": torch.from_numpy(np.stack([processor(folder / path) for path in rows["image"]]))}

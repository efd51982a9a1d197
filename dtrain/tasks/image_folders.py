"""Functions that image tasks share: the folder of the files, their rows, and batches of pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.columns import column_values
from dtrain.data.images import image_row_format
from dtrain.data.resolve_source import source_kind, source_path
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.image_processor import PixelProcessor
from dtrain.tasks.prepare import Examples, Meta, Recipe, prepare_examples
from dtrain.tasks.protocol import Batch

TRAITS = {
    "rotated": "have an EXIF orientation and are read upright, as viewers show them; coordinates must refer to that view",
    "transparent": "have transparent pixels, which are read as white",
    "deep": "have more than 8 bits per pixel; task.pixel_range sets which values are black and white",
    "frames": "have several frames or pages; the first one is read",
}
"""What the log says of images that have a trait (see image_file.ImageTraits)."""


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
    config: Config,
    context: RankContext,
    *,
    processor: PixelProcessor,
    targets: Sequence[str],
    encode: Any,
    describe: Any,
    options: Meta,
) -> Examples:
    """Collective. Prepares rows with paths, digests, and labels or values. One rank per node checks each file once."""
    recipe = Recipe(
        config.task.name,
        image_row_format(image_folder(config), targets, pixel_range=processor.pixel_range),
        texts=lambda _source: (),
        encode=encode,
        describe=lambda sources, tokenizer: {**describe(sources, tokenizer), "traits": _count_traits(sources)},
        options={**options, "pixel_range": processor.pixel_range and list(processor.pixel_range)},
        needs_padding=False,
        has_text=False,
    )
    examples = prepare_examples(recipe, config, context)
    for split, counts in examples.meta["traits"].items():
        for trait, number in counts.items():
            log.info("data: %s: %d image(s) %s", split, number, TRAITS[trait])
    return examples


def _count_traits(sources: Mapping[str, Source]) -> dict[str, dict[str, int]]:
    counts = {
        split: Counter(chain.from_iterable(column_values(source.rows, "traits"))) for split, source in sources.items()
    }
    return {split: {trait: found[trait] for trait in TRAITS if found[trait]} for split, found in counts.items()}


def read_pixels(rows: Mapping[str, Sequence[Any]], folder: Path, processor: PixelProcessor) -> Batch:
    """Reads the images of these rows: pixel_values (batch, channels, height, width) float32.

    Raises:
        DataError: an image is missing, cannot be decoded, or has changed since the data was prepared.
    """
    files = zip(rows["image"], rows["digest"], strict=True)
    pixels = [processor(folder / path, digest=digest) for path, digest in files]
    return {"pixel_values": torch.from_numpy(np.stack(pixels))}

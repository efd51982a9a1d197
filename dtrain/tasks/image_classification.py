"""One label for an image. Pixels are read when a batch is made, one image after the other, and kept nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from dtrain.config.schema import Config
from dtrain.config.task import Head, ImageClassification
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.models.image_processor import PixelProcessor, load_processor
from dtrain.tasks.classification import ClassificationTask, ordered_labels
from dtrain.tasks.image_folders import folder_of, pixels, prepare_images
from dtrain.tasks.prepare import Meta, columns_of, known_labels, map_rows
from dtrain.tasks.protocol import Batch, Split
from dtrain.tasks.tensors import label_tensor


class ImageClassificationTask(ClassificationTask):
    """Loss and metrics of classification, over images."""

    name = "image_classification"
    head: Head = "image_classification"
    needs_padding = False

    def __init__(
        self,
        splits: Mapping[str, Split],
        processor: PixelProcessor,
        labels: Sequence[str],
        settings: ImageClassification,
        *,
        folder: Path,
    ) -> None:
        """
        Args:
            splits: rows with `image`, a path below folder, and `label`, an index into `labels`.
            processor: makes pixels of files; saved beside the model.
        """
        super().__init__(splits, None, labels, settings, max_length=0)
        self.processor = processor
        self._folder = folder

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        return {**pixels(rows, self._folder, self.processor), "labels": label_tensor(rows["label"])}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        files = columns_of(self.splits[split], "image")["image"]
        judged = super().records(split, predictions)
        return [{"image": file, **record} for file, record in zip(files, judged, strict=True)]


def prepare_image_classification(
    config: Config, settings: ImageClassification, context: RankContext
) -> ImageClassificationTask:
    """Collective. Finds and checks the images of each split once per node and fixes the order of the labels."""
    folder = folder_of(config)
    processor = load_processor(config.model, image_size=settings.image_size)
    order = known_labels(config, context)

    def describe(sources: Mapping[str, Source], _tokenizer: Any) -> dict[str, list[str]]:
        return {"labels": ordered_labels(sources, order, config.model.name_or_path)}

    def encode(source: Source, _tokenizer: Any, meta: Meta) -> Dataset:
        identity = {name: index for index, name in enumerate(meta["labels"])}

        def number(rows: Mapping[str, Any]) -> dict[str, Any]:
            labels = rows.get("label") or [None] * len(rows["image"])
            found = [None if label is None else identity[label] for label in labels]
            return {"image": rows["image"], "digest": rows["digest"], "label": found}

        return map_rows(source, number, config)

    options = {"labels": None if order is None else list(order)}
    examples = prepare_images(config, context, targets=(), encode=encode, describe=describe, options=options)
    labels = [str(name) for name in examples.meta["labels"]]
    return ImageClassificationTask(examples.splits, processor, labels, settings, folder=folder)

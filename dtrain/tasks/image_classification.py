"""One label for an image. Pixels are read one image at a time when a batch is made, and are not cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForImageClassification

from dtrain.config.schema import Config
from dtrain.config.task import ImageClassification
from dtrain.data.images import IMAGE_COLUMNS
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.models.heads import Head
from dtrain.models.image_processor import PixelProcessor, load_processor
from dtrain.tasks.classification import ClassificationTask, choose_label_order
from dtrain.tasks.image_folders import image_folder, prepare_images, read_pixels
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, map_rows, pretrained_labels, read_columns
from dtrain.tasks.protocol import Batch, Split
from dtrain.tasks.tensors import label_tensor

HEAD = Head(
    "image_classification",
    AutoModelForImageClassification,
    has_label_names=True,
    problem_type="single_label_classification",
)


def info(settings: ImageClassification) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_image_classification(config, settings, context),
        head=HEAD,
        example_row={"image": "cat.png"},
        text_columns=("image",),
        path_columns=IMAGE_COLUMNS,
        pipeline_tag="image-classification",
    )


class ImageClassificationTask(ClassificationTask):
    """The loss and metrics of classification, for images."""

    name = "image_classification"
    head = HEAD
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
            splits: Rows with `image`, a path relative to folder, and `label`, an index into `labels`.
            processor: Converts files to pixels. It is saved with the model.
        """
        super().__init__(splits, None, labels, settings, max_length=0)
        self.processor = processor
        self._folder = folder

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        return {**read_pixels(rows, self._folder, self.processor), "labels": label_tensor(rows["label"])}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        files = read_columns(self.splits[split], "image")["image"]
        records = super().records(split, predictions)
        return [{"image": file, **record} for file, record in zip(files, records, strict=True)]


def prepare_image_classification(
    config: Config, settings: ImageClassification, context: RankContext
) -> ImageClassificationTask:
    """Collective. Finds and checks the images of each split, once per node, and fixes the order of the labels."""
    folder = image_folder(config)
    processor = load_processor(config.model, image_size=settings.image_size, pixel_range=settings.pixel_range)
    order = pretrained_labels(config, context)

    def describe(sources: Mapping[str, Source], _tokenizer: Any) -> dict[str, list[str]]:
        return {"labels": choose_label_order(sources, order, config.model.name_or_path)}

    def encode(source: Source, _tokenizer: Any, meta: Meta) -> Dataset:
        identity = {name: index for index, name in enumerate(meta["labels"])}

        def number_labels(rows: Mapping[str, Any]) -> dict[str, Any]:
            labels = rows.get("label") or [None] * len(rows["image"])
            numbers = [None if label is None else identity[label] for label in labels]
            return {"image": rows["image"], "digest": rows["digest"], "label": numbers}

        return map_rows(source, number_labels, config)

    options = {"labels": None if order is None else list(order)}
    examples = prepare_images(
        config, context, processor=processor, targets=(), encode=encode, describe=describe, options=options
    )
    labels = [str(name) for name in examples.meta["labels"]]
    return ImageClassificationTask(examples.splits, processor, labels, settings, folder=folder)

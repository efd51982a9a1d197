"""Numbers for an image, such as the positions of landmarks. The loss is the squared error; each number is a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForImageClassification

from dtrain.config.schema import Config
from dtrain.config.task import ImageRegression
from dtrain.data.images import IMAGE_COLUMNS
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.heads import Head
from dtrain.models.image_processor import PixelProcessor, load_processor
from dtrain.tasks.image_folders import image_folder, prepare_images, read_pixels
from dtrain.tasks.info import TaskInfo, format_value
from dtrain.tasks.prepare import Meta, label_config, map_rows, pretrained_labels, read_columns
from dtrain.tasks.protocol import Batch, ScoredBatch, Split, Targets
from dtrain.tasks.tensors import full_precision

HEAD = Head("image_regression", AutoModelForImageClassification, problem_type="regression")


def info(settings: ImageRegression) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_image_regression(config, settings, context),
        head=HEAD,
        example_row={"image": "cat.png"},
        text_columns=("image",),
        path_columns=IMAGE_COLUMNS,
        format_prediction=lambda values, _row, _columns: _format_values(settings.targets, values),
    )


def _format_values(names: Sequence[str], values: Sequence[float]) -> str:
    return ", ".join(f"{name} {format_value(value)}" for name, value in zip(names, values, strict=True))


class ImageRegressionTask:
    """Sum of squared errors over all values. Metrics: mean squared and mean absolute error from scikit-learn."""

    name = "image_regression"
    head = HEAD
    needs_padding = False
    max_length = 0
    tokenizer = None
    metric_names: Sequence[str] = ("mean_squared_error", "mean_absolute_error")

    def __init__(
        self, splits: Mapping[str, Split], processor: PixelProcessor, targets: Sequence[str], *, folder: Path
    ) -> None:
        """
        Args:
            splits: Rows with `image`, a path relative to folder, and `values`, a number per target. None: no targets.
            targets: Names of the numbers, in the order of the model's outputs.
        """
        self.splits: Mapping[str, Split] = splits
        self.processor = processor
        self.names = tuple(targets)
        self.head_config: dict[str, Any] = label_config(targets)
        self._folder = folder

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        """Returns pixel_values, and labels (batch, targets) float64, nan for an example without targets."""
        values = [[math.nan] * len(self.names) if row is None else row for row in rows["values"]]
        return {**read_pixels(rows, self._folder, self.processor), "labels": torch.tensor(values, dtype=torch.float64)}

    def targets(self, batch: Batch) -> Targets:
        count = int((~batch["labels"].isnan()).sum())
        return Targets(float(count), count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return _errors(model, batch)[0].sum()

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        squares, outputs = _errors(module, batch)
        targets = (~batch["labels"].isnan()).sum(dim=1)
        return ScoredBatch(squares.double().sum(dim=1), targets, outputs.double())

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import mean_absolute_error, mean_squared_error

        pairs = [
            (expected, predicted)
            for expected, predicted in zip(self._column(split, "values"), predictions, strict=True)
            if expected is not None
        ]
        if not pairs:
            return {}
        expected, predicted = zip(*pairs, strict=True)
        return {
            "mean_squared_error": float(mean_squared_error(expected, predicted)),
            "mean_absolute_error": float(mean_absolute_error(expected, predicted)),
        }

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        columns = zip(self._column(split, "image"), predictions, self._column(split, "values"), strict=True)
        return [
            {"image": file, "prediction": predicted, "reference": expected} for file, predicted, expected in columns
        ]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        return [{"prediction": values} for values in _errors(module, batch)[1].tolist()]

    def _column(self, split: str, name: str) -> Sequence[Any]:
        return read_columns(self.splits[split], name)[name]


def prepare_image_regression(config: Config, settings: ImageRegression, context: RankContext) -> ImageRegressionTask:
    """Collective. Finds and checks the images and numbers of each split, once per node."""
    processor = load_processor(config.model, image_size=settings.image_size, pixel_range=settings.pixel_range)
    known = pretrained_labels(config, context)
    if known is not None and set(known) == set(settings.targets) and known != settings.targets:
        raise ConfigError(
            f"task.targets={list(settings.targets)}, but the outputs of model.name_or_path={config.model.name_or_path} "
            f"are {list(known)}. Write task.targets in this order."
        )

    def encode(source: Source, _tokenizer: Any, _meta: Meta) -> Dataset:
        def keep(rows: Mapping[str, Any]) -> dict[str, Any]:
            values = rows.get("values") or [None] * len(rows["image"])
            return {"image": rows["image"], "digest": rows["digest"], "values": values}

        return map_rows(source, keep, config)

    examples = prepare_images(
        config,
        context,
        processor=processor,
        targets=settings.targets,
        encode=encode,
        describe=lambda _sources, _tokenizer: {},
        options={"targets": list(settings.targets)},
    )
    return ImageRegressionTask(examples.splits, processor, settings.targets, folder=image_folder(config))


def _errors(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns squared errors, 0 without a target, and outputs: (batch, targets) each."""
    outputs = full_precision(model(pixel_values=batch["pixel_values"]).logits)
    labels = batch["labels"]
    differences = torch.where(labels.isnan(), 0.0, outputs - labels.to(outputs.dtype))
    return differences.square(), outputs

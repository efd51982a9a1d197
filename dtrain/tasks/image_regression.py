"""Numbers for an image, such as the places of landmarks: squared error, each number a target of weight 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Head, ImageRegression
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.image_processor import PixelProcessor, load_processor
from dtrain.tasks.image_folders import folder_of, pixels, prepare_images
from dtrain.tasks.prepare import Meta, columns_of, known_labels, label_outputs, map_rows
from dtrain.tasks.protocol import Batch, Scored, Split, Targets
from dtrain.tasks.tensors import full_precision


class ImageRegressionTask:
    """Sum of squared errors over values; mean squared and mean absolute error by scikit-learn."""

    name = "image_regression"
    head: Head = "image_regression"
    needs_padding = False
    max_length = 0
    tokenizer = None
    metric_names: Sequence[str] = ("mean_squared_error", "mean_absolute_error")

    def __init__(
        self, splits: Mapping[str, Split], processor: PixelProcessor, targets: Sequence[str], *, folder: Path
    ) -> None:
        """
        Args:
            splits: rows with `image`, a path below folder, and `values`, a number per target, or None without them.
            targets: names of the numbers, in the order of the model's outputs.
        """
        self.splits: Mapping[str, Split] = splits
        self.processor = processor
        self.names = tuple(targets)
        self.head_config: dict[str, Any] = label_outputs(targets)
        self._folder = folder

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        """labels: (batch, targets) float64, nan where an example has none."""
        values = [[math.nan] * len(self.names) if row is None else row for row in rows["values"]]
        return {**pixels(rows, self._folder, self.processor), "labels": torch.tensor(values, dtype=torch.float64)}

    def targets(self, batch: Batch) -> Targets:
        count = int((~batch["labels"].isnan()).sum())
        return Targets(float(count), count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return _errors(model, batch)[0].sum()

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        squares, found = _errors(module, batch)
        targets = (~batch["labels"].isnan()).sum(dim=1)
        return Scored(squares.double().sum(dim=1), targets, found.double())

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import mean_absolute_error, mean_squared_error

        judged = [
            (truth, found)
            for truth, found in zip(self._column(split, "values"), predictions, strict=True)
            if truth is not None
        ]
        if not judged:
            return {}
        truth, found = zip(*judged, strict=True)
        return {
            "mean_squared_error": float(mean_squared_error(truth, found)),
            "mean_absolute_error": float(mean_absolute_error(truth, found)),
        }

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        columns = zip(self._column(split, "image"), predictions, self._column(split, "values"), strict=True)
        return [{"image": file, "prediction": found, "reference": truth} for file, found, truth in columns]

    def answers(self, module: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
        return [{"prediction": values} for values in _errors(module, batch)[1].tolist()]

    def _column(self, split: str, name: str) -> Sequence[Any]:
        return columns_of(self.splits[split], name)[name]


def prepare_image_regression(config: Config, settings: ImageRegression, context: RankContext) -> ImageRegressionTask:
    """Collective. Finds and checks the images of each split, and their numbers, once per node."""
    processor = load_processor(config.model, image_size=settings.image_size)
    known = known_labels(config, context)
    if known is not None and set(known) == set(settings.targets) and known != settings.targets:
        raise ConfigError(
            f"task.targets={list(settings.targets)}, but the outputs of model.name_or_path={config.model.name_or_path} "
            f"are {list(known)}, in this order: give them in the same."
        )

    def encode(source: Source, _tokenizer: Any, _meta: Meta) -> Dataset:
        def keep(rows: Mapping[str, Any]) -> dict[str, Any]:
            values = rows.get("values") or [None] * len(rows["image"])
            return {"image": rows["image"], "digest": rows["digest"], "values": values}

        return map_rows(source, keep, config)

    examples = prepare_images(
        config,
        context,
        targets=settings.targets,
        encode=encode,
        describe=lambda _sources, _tokenizer: {},
        options={"targets": list(settings.targets)},
    )
    return ImageRegressionTask(examples.splits, processor, settings.targets, folder=folder_of(config))


def _errors(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors, 0 where there is no target, and outputs: (batch, targets) each."""
    found = full_precision(model(pixel_values=batch["pixel_values"]).logits)
    labels = batch["labels"]
    differences = torch.where(labels.isnan(), 0.0, found - labels.to(found.dtype))
    return differences.square(), found

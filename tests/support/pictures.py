"""Small images and models that look at them, made on the spot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"blue": (30, 40, 200), "green": (40, 190, 60), "red": (210, 40, 30)}

RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}


def draw(file: Path, colour: tuple[int, int, int], rng: random.Random, *, size: tuple[int, int] = (20, 16)) -> None:
    """A file of noise around a colour; size: (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = [max(0, min(255, part + rng.randint(-60, 60))) for _ in range(size[0] * size[1]) for part in colour]
    Image.frombytes("RGB", size, bytes(numbers)).save(file)


def write_class_folders(folder: Path, *, train: int, validation: int, seed: int = 0) -> Path:
    """train/<colour>/*.png and validation/<colour>/*.png, so many in each split over all classes."""
    rng = random.Random(seed)
    for split, count in (("train", train), ("validation", validation)):
        for number in range(count):
            name = list(COLOURS)[number % len(COLOURS)]
            draw(folder / split / name / f"{number}.png", COLOURS[name], rng)
    return folder


def write_landmarks(folder: Path, *, train: int, validation: int, seed: int = 0) -> Path:
    """train.csv and validation.csv with file, x and y, and the images in images/."""
    rng = random.Random(seed)
    for split, count in (("train", train), ("validation", validation)):
        lines = ["file,x,y"]
        for number in range(count):
            x, y = rng.random(), rng.random()
            draw(folder / "images" / f"{split}-{number}.png", (int(255 * x), int(255 * y), 0), rng)
            lines.append(f"images/{split}-{number}.png,{x:.3f},{y:.3f}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_classes(folder: Path, images: dict[str, list[tuple[str, Image.Image, dict[str, Any]]]]) -> Path:
    """train/<class>/<name> with each image, saved with these arguments."""
    for label, files in images.items():
        (folder / "train" / label).mkdir(parents=True)
        for name, image, options in files:
            image.save(folder / "train" / label / name, **options)
    return folder

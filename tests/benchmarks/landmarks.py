"""Draws faces with two eyes, for configs/image_regression.yaml, and a table of where the eyes are.

    python tests/benchmarks/landmarks.py --make data/landmarks
    python dtrain/main.py --config configs/image_regression.yaml

Each image is 48 x 48: a face of its own size, place, tilt and colour before noise. train.csv and validation.csv name the
images, and the eyes by columns from 0 (left, top) to 1 (right, bottom).
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from dtrain.config.option_parser import OptionParser

SIZE = 48
TARGETS = ("left_eye_x", "left_eye_y", "right_eye_x", "right_eye_y")


def face(rng: random.Random) -> tuple[Image.Image, list[float]]:
    """An image and the places of its two eyes, as shares of its edges."""
    noise = bytes(rng.randrange(96) for _ in range(3 * SIZE * SIZE))
    image = Image.frombytes("RGB", (SIZE, SIZE), noise)
    pen = ImageDraw.Draw(image)
    radius = rng.uniform(0.2, 0.3) * SIZE
    x, y = (rng.uniform(radius, SIZE - radius) for _ in range(2))
    colour = tuple(rng.randrange(140, 256) for _ in range(3))
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    tilt, eyes = rng.uniform(-0.4, 0.4), list[float]()
    for side in (-1, 1):
        at_x = x + side * 0.45 * radius * math.cos(tilt) + 0.3 * radius * math.sin(tilt)
        at_y = y + side * 0.45 * radius * math.sin(tilt) - 0.3 * radius * math.cos(tilt)
        pen.ellipse([at_x - 2, at_y - 2, at_x + 2, at_y + 2], fill=(20, 20, 20))
        eyes += [at_x / SIZE, at_y / SIZE]
    return image, eyes


def make(folder: Path, *, train: int = 2000, validation: int = 200, seed: int = 0) -> Path:
    """train.csv, validation.csv and the images in images/."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", validation)):
        lines = [",".join(("file", *TARGETS))]
        for number in range(count):
            image, eyes = face(rng)
            name = f"images/{split}-{number:04d}.png"
            image.save(folder / name)
            lines.append(",".join((name, *(f"{place:.4f}" for place in eyes))))
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, required=True, metavar="FOLDER")
    print(make(parser.parse_args().make))


if __name__ == "__main__":
    main()

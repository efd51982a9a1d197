"""Decodes an image file to what a viewer shows: upright, on white, with its first frame only, in 8 bits or as floats.

Pillow alone does none of this: it ignores the EXIF orientation, shows the colors that transparency hides, and clips the
values of 16-bit, 32-bit and float images to 0 .. 255, which turns most of these images into one color.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dtrain.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
"""Pillow's names of the formats that are read. Others, such as EPS, run a program or have no pixels."""

MAX_ASPECT_RATIO = 1000
"""Resizing the shorter side of a longer strip would need gigabytes of memory."""

FULL_RANGES = {"I;16": (0.0, 65535.0), "F": (0.0, 1.0)}
"""The values of black and white of Pillow's modes with more than 8 bits. 32-bit integers have no usual range."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
"""Errors that Pillow's plugins raise for damaged files."""

PixelRange = tuple[float, float]


class ImageTraits(NamedTuple):
    """What reading an image has changed, for the log.

    Attributes:
        rotated: Its EXIF orientation turns or mirrors it.
        transparent: Some pixels are not opaque.
        deep: Its pixels have more than 8 bits.
        frames: It has further frames, which are not read.
    """

    rotated: bool
    transparent: bool
    deep: bool
    frames: bool


def read_image(
    content: bytes, name: Path | str, *, gray: bool = False, pixel_range: PixelRange | None = None
) -> Image.Image:
    """Decodes an image. Returns it in mode RGB, or L if gray; in mode F, with values in 0 .. 255, if it has more bits.

    Args:
        content: the file.
        name: its name, for messages.
        pixel_range: values of black and white in images with more than 8 bits; None: 0 and 65535 in 16 bits, 0 and 1 for
            floats.

    Raises:
        DataError: the image cannot be decoded completely, or has values outside the range.
    """
    return _decode(content, name, gray=gray, pixel_range=pixel_range)[0]


def check_image(content: bytes, name: Path | str, *, pixel_range: PixelRange | None = None) -> ImageTraits:
    """Decodes an image completely, to find damage before training. Raises what `read_image` raises."""
    return _decode(content, name, gray=False, pixel_range=pixel_range)[1]


def _decode(
    content: bytes, name: Path | str, *, gray: bool, pixel_range: PixelRange | None
) -> tuple[Image.Image, ImageTraits]:
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise DataError(f"{name} is not an image: it is empty (0 bytes). {_CURE}")
    Image.init()  # registers the formats that this Pillow was built with
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata, in each process
            with Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                _check_size(image.size, name)
                has_frames = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
                image.load()
                turn = _TURNS.get(_orientation(image))
                upright = image if turn is None else image.transpose(Image.Transpose[turn])
                full_range = FULL_RANGES.get(_depth(image))
                converted, transparent = _convert(upright, name, gray=gray, limits=pixel_range or full_range)
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not an image: Pillow does not recognize its format, or it is not one of {', '.join(FORMATS)}. {_CURE}"
        ) from None
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be decoded: {str(error) or type(error).__name__}. {_CURE}") from None
    return converted, ImageTraits(turn is not None, transparent, converted.mode == "F", has_frames)


_CURE = "Write it again or remove it, or skip such rows with data.max_bad_rows"

_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> what turns the stored pixels upright."""


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 (upright) without one. Pillow has turned a TIFF already."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except DECODING_ERRORS:
        return 1  # viewers ignore damaged metadata as well


def _depth(image: Image.Image) -> str:
    """Returns the key into FULL_RANGES. Some versions of Pillow read 16-bit PNG images in mode I."""
    return "I;16" if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG") else image.mode


def _check_size(size: tuple[int, int], name: Path | str) -> None:
    if min(size) < 1 or max(size) > MAX_ASPECT_RATIO * min(size):
        problem = "it has no pixels" if min(size) < 1 else f"one side is over {MAX_ASPECT_RATIO} times the other"
        raise DataError(f"{name} has {size[0]} x {size[1]} pixels: {problem}. {_CURE}")


def _convert(
    image: Image.Image, name: Path | str, *, gray: bool, limits: PixelRange | None
) -> tuple[Image.Image, bool]:
    """Returns the image in mode RGB, L or F, and whether it has transparent pixels."""
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        return _convert_deep(image, name, limits)
    transparent = False
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        transparent = layer.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if gray and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # Pillow cannot convert every mode to gray in one step
    return image.convert("L" if gray else "RGB"), transparent


def _convert_deep(image: Image.Image, name: Path | str, limits: PixelRange | None) -> tuple[Image.Image, bool]:
    """Returns a gray image with more than 8 bits as floats in 0 .. 255."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if limits is None or not (np.isfinite(values).all() and limits[0] <= low and high <= limits[1]):
        problem = (
            "32-bit integers do not say which values are black and white"
            if limits is None
            else f"black is {limits[0]:g} and white {limits[1]:g}"
        )
        raise DataError(
            f"{name} has pixels from {low:g} to {high:g}, but {problem}. Set the range of all images, such as "
            f"task.pixel_range='[{min(low, 0.0):g}, {high:g}]', or skip such rows with data.max_bad_rows"
        )
    scaled = (values - limits[0]) * (255.0 / (limits[1] - limits[0]))
    clear = image.info.get("transparency")
    hidden = np.zeros_like(values, dtype=bool) if not isinstance(clear, int) else values == clear
    scaled[hidden] = 255.0
    return Image.fromarray(scaled.astype(np.float32)), bool(hidden.any())

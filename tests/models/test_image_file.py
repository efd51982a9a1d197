"""Images are decoded to what a viewer shows, with every bit of their values, or refused before training."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dtrain.errors import DataError
from dtrain.models.image_file import ImageTraits, check_image, read_image

CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [90, 90, 90], [255, 255, 255]]], np.uint8)
"""A picture of 3 x 2 pixels, all different, so that each turn of it is another picture."""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes, **options: Any) -> Any:
    return np.asarray(read_image(content, "x.png", **options))


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize(
    ("number", "stored"),
    [
        (1, CORNERS),
        (2, CORNERS[:, ::-1]),
        (3, CORNERS[::-1, ::-1]),
        (4, CORNERS[::-1]),
        (5, CORNERS.transpose(1, 0, 2)),
        (6, np.rot90(CORNERS, 1)),  # the standard: shown turned by 90 degrees clockwise
        (7, np.rot90(CORNERS, 2).transpose(1, 0, 2)),
        (8, np.rot90(CORNERS, -1)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_is_shown_upright(kind: str, number: int, stored: Any) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=with_orientation(number), **options)

    assert np.array_equal(decoded(content), CORNERS)
    assert kind == "TIFF" or check_image(content, "x").rotated == (number > 1)


def test_damaged_metadata_is_ignored_as_viewers_do() -> None:
    content = encoded(Image.fromarray(CORNERS), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")

    assert np.array_equal(decoded(content), CORNERS)


GRAYS = np.array([[0, 1000], [30000, 65535]])
WHITE, HIDDEN = (255, 255, 255), (10, 200, 30)


@pytest.mark.parametrize(
    ("image", "kind", "limits", "expected"),
    [
        (GRAYS.astype(np.uint16), "PNG", None, GRAYS / 257),
        (GRAYS.astype(np.uint16), "TIFF", None, GRAYS / 257),
        ((GRAYS / 16).astype(np.uint16), "TIFF", (0, 4095), (GRAYS // 16) * 255 / 4095),
        (GRAYS.astype(np.int32), "TIFF", (0, 65535), GRAYS / 257),
        ((GRAYS - 1000).astype(np.int32), "TIFF", (-1000, 64535), GRAYS / 257),
        ((GRAYS / 65535).astype(np.float32), "TIFF", None, GRAYS / 257),
        ((GRAYS / 65535 * 255).astype(np.float32), "TIFF", (0, 255), GRAYS / 257),
    ],
    ids=["png16", "tiff16", "12 of 16 bits", "int32", "signed", "float", "float of 255"],
)
def test_deep_pixels_keep_their_values(image: Any, kind: str, limits: Any, expected: Any) -> None:
    content = encoded(Image.fromarray(image), kind)

    for gray in (False, True):
        assert np.abs(decoded(content, gray=gray, pixel_range=limits) - expected).max() < 1e-3
    assert check_image(content, "x", pixel_range=limits).deep


@pytest.mark.parametrize(
    ("image", "limits", "message"),
    [
        (GRAYS.astype(np.int32), None, r"pixels from 0 to 65535, but 32-bit integers do not .*'\[0, 65535\]'"),
        (GRAYS.astype(np.float32), None, r"but black is 0 and white 1\. Set .*task.pixel_range='\[0, 65535\]'"),
        (GRAYS.astype(np.uint16), (0, 4095), r"but black is 0 and white 4095"),
        (np.array([[0.5, np.nan]], np.float32), None, r"pixels from nan to nan"),
    ],
    ids=["int32", "float", "range", "nan"],
)
def test_deep_pixels_of_unknown_range_are_refused(image: Any, limits: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_image(encoded(Image.fromarray(image), "TIFF"), "x.tif", pixel_range=limits)


def transparent_images() -> dict[str, bytes]:
    """A hidden green pixel and an opaque red one, in each way to store it."""
    rgba = Image.fromarray(np.array([[(*HIDDEN, 0), (255, 0, 0, 255)]], np.uint8))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*HIDDEN, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    return {
        "RGBA": encoded(rgba),
        "WEBP": encoded(rgba, "WEBP", lossless=True, exact=True),
        "palette": encoded(palette, transparency=0),
        "GIF": encoded(palette, "GIF", transparency=0),
        "color key": encoded(rgba.convert("RGB"), transparency=HIDDEN),
        "TIFF": encoded(rgba, "TIFF"),
    }


@pytest.mark.parametrize("way", list(transparent_images()))
def test_transparency_shows_white_and_never_the_hidden_color(way: str) -> None:
    content = transparent_images()[way]

    assert decoded(content).tolist() == [[list(WHITE), [255, 0, 0]]]
    assert decoded(content, gray=True)[0, 0] == 255
    assert check_image(content, "x") == ImageTraits(rotated=False, transparent=True, deep=False, frames=False)


def test_gray_with_alpha_half_transparency_and_a_gray_color_key() -> None:
    alpha = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)))
    deep = Image.fromarray(np.array([[7, 65535]], np.uint16))

    assert decoded(encoded(alpha), gray=True).tolist() == [[224]]  # 100 x 0.2 + 255 x 0.8
    assert decoded(encoded(deep, transparency=7)).tolist() == [[255.0, 255.0]]
    assert not check_image(encoded(alpha.convert("RGBA").convert("RGB")), "x").transparent


def test_cmyk_bits_palettes_and_frames() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    frames = encoded(red, "GIF", save_all=True, append_images=[blue])

    assert np.abs(decoded(encoded(cmyk, "JPEG")).astype(int) - (255, 0, 0)).max() <= 3
    assert decoded(encoded(Image.new("1", (1, 1), 1))).tolist() == [[list(WHITE)]]
    assert decoded(encoded(red.convert("P")))[0, 0].tolist() == [255, 0, 0]
    assert decoded(frames)[0, 0].tolist() == [255, 0, 0]
    assert check_image(frames, "x").frames


def damaged() -> dict[str, tuple[bytes, str]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise)
    return {
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated png": (png[: len(png) // 2], "truncated|broken"),
        "bits of a png": (png[:2000] + b"\0" * 100 + png[2100:], "cannot be decoded"),
        "empty": (b"", "it is empty"),
        "text": (b"no image", "does not recognize"),
        "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "does not recognize"),
        "no pixels": (b"P6 0 5 255\n", "does not recognize"),
        "strip": (encoded(Image.new("L", (5000, 2))), "one side is over 1000 times the other"),
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_damage_is_found_by_the_check(kind: str) -> None:
    content, message = damaged()[kind]

    with pytest.raises(DataError, match=rf"x.png .*({message}).*data.max_bad_rows"):
        check_image(content, "x.png")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    assert check_image(encoded(Image.new("L", (12, 12))), "x") is not None  # Pillow only warns up to twice the limit
    with pytest.raises(DataError, match="decompression bomb"):
        check_image(encoded(Image.new("L", (30, 30))), "x")


def test_a_wrong_suffix_does_not_matter() -> None:
    assert np.array_equal(decoded(encoded(Image.fromarray(CORNERS), "BMP")), CORNERS)

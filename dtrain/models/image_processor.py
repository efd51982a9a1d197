"""Turns an image file into the model's input: resized, cropped and normalized as its preprocessor_config.json says.

image_file.py decodes it.

Uses only Pillow and numpy, so the numbers do not depend on whether torchvision is installed. Tests compare them with
transformers' own processors, which may differ in the last bits. A model without preprocessor_config.json gets its own
image size, mean 0.5 and deviation 0.5. The file is saved with the trained model, where AutoImageProcessor finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import cached_file

from dtrain.config import bounded_json, schema
from dtrain.errors import CheckpointError, ConfigError, DataError
from dtrain.models.architecture import check_name_or_path, read_config
from dtrain.models.image_file import PixelRange, read_image

if TYPE_CHECKING:
    from PIL import Image

FILE = "preprocessor_config.json"

PIXEL_RANGE = "pixel_range"
"""dtrain's own key in that file. transformers' processors ignore it."""

BILINEAR, NATIVE_SIZE = 2, 224

MAX_SIDE = 10_000
"""Pixels of a side that a model's files may ask for. Larger ones fill the memory."""
CONVNEXT_SQUARE_SIZE = 384
"""Size from which ConvNeXT's processor resizes to a square. Below it, the processor resizes to a larger image and crops."""


@dataclass(frozen=True)
class PixelProcessor:
    """Resizes, crops and normalizes images.

    Attributes:
        size: (height, width) to resize to; None: resize by `shortest`.
        shortest: length in pixels that the shorter side is resized to; None: resize by `size`.
        crop: (height, width) of the center that is kept; None: no cropping.
        resample: Pillow's number of the resampling filter.
        scale: factor for the pixel values, applied first.
        mean: subtracted from the scaled values, one per channel.
        std: the result is divided by this, one per channel.
        content: the content of preprocessor_config.json.
        pixel_range: values of black and white in images with more than 8 bits; None: see image_file.py.
    """

    size: tuple[int, int] | None
    shortest: int | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content: Mapping[str, Any]
    pixel_range: PixelRange | None = None

    def __call__(self, file: Path, *, digest: str | None = None) -> NDArray[np.float32]:
        """Reads an image. Returns (channels, height, width).

        Args:
            digest: the file's SHA-256 when the data was prepared; None: not known.

        Raises:
            DataError: the file is missing, cannot be decoded, or has changed since.
        """
        content = _read_file(file, digest)
        image = self._resized(read_image(content, file, gray=len(self.mean) == 1, pixel_range=self.pixel_range))
        if self.crop is not None:
            top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        values = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
        pixels = np.broadcast_to(values, (*values.shape[:2], len(self.mean)))  # images with more than 8 bits are gray
        scaled = pixels * np.float32(self.scale)
        normalized = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        result: NDArray[np.float32] = np.ascontiguousarray(normalized.transpose(2, 0, 1), dtype=np.float32)
        return result

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        out = self.crop or self.size
        assert out is not None, "_sizes returns at least one of them"
        return len(self.mean), *out

    def save_pretrained(self, folder: str) -> None:
        """Writes preprocessor_config.json."""
        text = json.dumps(self.content, indent=2, sort_keys=True)
        Path(folder, FILE).write_text(f"{text}\n", encoding="utf-8")

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.size is not None:
            return image.resize((self.size[1], self.size[0]), self.resample)
        assert self.shortest is not None
        short, long = sorted(image.size)
        longer = int(self.shortest * long / short)
        size = (self.shortest, longer) if image.width <= image.height else (longer, self.shortest)
        return image.resize(size, self.resample)


def _read_file(file: Path, digest: str | None) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be decoded: {error}. Restore it or remove it from the data") from None
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise DataError(
            f"{file} has changed since the data was prepared. Restore it, or set data.cache_dir to a new folder, so that "
            "all images are checked again"
        )
    return content


def load_processor(
    model: schema.Model, *, image_size: int | None, pixel_range: PixelRange | None = None
) -> PixelProcessor:
    """Returns the model's own processor, or a default one.

    Args:
        image_size: side of the square that images are resized to; None: as the model's config says.
        pixel_range: values of black and white in images with more than 8 bits; None: what the model was trained with, or
            the full range.

    Raises:
        ConfigError: preprocessor_config.json asks for something that dtrain does not support, or Pillow is missing.
    """
    try:
        import PIL  # noqa: F401 - only to check that it is installed
    except ImportError:
        raise ConfigError("Images are read with Pillow, which is not installed: pip install pillow") from None
    content, edge, channels = _model_image_settings(model)
    edge = image_size or edge
    if content is None:
        content = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": edge or NATIVE_SIZE, "width": edge or NATIVE_SIZE},
            "resample": BILINEAR,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * channels,
            "image_std": [0.5] * channels,
        }
    elif image_size is not None:
        dropped = ("crop_pct", "crop_size", "do_center_crop", "feature_extractor_type")
        content = {key: value for key, value in content.items() if key not in dropped}
        size = {"height": image_size, "width": image_size}
        content.update(image_processor_type="ViTImageProcessor", do_resize=True, size=size)
    if pixel_range is not None:
        content = {**content, PIXEL_RANGE: list(pixel_range)}
    return _parse_config(content, channels, str(model.name_or_path))


def _model_image_settings(model: schema.Model) -> tuple[dict[str, Any] | None, int | None, int]:
    """Returns preprocessor_config.json (None without one), the image size of the model's config, and its channels."""
    if model.factory is not None:
        folder = Path(model.name_or_path) if model.name_or_path is not None else None
        return (_read_json(folder / FILE) if folder is not None and (folder / FILE).is_file() else None), None, 3
    local_only = check_name_or_path(model)
    config = read_config(model, local_only)
    if model.name_or_path is None:
        content = None
    else:
        file = cached_file(
            model.name_or_path,
            FILE,
            local_files_only=local_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        content = _read_json(Path(file)) if file is not None else None
    edge = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise ConfigError(f"A {config.model_type} model with {channels} channels: images have 1 (gray) or 3 (RGB).")
    return content, edge if isinstance(edge, int) else None, channels


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = bounded_json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Copy or download it again.") from None
    return content


def _parse_config(content: Mapping[str, Any], channels: int, name: str) -> PixelProcessor:
    """Returns the processor that a preprocessor_config.json describes."""
    try:
        size, shortest, crop = _sizes(content, name)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ConfigError(
            f"model.name_or_path={name}: {FILE} has sizes that are no numbers ({error}). Set task.image_size."
        ) from None
    if not all(1 <= side <= MAX_SIDE for side in (*(size or ()), *(crop or ()), shortest or 1)):
        raise ConfigError(
            f"model.name_or_path={name}: {FILE} resizes images to {size or shortest} pixels and crops {crop}. A side has 1 to "
            f"{MAX_SIDE} pixels: set task.image_size."
        )
    has_scale, has_norm = content.get("do_rescale", True), content.get("do_normalize", True)
    mean = tuple(content.get("image_mean") or [0.5] * channels) if has_norm else (0.0,) * channels
    std = tuple(content.get("image_std") or [0.5] * channels) if has_norm else (1.0,) * channels
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"model.name_or_path={name}: {FILE} has {len(mean)} means and {len(std)} deviations for {channels} channels."
        )
    return PixelProcessor(
        size,
        shortest,
        crop,
        int(content.get("resample", BILINEAR)),
        float(content.get("rescale_factor", 1 / 255)) if has_scale else 1.0,
        mean,
        std,
        content,
        _pixel_range(content.get(PIXEL_RANGE), name),
    )


def _pixel_range(value: Any, name: str) -> PixelRange | None:
    try:
        low, high = (0.0, 1.0) if value is None else (float(value[0]), float(value[1]))
    except (TypeError, ValueError, LookupError):
        low, high = 0.0, 0.0
    if not low < high:
        raise ConfigError(f"model.name_or_path={name}: {FILE} has {PIXEL_RANGE} {value!r}: it must be [black, white].")
    return None if value is None else (low, high)


def _sizes(content: Mapping[str, Any], name: str) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """Returns size, shortest side and crop. Older models have plain numbers instead of dicts.

    Raises:
        ConfigError: the sizes have an unknown form, or the images would have different sizes.
    """
    size, crop = content.get("size"), content.get("crop_size")
    is_convnext = "crop_pct" in content or "convnext" in str(content.get("image_processor_type", "")).lower()
    crops = bool(content.get("do_center_crop", crop is not None))
    if isinstance(size, int):
        size = {"shortest_edge": size} if is_convnext or crops else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    unsupported = ConfigError(
        f"model.name_or_path={name}: dtrain does not support the image sizes in its {FILE} (size {size}, crop "
        f"{crop if crops else None}, do_resize {content.get('do_resize', True)}, do_pad {content.get('do_pad', False)}). "
        "Set task.image_size to resize all of them to one square."
    )
    if not isinstance(size, dict) or content.get("do_pad") or not content.get("do_resize", True):
        raise unsupported
    cut = (int(crop["height"]), int(crop["width"])) if crops and isinstance(crop, dict) and "height" in crop else None
    if set(size) == {"height", "width"}:
        return (int(size["height"]), int(size["width"])), None, cut
    if set(size) != {"shortest_edge"}:
        raise unsupported
    edge = int(size["shortest_edge"])
    if is_convnext:
        if edge >= CONVNEXT_SQUARE_SIZE:
            return (edge, edge), None, None
        return None, int(edge / float(content.get("crop_pct") or 224 / 256)), (edge, edge)
    if cut is None or max(cut) > edge:
        raise unsupported
    return None, edge, cut

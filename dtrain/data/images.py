"""Images with labels or values: a folder of images for each class, or a table with a column of paths.

Rows hold paths and labels. Pixels are read when a batch is made. Preparing the data decodes each file once, so that a
damaged one is found before training, and stores its SHA-256 in its row. That reveals different images under the same names
on other nodes, and images that change later. The cache key consists of names, sizes and times of the files in class
folders, or of the hash of a table.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrain.console import log
from dtrain.data.column_names import LABELS
from dtrain.data.label_names import label_text
from dtrain.data.readers import Row, Values
from dtrain.data.tables import (
    Origin,
    RowConverter,
    RowFormat,
    configured_columns,
    get_value,
    missing_column,
)
from dtrain.errors import DataError
from dtrain.models.image_file import PixelRange, check_image

SUFFIXES: tuple[str, ...] = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".bmp",
    ".dib",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".avif",
    ".jp2",
    ".j2k",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".tga",
)
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "icon\r")
"""Files that file managers leave in folders, in lower case. Hidden files are not read either."""
IMAGE_COLUMNS = ("image", "path", "file", "file_name", "filename", "image_path", "img")


def is_class_folders(folder: Path) -> bool:
    """Returns whether a folder holds one folder per class instead of files."""
    return folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


def class_folder_rows(folder: Path) -> Iterator[Row]:
    """Yields `image` (path below the folder) and `label` (its top-level folder) of each image.

    The order mixes the classes and is the same on every machine.

    Raises:
        DataError: a class has no image.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    images: list[tuple[bytes, str, str]] = []
    for class_folder in classes:
        found = [file for file in class_folder.rglob("*") if _is_visible(file, folder) and file.is_file()]
        files = [file for file in found if file.suffix.lower() in SUFFIXES]
        if others := sorted(file for file in found if file.suffix.lower() not in SUFFIXES):
            log.warning(
                "data: %s: %d file(s) are not read, such as %s: the suffix is not one of an image (%s)",
                class_folder,
                len(others),
                others[0].relative_to(class_folder),
                ", ".join(SUFFIXES),
            )
        if not files:
            raise DataError(f"{class_folder} holds no images ({', '.join(SUFFIXES)}): a class needs at least one")
        for file in files:
            path = file.relative_to(folder).as_posix()
            images.append((hashlib.blake2b(path.encode(), digest_size=8).digest(), path, class_folder.name))
    for number, (_, path, label) in enumerate(sorted(images), start=1):
        yield number, {"image": path, "label": label}


def _is_visible(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    return not any(part.startswith(".") for part in parts) and file.name.lower() not in SYSTEM_FILES


def class_folder_state(folder: Path) -> str:
    """Returns the SHA-256 over name, size and modification time of each file."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        info = file.stat()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def image_row_format(root: Path, targets: Sequence[str] = (), *, pixel_range: PixelRange | None = None) -> RowFormat:
    """Returns the format of rows with `image` (path below root), its `digest`, `traits`, and `label` or `values`.

    Args:
        root: folder that stored paths are relative to.
        targets: columns of numbers to use instead of a label.
        pixel_range: see image_file.read_image.
    """

    def converter(first: Values, origin: Origin) -> RowConverter:
        ours = ("image",) if targets else ("image", "label")
        configured = configured_columns(list(first), origin, ours)
        image = configured.get("image") or next((name for name in IMAGE_COLUMNS if name in first), None)
        if image is None:
            raise missing_column("the image", "image", IMAGE_COLUMNS, list(first), origin)
        base = Path(origin.name) if Path(origin.name).is_dir() else Path(origin.name).parent
        if targets:
            read, field = _values(first, origin, targets)
        else:
            read, field = _label(first, origin, configured.get("label"), image)

        def convert(values: Values, location: str) -> dict[str, Any]:
            target = {} if read is None else {field.name: read(values, location)}
            path, digest, traits = _check_image(get_value(values, image, location), base, root, location, pixel_range)
            return {"image": path, "digest": digest, "traits": traits, **target}

        columns = [
            pa.field("image", pa.string()),
            pa.field("digest", pa.string()),
            pa.field("traits", pa.list_(pa.string())),
            *([field] if read is not None else []),
        ]
        return RowConverter(pa.schema(columns), convert, origin.class_names.get("label"))

    name = f"images{list(targets) if targets else '-2'}"
    return RowFormat(name, converter, usual_draw="mixed" if targets else "stratified")


def _label(first: Values, origin: Origin, label: str | None, image: str) -> tuple[Any, pa.Field]:
    name = label or next((name for name in LABELS if name in first and name != image), None)
    field = pa.field("label", pa.string())
    if name is None or (not origin.needs_label and label_text(first[name], origin.name) is None):
        if origin.needs_label:
            raise missing_column("the label", "label", LABELS, list(first), origin)
        return None, field

    def read(values: Values, location: str) -> str:
        text = label_text(get_value(values, name, location), location)
        if text is None:
            raise DataError(f"{location}: no label ({name} is empty). Every training or evaluation image needs one")
        return text

    return read, field


def _values(first: Values, origin: Origin, targets: Sequence[str]) -> tuple[Any, pa.Field]:
    field = pa.field("values", pa.list_(pa.float64()))
    absent = [name for name in targets if name not in first]
    if absent and not origin.needs_label:
        return None, field
    if absent:
        raise DataError(
            f"{origin.name} has no column {absent[0]!r}, which task.targets names. Its columns: {', '.join(first)}"
        )

    def read(values: Values, location: str) -> list[float]:
        return [_number(get_value(values, name, location), name, location) for name in targets]

    return read, field


def _number(value: Any, name: str, location: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{location}: {name} must be a number, found {value!r}")
    return number


def _check_image(
    value: Any, base: Path, root: Path, location: str, pixel_range: PixelRange | None
) -> tuple[str, str, list[str]]:
    """Checks that a file can be decoded. Returns its path below root, its SHA-256, and the names of its traits."""
    if not isinstance(value, str) or not value:
        raise DataError(f"{location}: an image is the path of a file, found {value!r}")
    try:
        file = base / Path(value).expanduser()
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would wait forever, and /dev/zero has no end
            raise ValueError(
                "it is not a file with content, but " + ("a folder" if stat.S_ISDIR(mode) else "a device or a pipe")
            )
        content = file.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, or the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{location}: the image {base / value} cannot be read: {reason}") from None
    try:
        traits = check_image(content, file, pixel_range=pixel_range)
    except DataError as error:
        raise DataError(f"{location}: {error}") from None
    is_relative = not Path(value).expanduser().is_absolute()
    path = Path(os.path.relpath(file, root)).as_posix() if is_relative else str(file)
    return path, hashlib.sha256(content).hexdigest(), [name for name, has in traits._asdict().items() if has]

"""Images and what they show: a folder of images for each class, or a table with a column of paths.

Rows hold paths and labels, never pixels, which are read when a batch is made. Each file is looked at once, when the
data is prepared, and its SHA-256 kept in its row, so that nodes with other images under the same names are found out.
The cache is found again by names, sizes and times of the files in class folders, and by the hash of a table: images
that are exchanged behind an unchanged table are not looked at again.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Row, Values
from dtrain.data.tables import LABELS, Layout, Origin, Shape, given_columns, label_text, missing_column, value_of
from dtrain.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
IMAGES = ("image", "path", "file", "file_name", "filename", "image_path", "img")


def is_class_folders(folder: Path) -> bool:
    """Whether a folder holds a folder for each class, not files."""
    return folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


def class_folder_rows(folder: Path) -> Iterator[Row]:
    """`image` (path below the folder) and `label` (its first folder) of each image.

    In an order that mixes the classes and is the same everywhere, so that data.limit and data.validation_fraction take
    some of each.

    Raises:
        DataError: a class without an image.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found: list[tuple[bytes, str, str]] = []
    for place in classes:
        files = [file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not files:
            raise DataError(f"{place} holds no image ({', '.join(SUFFIXES)}): a class needs at least one")
        for file in files:
            path = file.relative_to(folder).as_posix()
            found.append((hashlib.blake2b(path.encode(), digest_size=8).digest(), path, place.name))
    for number, (_, path, label) in enumerate(sorted(found), start=1):
        yield number, {"image": path, "label": label}


def class_folder_state(folder: Path) -> str:
    """SHA-256 over name, size and time of each file."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        about = file.stat()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def images_shape(root: Path, targets: Sequence[str] = ()) -> Shape:
    """Rows with `image` (path below root), its `digest`, and `label`; or, for a regression, `values`.

    Args:
        root: folder that kept paths are relative to.
        targets: columns of numbers, instead of a label.
    """

    def layout(first: Values, origin: Origin) -> Layout:
        ours = ("image",) if targets else ("image", "label")
        given = given_columns(list(first), origin, ours)
        image = given.get("image") or next((name for name in IMAGES if name in first), None)
        if image is None:
            raise missing_column("the image", "image", IMAGES, list(first), origin)
        beside = Path(origin.name) if Path(origin.name).is_dir() else Path(origin.name).parent
        read, kind = _values(first, origin, targets) if targets else _label(first, origin, given.get("label"), image)

        def convert(values: Values, place: str) -> dict[str, Any]:
            path, digest = _checked(value_of(values, image, place), beside, root, place)
            return {"image": path, "digest": digest, **({} if read is None else {kind.name: read(values, place)})}

        columns = [
            pa.field("image", pa.string()),
            pa.field("digest", pa.string()),
            *([kind] if read is not None else []),
        ]
        return Layout(pa.schema(columns), convert, origin.class_names.get("label"))

    return Shape(f"images{list(targets) if targets else ''}", layout)


def _label(first: Values, origin: Origin, label: str | None, image: str) -> tuple[Any, pa.Field]:
    name = label or next((name for name in LABELS if name in first and name != image), None)
    kind = pa.field("label", pa.string())
    if name is None or (not origin.needs_label and label_text(first[name], origin.name) is None):
        if origin.needs_label:
            raise missing_column("the label", "label", LABELS, list(first), origin)
        return None, kind

    def read(values: Values, place: str) -> str:
        found = label_text(value_of(values, name, place), place)
        if found is None:
            raise DataError(f"{place}: no label ({name} is empty). Every image to learn or to judge needs one")
        return found

    return read, kind


def _values(first: Values, origin: Origin, targets: Sequence[str]) -> tuple[Any, pa.Field]:
    kind = pa.field("values", pa.list_(pa.float64()))
    absent = [name for name in targets if name not in first]
    if absent and not origin.needs_label:
        return None, kind
    if absent:
        raise DataError(
            f"{origin.name} has no column {absent[0]!r}, which task.targets names. Its columns: {', '.join(first)}"
        )

    def read(values: Values, place: str) -> list[float]:
        return [_number(value_of(values, name, place), name, place) for name in targets]

    return read, kind


def _number(value: Any, name: str, place: str) -> float:
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{place}: {name} must be a number, found {value!r}")
    return found


def _checked(value: Any, beside: Path, root: Path, place: str) -> tuple[str, str]:
    """Path below root, and SHA-256, of a file that begins as an image does."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(value, str) or not value:
        raise DataError(f"{place}: an image is the path of a file, found {value!r}")
    file = beside / Path(value).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{place}: the image {file} cannot be read: {error.strerror}") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        why = "it begins like none of the formats that Pillow knows" if unknown else str(error)
        raise DataError(
            f"{place}: {file} is not an image: {why}. Remove it, or pass over such rows with data.max_bad_rows"
        ) from None
    is_inside = not Path(value).expanduser().is_absolute()
    path = Path(os.path.relpath(file, root)).as_posix() if is_inside else str(file)
    return path, hashlib.sha256(content).hexdigest()

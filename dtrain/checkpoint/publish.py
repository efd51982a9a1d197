"""Writes one checkpoint from a block of memory: into a draft folder, to the disk, then one rename. Needs no torch.

safetensors' own writer wants every tensor as bytes of its own, a second copy of the model; its format is a length, a JSON
table and the numbers, so that they are written here straight from the snapshot and hashed on the way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.format import (
    CHUNK,
    FORMAT,
    MANIFEST,
    MODEL,
    folder_name,
    found,
    is_name,
    manifest_text,
    shard_prefix,
)

DRAFT = ".tmp-"
TRASH = ".old-"
PART = "part-"
"""Begins the name of the file that says, in a draft, that a rank's part of a sharded checkpoint is there."""
PATIENCE_S = 600.0
"""How long the rank that publishes waits for the others' parts."""


@dataclass(frozen=True)
class Piece:
    """A tensor in the block. stem: model, optimizer, ...: which files it goes to. key: its name there.

    dtype: as safetensors calls it (F32). shape: of the tensor. offset: of its first byte in the block; size: in bytes.
    """

    stem: str
    key: str
    dtype: str
    shape: Sequence[int]
    offset: int
    size: int


@dataclass(frozen=True)
class Order:
    """One checkpoint to write, or one part of it; JSON throughout, so that it can be told to another process.

    checkpoints: the folder of all checkpoints. nonce: tells this start's drafts from those that others left. texts: small
    files by name, state.json among them. about: further keys of the manifest. max_file_bytes: how large a file with
    tensors may get. keep: newest ones that stay when this one is published; protected: steps that stay besides.
    part: which one this is, of a sharded checkpoint; the order with `of_here` waits for those parts and publishes.
    """

    checkpoints: str
    step: int
    nonce: str
    pieces: Sequence[Piece]
    texts: Mapping[str, str]
    about: Mapping[str, Any]
    max_file_bytes: int
    keep: int
    protected: Sequence[int]
    part: int | None = None
    of_here: Sequence[int] | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Order:
        return cls(**{**value, "pieces": [Piece(**piece) for piece in value["pieces"]]})


def publish(order: Order, static: Mapping[str, bytes], block: memoryview) -> dict[str, Any]:
    """Writes the checkpoint, renames it into its place and removes old ones; gives bytes and seconds.

    A crash at any moment leaves the older checkpoints, and this one whole or as a draft that nobody reads.

    Args:
        static: small files by name that are the same in every checkpoint of the run.
        block: memory in which the pieces lie.

    Raises:
        OSError: it cannot be written; the draft is gone then, and what was there before is as it was.
    """
    begin = time.monotonic()
    checkpoints = Path(order.checkpoints)
    draft = checkpoints / f"{DRAFT}{folder_name(order.step)}-{order.nonce}"
    try:
        draft.mkdir(parents=True, exist_ok=order.part is not None)
        files = {name: _write(draft / name, _safetensors(part, block)) for name, part in _files_of(order)}
        files |= {name: _write(draft / name, [text.encode()]) for name, text in _index(order)}
        if order.part is not None:
            _tell_part(draft, order.part, files)
        if order.part is None or order.of_here is not None:
            files |= _parts(draft, order)
            small = {**static, **{name: text.encode() for name, text in order.texts.items()}}
            if unnameable := [name for name in small if not is_name(name)]:
                raise OSError(errno.EINVAL, "a checkpoint cannot have a file of that name", unnameable[0])
            files |= {name: _write(draft / name, [content]) for name, content in small.items()}
            manifest = {"format": FORMAT, "step": order.step, **order.about, "files": files}
            _write(draft / MANIFEST, [manifest_text(manifest).encode()])
            flush_folder(draft)
            _put(draft, checkpoints / folder_name(order.step))
    except BaseException as error:
        _give_up(draft, order, error)
        raise
    if order.part is None or order.of_here is not None:
        remove_old(checkpoints, keep=order.keep, protected=[*order.protected, order.step])
    return {"bytes": sum(told["bytes"] for told in files.values()), "seconds": time.monotonic() - begin}


def _give_up(draft: Path, order: Order, error: BaseException) -> None:
    """Removes the draft; a part that others wait for makes room, and says that it will not come."""
    if order.part is None or order.of_here is not None:
        shutil.rmtree(draft, ignore_errors=True)
        return
    for file in draft.glob(f"{shard_prefix(order.part)}*"):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        _tell_part(draft, order.part, {"error": str(error)})


def _tell_part(draft: Path, part: int, told: Mapping[str, Any]) -> None:
    """A file that is there when it is whole."""
    coming = draft / f"{DRAFT}{PART}{part}"
    _write(coming, [json.dumps(told).encode()])
    coming.rename(draft / f"{PART}{part}")


def _parts(draft: Path, order: Order) -> dict[str, Any]:
    """Waits for all parts of this folder, and gives the files of the others.

    Raises:
        OSError: one failed, or did not come for long.
    """
    files: dict[str, Any] = {}
    for part in order.of_here or ():
        told, deadline = draft / f"{PART}{part}", time.monotonic() + PATIENCE_S
        while not told.exists():
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"the part of rank {part} did not come in {PATIENCE_S:.0f} s", str(told))
            time.sleep(0.02)
        named = json.loads(told.read_text(encoding="utf-8"))
        if "error" in named:
            raise OSError(errno.EIO, f"rank {part} could not write its part: {named['error']}", str(told))
        files |= named
    for part in order.of_here or ():
        (draft / f"{PART}{part}").unlink()
    return files


def _put(draft: Path, target: Path) -> None:
    """The moment at which the checkpoint is there."""
    old = _named_as_trash(target) if target.exists() else None  # of a start that went back further, by hand
    draft.rename(target)
    flush_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _named_as_trash(path: Path) -> Path:
    trash = path.with_name(f"{TRASH}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    return trash


def _discard(path: Path) -> None:
    """Removes a checkpoint, its name first, so that none is half there."""
    shutil.rmtree(_named_as_trash(path), ignore_errors=True)


def remove_old(checkpoints: Path, *, keep: int, protected: Sequence[int]) -> None:
    """Removes all but the newest `keep` and the protected ones."""
    for step, path in list(found(checkpoints).items())[keep:]:
        if step not in protected:
            with suppress(OSError):  # what cannot be removed stays: no reason to end a run
                _discard(path)


def clear_drafts(checkpoints: Path) -> None:
    """Removes what a killed writer left. Only while no other writer can be at work."""
    for prefix in (DRAFT, TRASH):
        for path in checkpoints.glob(f"{prefix}step-*") if checkpoints.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)


def _files_of(order: Order) -> Iterator[tuple[str, list[Piece]]]:
    """Each safetensors file's name and tensors."""
    for stem in dict.fromkeys(piece.stem for piece in order.pieces):
        parts = _split([piece for piece in order.pieces if piece.stem == stem], order.max_file_bytes)
        for number, part in enumerate(parts, 1):
            yield _file_name(stem, number, len(parts)), part


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _split(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    """Runs of tensors that stay below `most` bytes; a single larger one has a file of its own."""
    parts: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if parts[-1] and size + piece.size > most:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += piece.size
    return parts


def _index(order: Order) -> Iterator[tuple[str, str]]:
    """transformers finds the weights of several files by an index."""
    files = [(name, part) for name, part in _files_of(order) if part[0].stem == MODEL]
    if len(files) > 1:
        size = sum(piece.size for _, part in files for piece in part)
        where = {piece.key: name for name, part in files for piece in part}
        yield "model.safetensors.index.json", json.dumps({"metadata": {"total_size": size}, "weight_map": where})


def _safetensors(pieces: Sequence[Piece], block: memoryview) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the table, the table padded to 8 bytes, the numbers."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        table[piece.key] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.size],
        }
        offset += piece.size
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for piece in pieces:
        for start in range(0, piece.size, CHUNK):
            yield block[piece.offset + start : piece.offset + min(start + CHUNK, piece.size)]


def _write(path: Path, parts: Iterator[bytes | memoryview] | Sequence[bytes]) -> dict[str, Any]:
    """Writes a file through to the disk; gives its size and hash, taken from memory and not from what came to lie there."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for part in parts:
            digest.update(part)
            left = memoryview(part)
            while left:
                written = os.write(handle, left)
                if written == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
                left = left[written:]
                size += written
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)
    return {"bytes": size, "sha256": digest.hexdigest()}


def flush_folder(path: Path) -> None:
    """Puts the names in a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)

"""Writes one checkpoint from the staging buffer: into a draft folder, flushed to disk, then one rename. Needs no torch.

The safetensors library wants every tensor as separate bytes, which would be a second copy of the model. Its format is
simple (a length, a JSON table, the numbers), so this module writes it straight from the buffer and hashes it on the way.
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
    is_valid_name,
    list_checkpoints,
    manifest_text,
    shard_prefix,
)

DRAFT = ".tmp-"
TRASH = ".old-"
PART_MARKER = "part-"
"""Prefix of the marker file in a draft that says that one rank's part of a sharded checkpoint is complete."""
PART_TIMEOUT_S = 600.0
"""How long the publishing rank waits for the parts of the others."""


@dataclass(frozen=True)
class StagedTensor:
    """A tensor in the staging buffer.

    Attributes:
        stem: stem of the files that it is written to: model, optimizer, ...
        key: its name in that file.
        dtype: type name of safetensors, such as F32.
        shape: shape of the tensor.
        offset: index of its first byte in the buffer.
        size: size in bytes.
    """

    stem: str
    key: str
    dtype: str
    shape: Sequence[int]
    offset: int
    size: int


@dataclass(frozen=True)
class WriteRequest:
    """One checkpoint to write, or one part of it. All fields are JSON, so that it can be sent to another process.

    Attributes:
        checkpoints: folder that holds all checkpoints.
        step: optimizer step of the checkpoint.
        nonce: distinguishes the drafts of this start from those that other starts left.
        tensors: tensors to write.
        texts: small files by name, state.json among them.
        manifest_fields: further fields of the manifest.
        max_file_bytes: maximum size of a file with tensors.
        keep: number of newest checkpoints to keep after this one is published.
        protected: steps of checkpoints to keep in addition.
        part: number of this part of a sharded checkpoint; None if the checkpoint has no parts.
        local_parts: parts in this folder. Set on the request that waits for them and publishes.
    """

    checkpoints: str
    step: int
    nonce: str
    tensors: Sequence[StagedTensor]
    texts: Mapping[str, str]
    manifest_fields: Mapping[str, Any]
    max_file_bytes: int
    keep: int
    protected: Sequence[int]
    part: int | None = None
    local_parts: Sequence[int] | None = None

    @property
    def publishes(self) -> bool:
        """Whether this request completes the checkpoint."""
        return self.part is None or self.local_parts is not None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> WriteRequest:
        """Builds a request from what `dataclasses.asdict` returned."""
        return cls(**{**value, "tensors": [StagedTensor(**tensor) for tensor in value["tensors"]]})


def publish(request: WriteRequest, static: Mapping[str, bytes], buffer: memoryview) -> dict[str, Any]:
    """Writes the checkpoint, renames it to its final name and removes old ones.

    A crash at any moment leaves the older checkpoints intact, and this one either complete or as a draft that is
    never read.

    Args:
        static: small files by name that are the same in every checkpoint of the run.
        buffer: memory that holds the tensors.

    Returns:
        `bytes` written and `seconds` taken.

    Raises:
        OSError: the checkpoint cannot be written. The draft is removed; existing checkpoints are unchanged.
    """
    begin = time.monotonic()
    checkpoints = Path(request.checkpoints)
    draft = checkpoints / f"{DRAFT}{folder_name(request.step)}-{request.nonce}"
    try:
        draft.mkdir(parents=True, exist_ok=request.part is not None)
        files = {name: _write(draft / name, _safetensors(tensors, buffer)) for name, tensors in _tensor_files(request)}
        files |= {name: _write(draft / name, [text.encode()]) for name, text in _index_files(request)}
        if request.part is not None:
            _write_part_marker(draft, request.part, files)
        if request.publishes:
            files |= _wait_for_parts(draft, request)
            small = {**static, **{name: text.encode() for name, text in request.texts.items()}}
            if invalid := [name for name in small if not is_valid_name(name)]:
                raise OSError(errno.EINVAL, "not a valid name of a checkpoint file", invalid[0])
            files |= {name: _write(draft / name, [content]) for name, content in small.items()}
            manifest = {"format": FORMAT, "step": request.step, **request.manifest_fields, "files": files}
            _write(draft / MANIFEST, [manifest_text(manifest).encode()])
            flush_folder(draft)
            _rename_into_place(draft, checkpoints / folder_name(request.step))
    except BaseException as error:
        _discard_draft(draft, request, error)
        raise
    if request.publishes:
        remove_old(checkpoints, keep=request.keep, protected=[*request.protected, request.step])
    return {"bytes": sum(file["bytes"] for file in files.values()), "seconds": time.monotonic() - begin}


def _discard_draft(draft: Path, request: WriteRequest, error: BaseException) -> None:
    """Removes the draft. If the publisher waits for this part, removes its files and leaves the error as its marker."""
    if request.part is None or request.publishes:
        shutil.rmtree(draft, ignore_errors=True)
        return
    for file in draft.glob(f"{shard_prefix(request.part)}*"):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        _write_part_marker(draft, request.part, {"error": str(error)})


def _write_part_marker(draft: Path, part: int, content: Mapping[str, Any]) -> None:
    """Writes the marker under another name and renames it, so that readers never see an incomplete one."""
    unfinished = draft / f"{DRAFT}{PART_MARKER}{part}"
    _write(unfinished, [json.dumps(content).encode()])
    unfinished.rename(draft / f"{PART_MARKER}{part}")


def _wait_for_parts(draft: Path, request: WriteRequest) -> dict[str, Any]:
    """Waits for all parts of this folder and returns their files.

    Raises:
        OSError: a part failed, or did not arrive within PART_TIMEOUT_S.
    """
    files: dict[str, Any] = {}
    for part in request.local_parts or ():
        marker, deadline = draft / f"{PART_MARKER}{part}", time.monotonic() + PART_TIMEOUT_S
        while not marker.exists():
            if time.monotonic() > deadline:
                raise OSError(
                    errno.ETIMEDOUT, f"rank {part} did not write its part within {PART_TIMEOUT_S:.0f} s", str(marker)
                )
            time.sleep(0.02)
        content = json.loads(marker.read_text(encoding="utf-8"))
        if "error" in content:
            raise OSError(errno.EIO, f"rank {part} could not write its part: {content['error']}", str(marker))
        files |= content
    for part in request.local_parts or ():
        (draft / f"{PART_MARKER}{part}").unlink()
    return files


def _rename_into_place(draft: Path, target: Path) -> None:
    """Publishes the draft. The rename is the moment from which the checkpoint exists."""
    # The target exists if the user made the run resume from an earlier step.
    old = _rename_to_trash(target) if target.exists() else None
    draft.rename(target)
    flush_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _rename_to_trash(path: Path) -> Path:
    trash = path.with_name(f"{TRASH}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    return trash


def _remove(path: Path) -> None:
    """Removes a checkpoint. Renames it first, so that no half-removed checkpoint has a valid name."""
    shutil.rmtree(_rename_to_trash(path), ignore_errors=True)


def remove_old(checkpoints: Path, *, keep: int, protected: Sequence[int]) -> None:
    """Removes all checkpoints but the newest `keep` and the protected ones."""
    for step, path in list(list_checkpoints(checkpoints).items())[keep:]:
        if step not in protected:
            with suppress(OSError):  # A checkpoint that cannot be removed is no reason to end a run.
                _remove(path)


def clear_drafts(checkpoints: Path) -> None:
    """Removes what a killed writer left. Call it only while no other writer can be active."""
    for prefix in (DRAFT, TRASH):
        for path in checkpoints.glob(f"{prefix}step-*") if checkpoints.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)


def _tensor_files(request: WriteRequest) -> Iterator[tuple[str, list[StagedTensor]]]:
    """Yields the name and the tensors of each safetensors file."""
    for stem in dict.fromkeys(tensor.stem for tensor in request.tensors):
        groups = _split([tensor for tensor in request.tensors if tensor.stem == stem], request.max_file_bytes)
        for number, group in enumerate(groups, 1):
            yield _file_name(stem, number, len(groups)), group


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _split(tensors: Sequence[StagedTensor], max_bytes: int) -> list[list[StagedTensor]]:
    """Groups tensors in order into files of at most `max_bytes`. A single larger tensor gets its own file."""
    groups: list[list[StagedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.size > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size
    return groups


def _index_files(request: WriteRequest) -> Iterator[tuple[str, str]]:
    """Yields the index by which transformers finds weights that are split into several files."""
    files = [(name, group) for name, group in _tensor_files(request) if group[0].stem == MODEL]
    if len(files) > 1:
        size = sum(tensor.size for _, group in files for tensor in group)
        weight_map = {tensor.key: name for name, group in files for tensor in group}
        yield "model.safetensors.index.json", json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})


def _safetensors(tensors: Sequence[StagedTensor], buffer: memoryview) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file: length of the table, the table padded to 8 bytes, the numbers."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        table[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        for start in range(0, tensor.size, CHUNK):
            yield buffer[tensor.offset + start : tensor.offset + min(start + CHUNK, tensor.size)]


def _write(path: Path, chunks: Iterator[bytes | memoryview] | Sequence[bytes]) -> dict[str, Any]:
    """Writes a file and flushes it to disk.

    Returns:
        `bytes` and `sha256` of the data in memory, not of what the disk stored.
    """
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            remaining = memoryview(chunk)
            while remaining:
                written = os.write(handle, remaining)
                if written == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
                remaining = remaining[written:]
                size += written
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)
    return {"bytes": size, "sha256": digest.hexdigest()}


def flush_folder(path: Path) -> None:
    """Flushes the names in a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)

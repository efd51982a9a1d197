"""The layout of a checkpoint folder, and the check that its files are intact. Needs no torch.

    checkpoints/step-000100/
        manifest.json              size and SHA-256 of every file, and a hash of the manifest; no other file is read
        state.json                 RunState, the engine's scalars, facts about the run
        config.yaml                the resolved settings
        model.safetensors          weights and persistent buffers, fp32; or model-00001-of-00002.safetensors ... and an index
        optimizer.safetensors      `exp_avg/<parameter>`, ..., and `buffer/<name>` for buffers that a model folder leaves out
        config.json, tokenizer ... so that from_pretrained loads the folder

A sharded checkpoint (`checkpoint.format: sharded`) has shard-00003.safetensors ... instead of the model and optimizer
files. Each holds the pieces that one rank stored: `value/<name>@<first element>`, `exp_avg/<name>@<first element>`.

All files are safetensors or JSON: a pickle would let an untrusted checkpoint run code. Files that the manifest does not
list are ignored.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.config import bounded_json

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
FORMAT = "dtrain-checkpoint-1"
MODEL = "model"
"""Stem of the weight files, the name that transformers uses."""
OPTIMIZER = "optimizer"
"""Stem of the files with the optimizer's slots."""
BUFFER = "buffer"
"""Replaces the slot name for buffers that do not belong in a model folder."""

SHARD = "shard"
"""Stem of the files of a sharded checkpoint, one part per rank that wrote: `shard-00003.safetensors`."""
VALUE = "value"
"""Replaces the slot name for the parameter or buffer itself, in the files of a sharded checkpoint."""
FULL_TENSOR = -1
"""Replaces the index of the first element for a piece that is the complete tensor."""

MAX_PARTS = 1_000_000
"""More parts than any job has ranks. A manifest with more is not one that was written."""
MAX_MANIFEST_BYTES = 100 * 2**20

CHUNK = 2**22
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
STEP_FOLDER = re.compile(r"step-(\d{6,})")
"""Name of a checkpoint folder, with its step."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder that passed verification.

    Attributes:
        path: the folder.
        step: optimizer step that it was saved at.
        manifest: content of manifest.json.
        state: content of state.json.
    """

    path: Path
    step: int
    manifest: Mapping[str, Any]
    state: Mapping[str, Any]

    @property
    def stored_parts(self) -> tuple[str, list[int], int]:
        """Id of the start that wrote it, the parts in this folder, and the number of all parts.

        A folder has all parts, unless the nodes wrote a sharded checkpoint to their local disks.
        """
        return str(self.manifest.get("start")), list(self.manifest.get("parts", [0])), int(self.manifest.get("of", 1))


class DamagedCheckpointError(Exception):
    """A checkpoint differs from what was written. The message names the file and the difference."""


class UnreadableCheckpointError(DamagedCheckpointError):
    """A checkpoint may be intact but cannot be read here: no permission, no file handles."""


class OtherFormatError(UnreadableCheckpointError):
    """A checkpoint of another version of dtrain. The message ends with what to do."""


_DATA_LOSS_ERRNOS = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""System errors that mean lost contents. Any other error may be temporary."""


def folder_name(step: int) -> str:
    """Returns `step-000100` for step 100."""
    return f"step-{step:06d}"


def shard_prefix(part: int) -> str:
    """Returns the prefix of the file names of one part."""
    return f"{SHARD}-{part:05d}"


def list_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Returns the published checkpoints in a folder by step, newest first. Drafts and damaged ones have other names."""
    steps = {}
    for path in checkpoints.glob("step-*") if checkpoints.is_dir() else ():
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            steps[int(match[1])] = path
    return dict(sorted(steps.items(), reverse=True))


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Returns the manifest as JSON with a hash of itself, so that a flipped bit in it is detected too."""
    return json.dumps({**manifest, "self": _hash_of(manifest)}, indent=1) + "\n"


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(path: Path, *, checked: Collection[str] = ()) -> SavedCheckpoint:
    """Reads every byte of the files in the manifest and compares sizes and hashes.

    Args:
        checked: names of files that other ranks have compared.

    Raises:
        DamagedCheckpointError: a file is missing, truncated or changed.
        UnreadableCheckpointError: the files cannot be checked.
    """
    manifest = read_manifest(path)
    try:
        for name, expected in manifest["files"].items():
            if name not in checked:
                _verify_file(path / name, expected)
        if STATE not in manifest["files"]:
            raise DamagedCheckpointError(f"{MANIFEST} does not list {STATE}")
        state = bounded_json.loads((path / STATE).read_text(encoding="utf-8"))
        step = int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"its contents are not those of a checkpoint ({type(error).__name__}: {error})"
        ) from None
    match = STEP_FOLDER.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise DamagedCheckpointError(f"{MANIFEST} says that this is step {step}")
    return SavedCheckpoint(path, step, manifest, state)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest and compares it with the hash of itself that it contains.

    Raises:
        DamagedCheckpointError: it is missing or changed.
        UnreadableCheckpointError: it cannot be read.
        OtherFormatError: another version of dtrain wrote it.
    """
    try:
        _require_file(path / MANIFEST)
        with (path / MANIFEST).open("rb") as file:
            manifest = bounded_json.loads(file.read(MAX_MANIFEST_BYTES))
        _refuse_other_format(manifest)  # first: another version may have other fields, and another hash of itself
        stored_hash = manifest.pop("self")
        is_intact = stored_hash == _hash_of(manifest)
        names = list(manifest["files"])
    except OSError as error:
        raise _read_error(MANIFEST, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError(f"{MANIFEST} is not as it was written") from None
    if not is_intact:
        raise DamagedCheckpointError(f"{MANIFEST} is not as it was written")
    if (problem := _parts_problem(manifest.get("parts", [0]), manifest.get("of", 1))) is not None:
        raise DamagedCheckpointError(f"{MANIFEST} {problem}")
    if invalid := [name for name in names if not is_valid_name(name)]:
        raise DamagedCheckpointError(f"{MANIFEST} lists {invalid[0]!r}, which is not a valid name of a checkpoint file")
    return dict(manifest)


def _parts_problem(parts: Any, of: Any) -> str | None:
    """Returns what is wrong with the parts that a manifest lists; None if they are possible."""
    if type(of) is not int or not 1 <= of <= MAX_PARTS:
        return f"says that the checkpoint has {of!r:.40} parts (at most {MAX_PARTS:,} are possible)"
    if not isinstance(parts, list) or any(type(part) is not int or not 0 <= part < of for part in parts):
        return f"lists the parts {parts!r:.40}, where the checkpoint has parts 0 to {of - 1}"
    return None


def _refuse_other_format(manifest: Mapping[str, Any]) -> None:
    """
    Raises:
        OtherFormatError: another version of dtrain wrote the checkpoint.
        ValueError: no version of dtrain did.
    """
    version = manifest["format"]
    if version == FORMAT:
        return
    if not re.fullmatch(r"dtrain-checkpoint-\d{1,9}", version):
        raise ValueError(version)
    saved = manifest.get("versions")
    writer = saved.get("dtrain") if isinstance(saved, Mapping) else None
    by = f" by dtrain {writer}" if isinstance(writer, str) and len(writer) < 40 else ""
    raise OtherFormatError(
        f"it was written in the format {version}{by}, and this version of dtrain reads {FORMAT}. Use the version that "
        "wrote it"
    )


def is_valid_name(name: str) -> bool:
    """Returns whether a checkpoint file may have this name: no folders, no hidden files, no shell characters."""
    return bool(_FILE_NAME.fullmatch(name))


def _read_error(name: str, error: OSError) -> DamagedCheckpointError:
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpointError(f"{name} is missing")
    kind = DamagedCheckpointError if error.errno in _DATA_LOSS_ERRNOS else UnreadableCheckpointError
    return kind(f"{name} cannot be read: {error.strerror}")


def _verify_file(file: Path, expected: Mapping[str, Any]) -> None:
    try:
        _require_file(file)
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpointError(
                f"{file.name} has {size} bytes, expected {expected['bytes']}: it was truncated or changed"
            )
        if sha256(file) != expected["sha256"]:
            raise DamagedCheckpointError(
                f"{file.name} has the right size but its contents changed after it was written (SHA-256 differs)"
            )
    except OSError as error:
        raise _read_error(file.name, error) from None


def is_intact(file: Path, expected: Mapping[str, Any]) -> bool:
    """Returns whether a file has the size and hash that its entry in the manifest says."""
    try:
        _verify_file(file, expected)
    except (DamagedCheckpointError, KeyError, TypeError):
        return False
    return True


def _require_file(file: Path) -> None:
    """Raises DamagedCheckpointError for a pipe or a device: reading it could wait forever, or never end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise DamagedCheckpointError(f"{file.name} is not a regular file")


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[memoryview]:
    buffer = bytearray(CHUNK)
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            yield memoryview(buffer)[:count]

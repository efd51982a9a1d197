"""What a checkpoint folder looks like, and whether one is as it was written. Needs no torch.

    checkpoints/step-000100/
        manifest.json              every file's size and SHA-256, and a hash of itself; nothing else is ever read
        state.json                 RunState, the engine's scalars, what the run was
        config.yaml                the resolved settings
        model.safetensors          weights and persistent buffers, fp32; or model-00001-of-00002.safetensors ... and an index
        optimizer.safetensors      `exp_avg/<parameter>`, ..., and `buffer/<name>` of buffers that a model folder leaves out
        config.json, tokenizer ... so that from_pretrained loads the folder

A sharded one (`checkpoint.format: sharded`) has, in place of model and optimizer, shard-00003.safetensors ... with the
pieces that each rank had: `value/<name>@<first element>`, `exp_avg/<name>@<first element>`.

safetensors and JSON throughout: a pickle would let a stranger's checkpoint run code, and a file that the manifest does
not name is not looked at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
FORMAT = "dtrain-checkpoint-1"
MODEL = "model"
"""Stem of the files with weights, as transformers calls them."""
OPTIMIZER = "optimizer"
"""Stem of the files with the optimizer's slots."""
BUFFER = "buffer"
"""In place of a slot's name, for buffers that belong to no model folder."""

SHARD = "shard"
"""Stem of the files of a sharded checkpoint, one part for each rank that wrote: `shard-00003.safetensors`."""
VALUE = "value"
"""In place of a slot's name, for a parameter or buffer itself, in the files of a sharded checkpoint."""
WHOLE = -1
"""In place of where a piece begins in its tensor, of one that is all of it."""

CHUNK = 2**22
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole. manifest: as read; state: of state.json."""

    path: Path
    step: int
    manifest: Mapping[str, Any]
    state: Mapping[str, Any]

    @property
    def parts(self) -> tuple[str, list[int], int]:
        """Which start wrote it, which of its parts lie here, and of how many: all of one, unless nodes' own disks share it."""
        return str(self.manifest.get("start")), list(self.manifest.get("parts", [0])), int(self.manifest.get("of", 1))


class Damaged(Exception):
    """A checkpoint that is not as it was written; the message names the file and what is wrong."""


class Unreadable(Damaged):
    """A checkpoint that may be whole, but cannot be read here: no permission, no file handles, another version's."""


_BAD_DISK = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""What a system says of contents that are lost; anything else may be better the next time."""


def folder_name(step: int) -> str:
    """`step-000100`."""
    return f"step-{step:06d}"


def shard_prefix(part: int) -> str:
    """What the names of a part's files begin with."""
    return f"{SHARD}-{part:05d}"


def found(checkpoints: Path) -> dict[int, Path]:
    """The published checkpoints in a folder by step, newest first; drafts and damaged ones have other names."""
    steps = {}
    for path in checkpoints.glob("step-*") if checkpoints.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            steps[int(match[1])] = path
    return dict(sorted(steps.items(), reverse=True))


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest with a hash of itself, so that a flipped bit in it shows as well."""
    return json.dumps({**manifest, "self": _hash_of(manifest)}, indent=1) + "\n"


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(path: Path) -> Saved:
    """Reads every byte that the manifest names.

    Raises:
        Damaged: a file is missing, cut or changed.
        Unreadable: it cannot be told.
    """
    manifest = read_manifest(path)
    try:
        for name, told in manifest["files"].items():
            _verify_file(path / name, told)
        if STATE not in manifest["files"]:
            raise Damaged(f"{MANIFEST} does not name {STATE}")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        step = int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"it says something else than a checkpoint does ({type(error).__name__}: {error})") from None
    match = _FOLDER.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise Damaged(f"{MANIFEST} says that this is step {step}")
    return Saved(path, step, manifest, state)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash.

    Raises:
        Damaged: it is missing, or not as it was written.
        Unreadable: it cannot be told.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        own = manifest.pop("self")
        is_whole = own == _hash_of(manifest)
        names, version = list(manifest["files"]), manifest["format"]
    except OSError as error:
        raise _trouble(MANIFEST, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} is not as it was written") from None
    if not is_whole:
        raise Damaged(f"{MANIFEST} is not as it was written")
    if version != FORMAT:
        raise Unreadable(f"{MANIFEST} says {version!r}, which this version of dtrain does not read ({FORMAT})")
    if outside := [name for name in names if not is_name(name)]:
        raise Damaged(f"{MANIFEST} names {outside[0]!r}, which is no file of a checkpoint")
    return dict(manifest)


def is_name(name: str) -> bool:
    """Whether a file of a checkpoint may be called so: no folders, nothing hidden, nothing that a shell would see."""
    return bool(_NAME.fullmatch(name))


def _trouble(name: str, error: OSError) -> Damaged:
    if isinstance(error, FileNotFoundError):
        return Damaged(f"{name} is missing")
    kind = Damaged if error.errno in _BAD_DISK else Unreadable
    return kind(f"{name} cannot be read: {error.strerror}")


def _verify_file(file: Path, told: Mapping[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != told["bytes"]:
            raise Damaged(f"{file.name} has {size} bytes, expected {told['bytes']}: it is cut or was written to")
        if sha256(file) != told["sha256"]:
            raise Damaged(f"{file.name} has the right size but other contents than were written: a bit has flipped")
    except OSError as error:
        raise _trouble(file.name, error) from None


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    for part in _parts(file):
        digest.update(part)
    return digest.hexdigest()


def _parts(file: Path) -> Iterator[memoryview]:
    buffer = bytearray(CHUNK)
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            yield memoryview(buffer)[:count]

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
    def parts(self) -> tuple[list[int], int]:
        """Which parts of it lie here, and of how many: all of one, unless it is sharded over nodes' own disks."""
        return list(self.manifest.get("parts", [0])), int(self.manifest.get("of", 1))


class Damaged(Exception):
    """A checkpoint that is not as it was written; the message names the file and what is wrong."""


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
        Damaged: a file is missing, cut or changed, or this is no checkpoint of this version.
    """
    manifest = read_manifest(path)
    for name, told in manifest["files"].items():
        _verify_file(path / name, told)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{STATE} cannot be read: {error}") from None
    return Saved(path, int(manifest["step"]), manifest, state)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash.

    Raises:
        Damaged: it is missing, or not as it was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        own = manifest.pop("self")
        is_whole = own == _hash_of(manifest)
        names = list(manifest["files"])
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} is not as it was written") from None
    if not is_whole:
        raise Damaged(f"{MANIFEST} is not as it was written")
    if manifest["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} says {manifest['format']!r}, which this version does not read ({FORMAT})")
    if outside := [name for name in names if not _NAME.fullmatch(name)]:
        raise Damaged(f"{MANIFEST} names {outside[0]!r}, which is no file of a checkpoint")
    return dict(manifest)


def _verify_file(file: Path, told: Mapping[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != told["bytes"]:
            raise Damaged(f"{file.name} has {size} bytes, expected {told['bytes']}: it is cut or was written to")
        if sha256(file) != told["sha256"]:
            raise Damaged(f"{file.name} has the right size but other contents than were written: a bit has flipped")
    except FileNotFoundError:
        raise Damaged(f"{file.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{file.name} cannot be read: {error.strerror}") from None


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

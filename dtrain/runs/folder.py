"""The folder of one run: its paths, its state, claiming it at the start, and writing files atomically.

Only rank 0 writes here. The exception is `write_exit`, which every rank may call.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtrain.config import bounded_json
from dtrain.distributed.torchrun_agent import find_agent
from dtrain.errors import ConfigError
from dtrain.runs.jsonl import json_safe, report_write_errors, to_json_line
from dtrain.runs.launch_record import LAUNCHES, LaunchRecord
from dtrain.runs.lock import LOCK, move_lock

FolderState = Literal["absent", "unfinished", "finished", "evaluation", "foreign"]

_NAMES = {
    "config": "config.yaml",
    "metrics": "metrics.jsonl",
    "predictions": "predictions",
    "submission": "submission",
    "checkpoints": "checkpoints",
    "model": "model",
    "summary": "summary.json",
    "exit": "exit.json",
    "tensorboard": "tensorboard",
}
RUN_ID = ".run-id"
"""File with the id of the run, which its checkpoints name: those of another run may lie beside them by mistake."""
INSPECTION = "inspection"
"""Folder for the results of the inspect command."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full, a quota, and a limit on the size of files."""

_OF_TRAINING = ("metrics.jsonl", "checkpoints", "model", "tensorboard")
_OF_RESULTS = ("summary.json", "predictions", "submission", INSPECTION)
_OF_ANY_START = ("config.yaml", "exit.json")


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder. `summary` is written last, so its presence means that the run completed."""

    path: Path
    config: Path = field(init=False)
    metrics: Path = field(init=False)
    predictions: Path = field(init=False)
    submission: Path = field(init=False)
    checkpoints: Path = field(init=False)
    model: Path = field(init=False)
    summary: Path = field(init=False)
    exit: Path = field(init=False)
    tensorboard: Path = field(init=False)

    def __post_init__(self) -> None:
        for part, name in _NAMES.items():
            object.__setattr__(self, part, self.path / name)  # the only way in a frozen dataclass

    def old_config(self) -> str | None:
        """Returns the text of an existing config.yaml; None without one."""
        try:
            return self.config.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ConfigError(f"{self.config} cannot be read: {error.strerror}. Choose another run.name") from None


def folder_state(path: Path) -> FolderState:
    """Returns what is at `path`.

    absent: nothing that a run has produced.
    unfinished: a training run without complete results.
    finished: a training run with complete results.
    evaluation: results of evaluate, predict, generate or inspect.
    foreign: something that dtrain did not write.
    """
    if not path.is_dir():
        return "foreign" if path.exists() or path.is_symlink() else "absent"
    folder = RunFolder(path)
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - {LOCK}
    if not names.isdisjoint(_OF_TRAINING):
        return "finished" if _is_model(folder.model) and _is_json(folder.summary) else "unfinished"
    if not names.isdisjoint(_OF_RESULTS):
        return "evaluation"
    return "foreign" if names and names.isdisjoint(_OF_ANY_START) else "absent"


def _is_model(path: Path) -> bool:
    files = list(path.glob("*.safetensors"))
    return (path / "config.json").is_file() and bool(files) and all(map(_is_complete, files))


def _is_complete(weights: Path) -> bool:
    """Returns whether a safetensors file has the size that its header implies (length, JSON table of offsets, data)."""
    try:
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = bounded_json.loads(file.read(length)) if length < 100 * 2**20 else {}
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        return bool(ends) and weights.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_json(path: Path) -> bool:
    try:
        return isinstance(bounded_json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def record_config(folder: RunFolder, config_text: str) -> None:
    """Replaces config.yaml of a claimed folder, once the choices that the config leaves open are made.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        _write(folder.config, [config_text])
    except OSError as error:
        raise unwritable_error(folder, error) from error


def claim(
    folder: RunFolder,
    config_text: str,
    *,
    set_aside: bool = False,
    launch: LaunchRecord | None = None,
    run_id: str = "",
) -> Path | None:
    """Prepares the folder for this run. Called by rank 0 before any work, while it holds the lock (lock.py).

    Removes the results of an earlier start.

    Args:
        folder: a folder that resume_policy.decide_start allowed.
        config_text: the resolved config, for config.yaml.
        set_aside: first move the existing folder to `<name>.old-<UTC time>`.
        launch: what started this job; without it no later start is recognized.
        run_id: id for a folder that has none yet, of the checkpoint that the run resumes from; default: a new one.

    Returns:
        The new path of the old folder, or None.

    Raises:
        ConfigError: the folder cannot be created or written.
    """
    try:
        moved = move_away(folder.path) if set_aside and folder.path.exists() else None
        folder.path.mkdir(parents=True, exist_ok=True)
        if moved is not None:
            move_lock(moved, folder.path)
        # A summary that is older than the new config would look like the result of this run.
        for stale in (folder.exit, folder.summary):
            stale.unlink(missing_ok=True)
        for part in (
            "summary.json",
            "config.yaml",
            LAUNCHES,
        ):  # only the lock's owner writes these, so no draft is in use
            for draft in folder.path.glob(f".{part}.[0-9]*.tmp"):
                draft.unlink(missing_ok=True)
        for results in (folder.predictions, folder.submission, folder.path / INSPECTION):
            _remove_results(results)
        _write(folder.config, [config_text])
        (folder.path / LAUNCHES).unlink(missing_ok=True)
        if not read_run_id(folder.path):
            _write(folder.path / RUN_ID, [run_id or uuid.uuid4().hex])
        if record := (launch or LaunchRecord()).to_json():
            _write(folder.path / LAUNCHES, [record])
    except OSError as error:
        raise unwritable_error(folder, error) from None
    return moved


def read_run_id(path: Path) -> str:
    """Returns the id of the run in a folder; empty without one, as in folders of earlier versions."""
    try:
        return (path / RUN_ID).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _remove_results(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError:
        # On NFS, a file that a process of this host still reads stays there as .nfs...
        if any(not entry.name.startswith(".nfs") for entry in path.rglob("*") if not entry.is_dir()):
            raise


def unwritable_error(folder: RunFolder, error: OSError) -> ConfigError:
    """Returns the error for a run folder that cannot be written."""
    return ConfigError(
        f"the run folder {folder.path} cannot be written: {error.filename or folder.path}: {error.strerror}. "
        "Set run.output_dir to a writable folder"
    )


def move_away(path: Path) -> Path:
    """Renames a folder to `<name>.old-<UTC time>` and returns its new path."""
    stem = f"{path.name}.old-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    names = (stem, *(f"{stem}-{n}" for n in range(2, 100)))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(target)
    return target


# ---------------------------------------------------------------- atomic files


def write_json_atomic(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically: readers never see a part of it, even after a power cut. Mode 0644.

    Raises:
        DtrainError: the file cannot be written (disk full, no permission).
    """
    with report_write_errors(path):
        _write(path, [json.dumps(json_safe(value), indent=2, ensure_ascii=False, allow_nan=False), "\n"])


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a text file atomically. Mode 0644.

    Raises:
        DtrainError: the file cannot be written.
    """
    with report_write_errors(path):
        _write(path, [text])


def write_lines_atomic(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically, and creates the parent folder if needed.

    Raises:
        DtrainError: the file cannot be written.
    """
    with report_write_errors(path):
        path.parent.mkdir(exist_ok=True)
        _write(path, map(to_json_line, records))


def write_exit(path: Path, *, code: int, cause: str, rank: int, host: str, message: str) -> bool:
    """Writes exit.json unless another rank has written it. Only the first cause counts; later ones result from it.

    Never raises if the file cannot be written, because the process is already ending for another reason.

    Returns:
        Whether this call wrote the file.
    """
    record: dict[str, Any] = {"code": code, "cause": cause, "rank": rank, "host": host, "message": message}
    if (start := find_agent()) is not None:
        record["launcher"] = start.agent
    draft = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_through(draft, [json.dumps(record, indent=2, ensure_ascii=False), "\n"])
        os.link(draft, path)  # unlike a rename, this fails if the file exists
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in FULL:
            return False
        # A file system without hard links: not atomic, but still only the first writer succeeds.
        return _write_first(path, record)
    finally:
        with suppress(OSError):
            draft.unlink()
    return True


def _write_first(path: Path, record: Mapping[str, Any]) -> bool:
    try:
        file = path.open("x", encoding="utf-8")
    except OSError:
        return False
    try:
        with file:
            json.dump(record, file, indent=2, ensure_ascii=False)
    except OSError:
        with suppress(OSError):  # a part of it would keep others from writing it
            path.unlink()
        return False
    return True


def replace_folder(draft: Path, target: Path) -> None:
    """Replaces `target` by the finished folder `draft` on the same file system.

    First flushes files to disk and makes them readable (safetensors creates them with mode 0600). Between the two renames
    there is briefly no `target`, but never an incomplete one.

    Raises:
        DtrainError: a file cannot be written.
    """
    old, number = target.with_name(f".{target.name}.old"), 1
    with report_write_errors(target):
        for file in (entry for entry in draft.rglob("*") if entry.is_file()):
            file.chmod(0o644)
            _flush(file)
        _flush(draft)
        shutil.rmtree(old, ignore_errors=True)
        while old.exists():  # on NFS, a file that a process of this host still reads stays there as .nfs...
            number += 1
            old = target.with_name(f".{target.name}.old-{number}")
        if target.exists():
            target.rename(old)
        draft.rename(target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, parts: Iterable[str]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_through(draft, parts)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    _flush(path.parent)


def _write_through(path: Path, parts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(parts)
        out.flush()
        os.fchmod(out.fileno(), 0o644)
        os.fsync(out.fileno())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

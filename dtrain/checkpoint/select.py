"""Selects the checkpoint that a start resumes from: the newest complete one on any node."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.format import (
    CONFIG,
    STEP_FOLDER,
    DamagedCheckpointError,
    OtherFormatError,
    SavedCheckpoint,
    UnreadableCheckpointError,
    folder_name,
    list_checkpoints,
    read_manifest,
)
from dtrain.checkpoint.verify_together import verify_together
from dtrain.console import log
from dtrain.distributed.collectives import all_gather_object, barrier, broadcast_object, on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import CheckpointError

_DAMAGED = re.compile(r"damaged-step-(\d+)(-\d+)?")


@dataclass(frozen=True)
class SelectedCheckpoint:
    """The checkpoint to resume from. The same on every rank, except for `saved`.

    Attributes:
        step: optimizer step that it was saved at.
        readers: for each of its parts, the lowest rank that has it.
        state: content of its state.json.
        config_text: content of its config.yaml; empty if it has none.
        saved: the folder as this rank sees it; None on ranks that see none.
        run_id: the run that wrote it; empty if it does not say so.
    """

    step: int
    readers: list[int]
    state: dict[str, Any]
    config_text: str
    saved: SavedCheckpoint | None
    run_id: str = ""


def shares_folder_with_rank_0(folder: Path, context: RankContext) -> list[bool]:
    """Collective. Returns for every rank whether `folder` is the same one there as on rank 0 (a shared file system)."""
    marker = folder / f".seen-{broadcast_object(uuid.uuid4().hex, context)}"

    def create_marker() -> None:
        with suppress(OSError):  # The writers detect and report a read-only folder.
            marker.touch()

    on_main(create_marker, context)
    is_visible = context.is_main or marker.exists()
    shares: list[bool] = all_gather_object(is_visible, context)
    if context.is_main:
        marker.unlink(missing_ok=True)
    return shares


def newest(
    checkpoints: Path, context: RankContext, *, below: int | None = None
) -> tuple[SelectedCheckpoint | None, frozenset[int]]:
    """Collective. Selects the newest complete checkpoint on any node. Renames damaged ones.

    The candidates are checked newest first, and every byte of them is read: by one rank per separate folder, and where ranks
    share the folder of rank 0, by all of these together.

    Args:
        below: considers only checkpoints of earlier steps than this one.

    Returns:
        The checkpoint, None if there is none; and the steps of damaged checkpoints.

    Raises:
        CheckpointError: on every rank; a checkpoint that may be intact cannot be read.
    """
    if context.topology.num_nodes > 1:
        shares = shares_folder_with_rank_0(checkpoints, context)
    else:
        shares = [True] * context.world_size
    searches = context.is_main or (context.is_node_main and not shares[context.rank])
    candidates = {s: path for s, path in list_checkpoints(checkpoints).items() if below is None or s < below}
    while True:
        step = max(all_gather_object(next(iter(candidates), -1) if searches else -1, context))
        if step < 0:
            return None, _damaged_steps(checkpoints, context)
        path = candidates.pop(step, None) if searches else None
        saved, wrong = verify_together(
            path or checkpoints / folder_name(step), step, context, verifies=path is not None, shares=shares
        )
        error = _rename_or_explain(checkpoints / folder_name(step), wrong) if wrong is not None else None
        readers = _readers(saved, context, error)
        if readers is not None:
            return _broadcast_contents(readers, saved, context), _damaged_steps(checkpoints, context)


def _readers(saved: SavedCheckpoint | None, context: RankContext, error: str | None = None) -> list[int] | None:
    """Collective. Returns for each part the lowest rank that has it; None if parts are missing.

    Parts that different starts wrote do not form a checkpoint: settings and world size may have changed between them.

    Raises:
        CheckpointError: on every rank; a rank passed an `error`.
    """
    stored = None
    if saved is not None:
        start, parts, num_parts = saved.stored_parts
        stored = (start, _to_ranges(parts), num_parts)
    answers = all_gather_object((stored, error), context)
    if errors := [error for _, error in answers if error is not None]:
        failed = CheckpointError(errors[0])
        failed.is_reported_elsewhere = not context.is_main
        raise failed
    readers_by_start: dict[tuple[str, int], dict[int, int]] = {}
    for rank, (stored_parts, _) in enumerate(answers):
        if stored_parts is not None:
            start, ranges, num_parts = stored_parts
            readers = readers_by_start.setdefault((start, num_parts), {})
            for first, end in ranges:
                readers.update({part: rank for part in range(first, end) if part not in readers})
    # The parts are from 0 to num_parts - 1: see format.read_manifest.
    complete = [readers for (_, num_parts), readers in readers_by_start.items() if len(readers) == num_parts]
    return [rank for _, rank in sorted(complete[0].items())] if complete else None


def _to_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Returns the first and the end (excluded) of each run of consecutive numbers: a rank may have all of 16,000 parts."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges


def is_available(path: Path, context: RankContext) -> bool:
    """Collective. Returns whether the nodes have all parts of a checkpoint. Reads the manifests only."""
    saved = None
    if context.is_node_main:
        with suppress(DamagedCheckpointError):
            manifest = read_manifest(path)
            saved = SavedCheckpoint(path, 0, manifest, {})
    return _readers(saved, context) is not None


def _damaged_steps(checkpoints: Path, context: RankContext) -> frozenset[int]:
    names = [path.name for path in checkpoints.glob("damaged-*")] if context.is_node_main else []
    steps = [int(match[1]) for match in map(_DAMAGED.fullmatch, names) if match]
    return frozenset(step for rank_steps in all_gather_object(steps, context) for step in rank_steps)


def at(path: Path, context: RankContext, *, setting: str) -> SelectedCheckpoint:
    """Collective. Selects the checkpoint in that folder.

    Args:
        setting: the setting that names the folder, for the error message.

    Raises:
        CheckpointError: on every rank; the nodes do not have a complete checkpoint there.
    """
    reason = "there is no such folder"
    several = context.topology.num_nodes > 1
    shares = shares_folder_with_rank_0(path.parent, context) if several else [True] * context.world_size
    searches = context.is_main or (context.is_node_main and not shares[context.rank])
    match = STEP_FOLDER.fullmatch(path.name)
    saved, wrong = verify_together(
        path, int(match[1]) if match else 0, context, verifies=searches and path.is_dir(), shares=shares
    )
    is_other_format = isinstance(wrong, OtherFormatError)
    reason = reason if wrong is None else str(wrong)
    readers = _readers(saved, context)
    answers = all_gather_object([reason, path.is_dir(), is_other_format], context)
    if readers is None:
        reason, _, is_other_format = next((answer for answer in answers if answer[1]), answers[0])
        failed = CheckpointError(
            f"{setting}={path} cannot be read: {reason}."
            if is_other_format
            else f"{setting}={path} is not a complete checkpoint: {reason}. Set it to a complete checkpoints/step-... "
            "folder of a run."
        )
        failed.is_reported_elsewhere = not context.is_main
        raise failed
    return _broadcast_contents(readers, saved, context)


def _broadcast_contents(readers: list[int], saved: SavedCheckpoint | None, context: RankContext) -> SelectedCheckpoint:
    """Collective. Sends state and config from the first reader to all ranks."""
    contents = None
    if context.rank == readers[0]:
        assert saved is not None
        config = saved.path / CONFIG
        text = config.read_text(encoding="utf-8") if CONFIG in saved.manifest["files"] else ""
        run_id = str(saved.manifest.get("run", ""))
        contents = {"step": saved.step, "state": dict(saved.state), "config": text, "run": run_id}
    received = broadcast_object(contents, context, src=readers[0])
    step, state, config_text, run_id = (received[name] for name in ("step", "state", "config", "run"))
    return SelectedCheckpoint(step, readers, state, config_text, saved, run_id)


def _rename_or_explain(path: Path, wrong: DamagedCheckpointError) -> str | None:
    """Renames a checkpoint that is damaged; returns an error message if it may be intact."""
    if isinstance(wrong, OtherFormatError):
        return f"{path} cannot be read: {wrong}, or start again with run.overwrite=true."
    if isinstance(wrong, UnreadableCheckpointError):
        return (
            f"{path} cannot be read, so it is unknown whether it is intact: {wrong}. Fix that, or move the folder away to "
            "resume from the checkpoint before it."
        )
    renamed = _rename_with_prefix(path, "damaged")
    log.warning("%s is damaged: %s. It is now %s; the checkpoint before it is used", path, wrong, renamed.name)
    return None


def _rename_with_prefix(path: Path, prefix: str) -> Path:
    """Renames a checkpoint to an unused name that does not count as a checkpoint."""
    names = [f"{prefix}-{path.name}", *(f"{prefix}-{path.name}-{number}" for number in range(2, 1000))]
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    # Fails in a read-only folder, or if another node renamed it first. The next start skips it again.
    with suppress(OSError):
        path.rename(target)
        return target
    return path


def rename_newer(checkpoints: Path, step: int, context: RankContext) -> None:
    """Collective. Renames checkpoints after `step`, where this start begins: they are incomplete or of another history."""
    if context.is_node_main:
        for number, path in list_checkpoints(checkpoints).items():
            if number > step:
                _rename_with_prefix(path, "left")
    barrier(context)  # No rank may write new checkpoints before the old ones are renamed.

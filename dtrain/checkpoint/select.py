"""Which checkpoint a start goes on from: the newest whole one that any node holds."""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.format import CONFIG, Damaged, Saved, Unreadable, found, read_manifest, verify
from dtrain.console import log
from dtrain.distributed.collectives import all_gather_object, barrier, broadcast_object, on_main
from dtrain.distributed.topology import Topology
from dtrain.errors import CheckpointError

_DAMAGED = re.compile(r"damaged-step-(\d+)(-\d+)?")


@dataclass(frozen=True)
class Chosen:
    """The same on every rank, `saved` apart.

    step: of the checkpoint. readers: for each of its parts, the lowest rank that holds it. state: its state.json.
    config_text: its settings. saved: where it lies; None on ranks that see none.
    """

    step: int
    readers: list[int]
    state: dict[str, Any]
    config_text: str
    saved: Saved | None


def sees_rank_0s_folder(folder: Path, topology: Topology) -> list[bool]:
    """Collective. For every rank, whether `folder` is the same one there as on rank 0 (a shared file system)."""
    mark = folder / f".seen-{broadcast_object(uuid.uuid4().hex, topology)}"

    def make() -> None:
        with suppress(OSError):  # read-only: found out, and said, by those that write
            mark.touch()

    on_main(make, topology)
    here = topology.is_main or mark.exists()
    seen: list[bool] = all_gather_object(here, topology)
    if topology.is_main:
        mark.unlink(missing_ok=True)
    return seen


def newest(checkpoints: Path, topology: Topology, *, below: int | None = None) -> tuple[Chosen | None, frozenset[int]]:
    """Collective. The newest whole checkpoint on any node, and the steps of damaged ones, which are renamed.

    One rank of each node that has a folder of its own looks; it reads every byte of the candidates, newest first.

    Args:
        below: only those of earlier steps.

    Raises:
        CheckpointError: on every rank; one that may be whole cannot be read.
    """
    sees = sees_rank_0s_folder(checkpoints, topology) if topology.num_nodes > 1 else [True] * topology.world_size
    looks = topology.is_main or (topology.is_node_main and not sees[topology.rank])
    candidates = {step: path for step, path in found(checkpoints).items() if below is None or step < below}
    while True:
        step = max(all_gather_object(next(iter(candidates), -1) if looks else -1, topology))
        if step < 0:
            return None, _damaged(checkpoints, topology)
        path = candidates.pop(step, None) if looks else None
        saved, trouble = _whole(path) if path is not None else (None, None)
        readers = _readers(saved, topology, trouble)
        if readers is not None:
            return _told(readers, saved, topology), _damaged(checkpoints, topology)


def _readers(saved: Saved | None, topology: Topology, trouble: str | None = None) -> list[int] | None:
    """Collective. For each part the lowest rank that has it; None where not all parts are there.

    Parts that different starts wrote make no whole: between them may lie other settings and other ranks.

    Raises:
        CheckpointError: on every rank; one has `trouble`.
    """
    told = all_gather_object((saved.parts if saved is not None else None, trouble), topology)
    if troubles := [words for _, words in told if words is not None]:
        failed = CheckpointError(troubles[0])
        failed.is_reported_elsewhere = not topology.is_main
        raise failed
    lowest: dict[tuple[str, int], dict[int, int]] = {}
    for rank, (parts, _) in enumerate(told):
        if parts is not None:
            start, here, number = parts
            ranks = lowest.setdefault((start, number), {})
            ranks.update({part: rank for part in here if part not in ranks})
    whole = [ranks for (_, number), ranks in lowest.items() if set(range(number)) <= ranks.keys()]
    return [rank for _, rank in sorted(whole[0].items())] if whole else None


def is_there(path: Path, topology: Topology) -> bool:
    """Collective. Whether the nodes hold a checkpoint, by its manifests: no file of it is read."""
    parts = None
    if topology.is_node_main:
        with suppress(Damaged):
            manifest = read_manifest(path)
            parts = Saved(path, 0, manifest, {})
    return _readers(parts, topology) is not None


def _damaged(checkpoints: Path, topology: Topology) -> frozenset[int]:
    names = [path.name for path in checkpoints.glob("damaged-*")] if topology.is_node_main else []
    steps = [int(match[1]) for match in map(_DAMAGED.fullmatch, names) if match]
    return frozenset(step for part in all_gather_object(steps, topology) for step in part)


def at(path: Path, topology: Topology, *, named_by: str) -> Chosen:
    """Collective. The checkpoint in that folder.

    Args:
        named_by: the setting that named it, for the message.

    Raises:
        CheckpointError: on every rank; no node has it whole.
    """
    why = "there is no such folder"
    saved = None
    if topology.is_node_main and path.is_dir():
        try:
            saved = verify(path)
        except Damaged as error:
            why = str(error)
    readers = _readers(saved, topology)
    answers = all_gather_object([why, path.is_dir()], topology)
    if readers is None:
        reason = next((why for why, is_there in answers if is_there), why)
        failed = CheckpointError(
            f"{named_by}={path} is no whole checkpoint: {reason}. Name a folder checkpoints/step-... of a run that is."
        )
        failed.is_reported_elsewhere = not topology.is_main
        raise failed
    return _told(readers, saved, topology)


def _told(readers: list[int], saved: Saved | None, topology: Topology) -> Chosen:
    mine = None
    if topology.rank == readers[0]:
        assert saved is not None
        config = saved.path / CONFIG
        text = config.read_text(encoding="utf-8") if CONFIG in saved.manifest["files"] else ""
        mine = {"step": saved.step, "state": dict(saved.state), "config": text}
    told = broadcast_object(mine, topology, src=readers[0])
    return Chosen(told["step"], readers, told["state"], told["config"], saved)


def _whole(path: Path) -> tuple[Saved | None, str | None]:
    """The checkpoint if it is whole, or why that cannot be told; a damaged one gets another name and is none again."""
    try:
        return verify(path), None
    except Unreadable as error:
        return None, (
            f"{path} cannot be read, so that nobody knows whether it is whole: {error}. Mend that, or move the folder away to "
            "go on from the checkpoint before it."
        )
    except Damaged as error:
        aside = _set_aside(path, "damaged")
        log.warning("%s is damaged: %s. It is %s now; the one before it is used", path, error, aside.name)
    return None, None


def _set_aside(path: Path, why: str) -> Path:
    """Gives a checkpoint a name that is not taken for one, and was not given before."""
    names = [f"{why}-{path.name}", *(f"{why}-{path.name}-{number}" for number in range(2, 1000))]
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    with suppress(OSError):  # a read-only folder, or another node was quicker: it is passed over again
        path.rename(target)
        return target
    return path


def set_newer_aside(checkpoints: Path, step: int, topology: Topology) -> None:
    """Collective. Renames what lies beyond `step`, where this start begins: another line of the run, or a part of one."""
    if topology.is_node_main:
        for number, path in found(checkpoints).items():
            if number > step:
                _set_aside(path, "left")
    barrier(topology)  # before anybody writes new ones

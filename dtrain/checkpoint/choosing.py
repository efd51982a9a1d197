"""Which checkpoint a start goes on from: the newest whole one that any node holds."""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.layout import CONFIG, Damaged, Saved, found, verify
from dtrain.collectives import all_gather_object, barrier, broadcast_object, on_main
from dtrain.console import log
from dtrain.errors import CheckpointError
from dtrain.topology import Topology

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


def newest(checkpoints: Path, topology: Topology) -> tuple[Chosen | None, frozenset[int]]:
    """Collective. The newest whole checkpoint on any node, and the steps of damaged ones, which are renamed.

    One rank of each node that has a folder of its own looks; it reads every byte of the candidates, newest first.
    """
    sees = sees_rank_0s_folder(checkpoints, topology) if topology.num_nodes > 1 else [True] * topology.world_size
    looks = topology.is_main or (topology.is_node_main and not sees[topology.rank])
    candidates = found(checkpoints) if looks else {}
    while True:
        step = max(all_gather_object(next(iter(candidates), -1), topology))
        if step < 0:
            return None, _damaged(checkpoints, topology)
        path = candidates.pop(step, None)
        saved = _whole(path) if path is not None else None
        readers = _readers(saved, topology)
        if readers is not None:
            return _told(readers, saved, topology), _damaged(checkpoints, topology)


def _readers(saved: Saved | None, topology: Topology) -> list[int] | None:
    """Collective. For each part the lowest rank that has it; None where not all parts are there."""
    lowest: dict[int, int] = {}
    number = 1
    for rank, told in enumerate(all_gather_object(saved.parts if saved is not None else None, topology)):
        if told is not None:
            parts, number = told
            lowest.update({part: rank for part in parts if part not in lowest})
    return [lowest[part] for part in range(number)] if set(range(number)) <= lowest.keys() else None


def _damaged(checkpoints: Path, topology: Topology) -> frozenset[int]:
    names = [path.name for path in checkpoints.glob("damaged-*")] if topology.is_node_main else []
    steps = [int(match[1]) for match in map(_DAMAGED.fullmatch, names) if match]
    return frozenset(step for part in all_gather_object(steps, topology) for step in part)


def at(path: Path, topology: Topology) -> Chosen:
    """Collective. The checkpoint that a user named.

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
            f"checkpoint.resume={path} is no whole checkpoint: {reason}. Name a folder checkpoints/step-... of a run, or "
            "auto for the newest whole one of this run."
        )
        failed.is_said_elsewhere = not topology.is_main
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


def _whole(path: Path) -> Saved | None:
    """The checkpoint if it is whole; else it gets another name, so that nobody takes it for one again."""
    try:
        return verify(path)
    except Damaged as error:
        aside = _set_aside(path)
        log.warning("%s is damaged: %s. It is %s now; the one before it is used", path, error, aside.name)
    return None


def _set_aside(path: Path) -> Path:
    names = [f"damaged-{path.name}", *(f"damaged-{path.name}-{number}" for number in range(2, 100))]
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    with suppress(OSError):  # a read-only folder: it stays, and is passed over again
        path.rename(target)
        return target
    return path


def set_newer_aside(checkpoints: Path, step: int, topology: Topology) -> None:
    """Collective. Renames checkpoints beyond `step`: a start that goes back further makes them another run's."""
    if topology.is_node_main:
        for number, path in found(checkpoints).items():
            if number > step:
                with suppress(OSError):  # another node of the same file system was quicker
                    path.rename(path.with_name(f"left-{path.name}"))
    barrier(topology)

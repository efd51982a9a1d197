"""Checks a checkpoint on a disk that ranks share: each of them reads a part of the files, and rank 0 decides.

The rank that checked a part of a sharded checkpoint also reads its tensors later, from memory where they still are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.checkpoint.format import (
    SHARD,
    DamagedCheckpointError,
    SavedCheckpoint,
    is_intact,
    read_manifest,
    shard_prefix,
    verify,
)
from dtrain.distributed.collectives import all_gather_numbers, broadcast_object, gather_object, scatter_object
from dtrain.distributed.rank_context import RankContext

Share = dict[str, Any]
"""What one rank checks, as JSON: the entries of the manifest for its `files`, and the `parts` that they make up."""


def verify_together(
    path: Path, step: int, context: RankContext, *, verifies: bool, shares: Sequence[bool]
) -> tuple[SavedCheckpoint | None, DamagedCheckpointError | None]:
    """Collective. Returns the checkpoint as this rank will read it, or what is wrong with it.

    On a shared disk rank 0 returns the checkpoint without the parts of a sharded one that other ranks have checked, and
    those return theirs. A rank that finds something wrong says so, and rank 0 reads that file again: its own view of the
    disk decides, and it reads the parts of that rank.

    Args:
        path: the folder, which need not exist on this rank.
        step: the step of the checkpoint.
        verifies: whether this rank looks for the checkpoint in its own folder.
        shares: for each rank, whether it sees the folder of rank 0.
    """
    if context.world_size == 1 or sum(shares) == 1:
        return _attempt(lambda: verify(path)) if verifies else (None, None)
    local_ranks = all_gather_numbers([context.topology.local_rank], context)[:, 0].tolist()
    # First one rank of each node, because a node has its own connection to the disk.
    helpers = sorted((rank for rank, is_shared in enumerate(shares) if is_shared), key=lambda r: (local_ranks[r], r))
    dealt = _deal(path, helpers, context.world_size) if context.is_main and verifies else None
    own: Share = scatter_object(dealt or ([{}] * context.world_size if context.is_main else None), context)
    saved: SavedCheckpoint | None = None
    error: DamagedCheckpointError | None = None
    if verifies and not context.is_main:  # another disk than that of rank 0
        saved, error = _attempt(lambda: verify(path))
    files: Mapping[str, Any] = own.get("files", {})
    wrong = gather_object([name for name, expected in files.items() if not is_intact(path / name, expected)], context)
    if context.is_main and verifies:
        checked = {name for share in dealt or () for name in share.get("files", {})}
        doubtful = {name for names in wrong or () for name in names}
        saved, error = _attempt(lambda: verify(path, checked=checked - doubtful))
    is_good = broadcast_object(saved is not None, context)
    is_reader = scatter_object([not names for names in wrong] if wrong is not None else None, context)
    if context.is_main and saved is not None and dealt is not None:
        helped = zip(dealt[1:], (wrong or [])[1:], strict=True)
        others = {part for share, names in helped if not names for part in share.get("parts", ())}
        kept = [part for part in saved.stored_parts[1] if part not in others]
        return SavedCheckpoint(path, saved.step, {**saved.manifest, "parts": kept}, saved.state), None
    if is_good and is_reader and own.get("parts") and not context.is_main:
        return SavedCheckpoint(path, step, own, {}), None
    return saved, error


def _attempt(check: Callable[[], SavedCheckpoint]) -> tuple[SavedCheckpoint | None, DamagedCheckpointError | None]:
    try:
        return check(), None
    except DamagedCheckpointError as error:
        return None, error


def _deal(path: Path, helpers: Sequence[int], world_size: int) -> list[Share] | None:
    """Returns the share of each rank: the largest files go first to the rank with the fewest bytes.

    None if the manifest cannot be used; `verify` says why. Part 0 of a sharded checkpoint, and small files, are rank 0's.
    """
    try:
        manifest = read_manifest(path)
        files: Mapping[str, Any] = manifest["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
    except (DamagedCheckpointError, ValueError, KeyError, TypeError):
        return None
    parts = list(manifest.get("parts", [0]))
    units = _units(list(files), parts)
    facts = {"start": manifest.get("start"), "of": manifest.get("of", 1)}
    shares: list[Share] = [{**facts, "files": {}, "parts": []} for _ in range(world_size)]
    loads = [(0, place, rank) for place, rank in enumerate(helpers)]
    heapq.heapify(loads)
    for part, names in sorted(units, key=lambda unit: sum(sizes[name] for name in unit[1]), reverse=True):
        load, place, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + sum(sizes[name] for name in names), place, rank))
        shares[rank]["files"] |= {name: files[name] for name in names}
        shares[rank]["parts"] = sorted([*shares[rank]["parts"], *([] if part is None else [part])])
    return shares


def _units(names: Sequence[str], parts: Sequence[int]) -> list[tuple[int | None, list[str]]]:
    """Returns what one rank checks as a whole: all files of a part, or one file of weights that belongs to none.

    What rank 0 has to read in any case is not in it: small files, and part 0.
    """
    of_part: dict[int, list[str]] = {part: [] for part in parts if part}
    prefixes = {shard_prefix(part): part for part in of_part}
    units: list[tuple[int | None, list[str]]] = []
    for name in names:
        if name.startswith(f"{SHARD}-"):
            part = prefixes.get(name[: len(shard_prefix(0))])
            if part is not None:
                of_part[part].append(name)
        elif name.endswith(".safetensors"):
            units.append((None, [name]))
    return units + [(part, names) for part, names in of_part.items() if names]

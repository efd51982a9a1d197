"""Reads from torch's flight recorder and process group which collectives this rank has started."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

_DUMP_FUNCTIONS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""For gloo and for NCCL. A torch without them reports no collectives."""


def last_collectives() -> list[dict[str, Any]]:
    """Returns, for each process group, the oldest collective that has not ended, or else the last one. JSON types.

    Each has `group` (its name), `number` (counts the collectives of the group), `name` (such as gloo:all_reduce),
    `sizes` (of its tensors) and `pending` (whether it has not ended).
    """
    last: dict[tuple[str, str], dict[str, Any]] = {}  # gloo and NCCL count separately, even in one group
    for entry in _entries():
        group, is_pending = str(entry["process_group"][-1]), not entry["retired"]
        key = (group, str(entry["profiling_name"]).partition(":")[0])
        before = last.get(key)
        if before is not None and before["pending"] and is_pending:
            continue  # it is queued behind the older one
        last[key] = {
            "group": group,
            "number": int(entry["collective_seq_id"]),
            "name": str(entry["profiling_name"]),
            "sizes": json.dumps(entry["input_sizes"]),
            "pending": is_pending,
        }
    return list(last.values())


def collective_number() -> int:
    """Returns how many collectives the default group has started on this rank; -1 without a group."""
    if not dist.is_initialized():
        return -1
    return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[union-attr]


def _entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name in _DUMP_FUNCTIONS:
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            entries += [entry for entry in json.loads(dump(True, False)).get("entries", []) if "retired" in entry]
    return entries

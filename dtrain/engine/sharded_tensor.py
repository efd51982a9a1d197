"""Tensors that are split over the ranks by rows: torch's DTensor, as FSDP2 makes it.

Every rank holds ceil(rows / ranks) rows, the last ones fewer or none.
"""

from __future__ import annotations

from typing import Any

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is split over the ranks."""
    return hasattr(
        tensor, "to_local"
    )  # an isinstance would import torch.distributed.tensor, a quarter of all import time


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's rows of a sharded tensor; they share its memory."""
    sharded: Any = tensor.detach()
    rows: torch.Tensor = sharded.to_local()
    return rows


def first_row(tensor: torch.Tensor) -> int:
    """Returns the index of this rank's first row."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    size = -(-len(tensor) // mesh.size())
    start: int = mesh.get_local_rank() * size
    return min(start, len(tensor))


def own_rows(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns a view of the rows of a complete tensor that this rank keeps.

    Args:
        like: a sharded tensor of the same rows.
    """
    start = first_row(like)
    return whole[start : start + len(local_rows(like))]


def gather(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Collective. Returns the complete tensor, on every rank.

    Args:
        rows: this rank's rows.
        like: a sharded tensor of the same shape.
    """
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    whole: torch.Tensor = DTensor.from_local(
        rows, sharded.device_mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return whole


def copy_values(target: torch.Tensor, values: torch.Tensor) -> None:
    """Sets the values of a tensor, sharded or not, in place.

    Args:
        values: complete, with the target's number of elements.
    """
    with torch.no_grad():
        if is_sharded(target):
            local_rows(target).copy_(own_rows(values.view(target.shape), target))
        else:
            target.copy_(values)

"""Copies batches to the device, and remembers what the host knows of them, so that nobody fetches it back.

A batch is made on the host. Which of its positions are tokens decides how it is computed (unpadding_layout.py), and which
are targets decides which logits are (tasks/target_loss.py). To read that from the device would stop the host until the
device has done all its work. So each tensor on the device carries the one on the host that it was copied from.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_ATTRIBUTE = "_dtrain_host_copy"


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies a batch to the model's device. On the CPU these are the same tensors."""
    return {name: copy_to(tensor, device) for name, tensor in tensors.items()}


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on a device. To a CUDA device the copy starts at once, and the host does not wait for it."""
    is_on_host = tensor.device.type == "cpu"
    # Only memory that cannot be paged out is copied without waiting. torch keeps it until the copy has ended.
    source = tensor.pin_memory() if is_on_host and device.type == "cuda" else tensor
    moved = source.to(device, non_blocking=True)
    if is_on_host and device.type != "cpu":
        remember(moved, tensor)
    return moved


def array_to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns an array of the host as a tensor on a device; see `copy_to`."""
    return copy_to(torch.from_numpy(array), device)


def remember(tensor: torch.Tensor, host: torch.Tensor) -> None:
    """Makes `host` what `host_copy` returns for this tensor, as long as the tensor is not changed."""
    # The reference tells a copy of the tensor, which gets its attributes too, from the tensor itself.
    setattr(tensor, _ATTRIBUTE, (host, tensor._version, weakref.ref(tensor)))


def _kept(tensor: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """Returns what `remember` has kept for this tensor: the host's copy and the version."""
    kept: Any = getattr(tensor, _ATTRIBUTE, None)
    return kept[:2] if kept is not None and kept[2]() is tensor else None


def host_copy(tensor: torch.Tensor) -> torch.Tensor | None:
    """Returns a tensor's values on the host, without a transfer; None if they are not known there.

    A tensor on the host is its own copy. A view that holds all of a remembered tensor has its copy in the view's shape.
    """
    if tensor.device.type == "cpu":
        return tensor.detach()
    kept, base = _kept(tensor), tensor._base
    if kept is None and base is not None and base.numel() == tensor.numel() and tensor.is_contiguous():
        kept = _kept(base)
        if kept is not None and not base.is_contiguous():
            return None
    if kept is None or kept[1] != tensor._version:
        return None
    host = kept[0]
    return host.reshape(tensor.shape) if host.numel() == tensor.numel() else host


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's values on the host. Only if they are not known there, they are fetched from the device."""
    known = host_copy(tensor)
    return tensor.detach().cpu() if known is None else known


def pick(tensor: torch.Tensor, is_picked: torch.Tensor) -> torch.Tensor:
    """Returns `tensor[is_picked]`. If the host knows which elements these are, nothing is fetched from the device.

    Args:
        is_picked: bool, over the first dimensions of the tensor.
    """
    known = host_copy(is_picked) if is_picked.device.type != "cpu" else None
    if known is None:
        return tensor[is_picked]
    places = copy_to(known.flatten().nonzero().squeeze(1), tensor.device)
    return tensor.flatten(0, is_picked.dim() - 1).index_select(0, places)

"""Optimizer slots on the host and between ranks, for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dtrain.collectives import broadcast, broadcast_object
from dtrain.topology import Topology

STEP = "step"
"""What every torch optimizer calls its count of steps; it stays on the host."""


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host: floating point in fp32 (float64 stays), other types as they are."""
    copied = tensor.detach().to("cpu", copy=True)
    return copied if copied.dtype == torch.float64 or not copied.is_floating_point() else copied.float()


def host_slots(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The optimizer's entries for one parameter, whatever they are called; plain numbers become 0-d tensors."""
    return {
        key: host_copy(value if torch.is_tensor(value) else torch.tensor(value))
        for key, value in state.items()
        if value is not None
    }


def device_slots(slots: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same entries where the optimizer wants them: beside the parameter, the count of steps apart."""
    return {key: value if key == STEP else value.to(parameter.device, parameter.dtype) for key, value in slots.items()}


def norms_by_name(gradients: Iterable[tuple[str, torch.Tensor | None]], *, scale: float) -> dict[str, float]:
    """L2 norm of each gradient, of what is multiplied by `scale`; one transfer to the host for all."""
    norms = {name: gradient.norm(dtype=torch.float64) for name, gradient in gradients if gradient is not None}
    values = torch.stack(list(norms.values())).tolist() if norms else []
    return {name: value / scale for name, value in zip(norms, values, strict=True)}


def broadcast_slots(
    name: str, read: Callable[[str], Mapping[str, torch.Tensor]], topology: Topology
) -> dict[str, torch.Tensor]:
    """Collective. Rank 0's slots of one parameter, on every rank's host; empty where there are none."""
    own = dict(read(name)) if topology.is_main else {}
    keys = broadcast_object(sorted(own) if topology.is_main else None, topology)
    return {key: broadcast(own.get(key), topology) for key in keys}

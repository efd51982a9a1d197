"""Optimizer slots on the host and between ranks, shared by all engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from dtrain.distributed.collectives import broadcast, broadcast_object
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.protocol import Shard

STEP = "step"
"""The name that every torch optimizer has for its count of steps: a float32 tensor of one number."""

FEEDBACK_PREFIX = "exchange_"
"""Slots of this prefix hold a communication hook's error-feedback state. Checkpoints contain this name."""


def optimizer_slots(slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the slots that an optimizer made."""
    return {key: value for key, value in slots.items() if not key.startswith(FEEDBACK_PREFIX)}


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy on the host: floating point in fp32 (float64 stays), other types as they are."""
    copied = tensor.detach().to("cpu", copy=True)
    return copied if copied.dtype == torch.float64 or not copied.is_floating_point() else copied.float()


def slot_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the optimizer's entries for one parameter, by their names; plain numbers become 0-d tensors."""
    return {
        key: value if torch.is_tensor(value) else torch.tensor(value)
        for key, value in state.items()
        if value is not None
    }


def host_slots(slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns copies on the host."""
    return {key: host_copy(value) for key, value in slots.items()}


def device_slots(
    slots: Mapping[str, torch.Tensor], parameter: torch.Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Returns loaded entries on the device and in the type of the parameter; the count of steps where `place_count` puts it.

    An entry of the parameter's shape gets its memory layout too, because torch's fused AdamW ignores strides.
    """
    placed = {}
    for key, value in slots.items():
        if key == STEP:
            placed[key] = place_count(value, parameter, optimizer)
        elif value.shape == parameter.shape:
            placed[key] = torch.empty_like(parameter).copy_(value)
        else:
            placed[key] = value.to(parameter.device, parameter.dtype)
    return placed


def place_count(count: torch.Tensor, parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Returns a copy of a count of steps: on the parameter's device for a fused optimizer, else on the host."""
    is_fused = bool(optimizer.defaults.get("fused"))
    return count.detach().to(parameter.device if is_fused else "cpu", copy=True)


def norms_by_name(gradients: Iterable[tuple[str, torch.Tensor | None]], *, scale: float) -> dict[str, float]:
    """Returns the L2 norm of each gradient, divided by `scale`, with one transfer to the host for all."""
    norms = {name: gradient.norm(dtype=torch.float64) for name, gradient in gradients if gradient is not None}
    values = torch.stack(list(norms.values())).tolist() if norms else []
    return {name: value / scale for name, value in zip(norms, values, strict=True)}


def broadcast_slots(slots: Mapping[str, torch.Tensor], context: RankContext) -> dict[str, torch.Tensor]:
    """Collective. Returns rank 0's slots of one parameter on every rank's host."""
    keys = broadcast_object(sorted(slots) if context.is_main else None, context)
    return {key: broadcast(slots.get(key), context) for key in keys}


def even_part(tensor: torch.Tensor, context: RankContext) -> tuple[int, torch.Tensor]:
    """Returns this rank's share of a tensor that every rank has: the index of its first element, and the elements."""
    size = -(-tensor.numel() // context.world_size)
    start = min(context.rank * size, tensor.numel())
    return start, tensor.detach().reshape(-1)[start : start + size]


def replicated_shards(
    name: str, value: torch.Tensor, slots: Mapping[str, torch.Tensor], context: RankContext
) -> Iterator[Shard]:
    """Yields the shards of a replicated parameter that this rank saves: an even part of each tensor of its size; counts on rank 0."""
    for slot, tensor in (None, value), *sorted(slots.items()):
        if tensor.numel() == value.numel():
            start, part = even_part(tensor, context)
            if part.numel():
                yield Shard(name, slot, start, part)
        elif context.is_main:
            yield Shard(name, slot, None, tensor)


def scaler_scalars(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """Returns a GradScaler's state: its scale, and the number of steps since it last changed."""
    return {"loss_scale": float(scaler.get_scale()), "loss_scale_steps": float(scaler.state_dict()["_growth_tracker"])}


def load_scaler(scaler: torch.amp.GradScaler, scalars: Mapping[str, float], context: RankContext) -> None:
    """Collective. Restores rank 0's `scaler_scalars`. Does nothing if there are none (a run of another precision)."""
    saved = broadcast_object(dict(scalars), context)
    if "loss_scale" in saved:
        steps = int(saved.get("loss_scale_steps", 0))
        scaler.load_state_dict({**scaler.state_dict(), "scale": saved["loss_scale"], "_growth_tracker": steps})

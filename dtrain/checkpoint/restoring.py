"""A checkpoint into a run: weights before the engine is built, the optimizer's slots into it.

Read by the rank that holds it and broadcast a tensor at a time, so that no rank has a second whole copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from dtrain.checkpoint.choosing import Chosen
from dtrain.checkpoint.reading import Reader
from dtrain.checkpoint.snapshot import place_in, stored_dtype
from dtrain.collectives import broadcast, broadcast_object
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError
from dtrain.topology import Topology


@contextmanager
def opened(chosen: Chosen, module: nn.Module, topology: Topology) -> Iterator[Reader | None]:
    """The checkpoint's reader on the rank that holds it, None elsewhere."""
    if topology.rank != chosen.holder or chosen.saved is None:
        with nullcontext():
            yield None
        return
    with Reader(chosen.saved, place_in(module)) as reader:
        yield reader


def restore_weights(module: nn.Module, chosen: Chosen, topology: Topology) -> None:
    """Collective. Parameters and buffers of a bare, unsharded module.

    Raises:
        CheckpointError: on every rank; the checkpoint is another model's.
    """
    targets: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with opened(chosen, module, topology) as reader:
        _check(reader, targets, chosen, topology)
        for name, target in targets.items():
            value = reader.value(name) if reader is not None else None
            like = torch.empty(target.shape, dtype=stored_dtype(target.dtype))
            with torch.no_grad():
                target.copy_(broadcast(value, topology, src=chosen.holder, like=like))


def restore_slots(engine: Engine, chosen: Chosen, topology: Topology) -> None:
    """Collective. What the optimizer knows of each parameter, and the loss scale."""
    with opened(chosen, engine.module, topology) as reader:
        engine.load_named_slots(lambda name: reader.slots(name) if reader is not None else {}, src=chosen.holder)
    engine.load_scalars(chosen.state["engine"])


def _check(reader: Reader | None, targets: dict[str, torch.Tensor], chosen: Chosen, topology: Topology) -> None:
    wrong = None
    if reader is not None:
        wrong = next(_differences(reader, targets), "")
    told = broadcast_object(wrong, topology, src=chosen.holder)
    if told:
        failed = CheckpointError(
            f"The checkpoint of step {chosen.step} does not fit this model: {told}. Use the model section that it was "
            "trained with, or another run.name."
        )
        failed.is_said_elsewhere = not topology.is_main
        raise failed


def _differences(reader: Reader, targets: dict[str, torch.Tensor]) -> Iterator[str]:
    for name, target in targets.items():
        if not reader.has(name):
            yield f"it has no {name}"
        elif reader.shape(name) != tuple(target.shape):
            yield f"{name} is {reader.shape(name)} in it and {tuple(target.shape)} here"

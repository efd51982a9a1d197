"""A checkpoint into a run: weights before the engine is built, the optimizer's slots into it.

Read by the ranks that hold it and broadcast a tensor at a time, so that no rank has a second whole copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dtrain.checkpoint.read import Tensors
from dtrain.checkpoint.select import Chosen
from dtrain.distributed.topology import Topology
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError


def restore_weights(module: nn.Module, chosen: Chosen, topology: Topology) -> None:
    """Collective. Parameters and buffers of a bare, unsharded module.

    Raises:
        CheckpointError: on every rank; the checkpoint is another model's.
    """
    targets: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    persistent = module.state_dict().keys()
    with Tensors(chosen, module, topology) as tensors:
        # Tables that a model makes anew each time; another version of the library may have more of them.
        targets = {name: target for name, target in targets.items() if name in persistent or tensors.has(name)}
        if wrong := next(_differences(tensors, targets), None):  # alike on every rank
            failed = CheckpointError(
                f"The checkpoint of step {chosen.step} does not fit this model: {wrong}. Use the model section that it was "
                "trained with, or another run.name."
            )
            failed.is_reported_elsewhere = not topology.is_main
            raise failed
        for name, target in targets.items():
            with torch.no_grad():
                target.copy_(tensors.value(name, target.shape))


def restore_slots(engine: Engine, chosen: Chosen, topology: Topology) -> None:
    """Collective. What the optimizer knows of each parameter, and the loss scale."""
    with Tensors(chosen, engine.module, topology) as tensors:
        engine.load_named_slots(tensors.slots)
    engine.load_scalars(chosen.state["engine"])


def _differences(tensors: Tensors, targets: dict[str, torch.Tensor]) -> Iterator[str]:
    for name, target in targets.items():
        if not tensors.has(name):
            yield f"it has no {name}"
        elif tensors.size(name) != target.numel():
            yield f"{name} has {tensors.size(name)} numbers in it and {target.numel()} here"

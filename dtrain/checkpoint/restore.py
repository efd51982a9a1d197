"""Restores a run from a checkpoint: weights before the engine is built, then the optimizer's slots into the engine.

The ranks that have the files read them and broadcast one tensor at a time, so no rank holds a second full copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dtrain.checkpoint.read import CheckpointTensors
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.protocol import Engine
from dtrain.engine.sharded_tensor import copy_values
from dtrain.errors import CheckpointError


def restore_weights(module: nn.Module, checkpoint: SelectedCheckpoint, context: RankContext) -> None:
    """Collective. Loads parameters and buffers into a module in its place, without an engine.

    Raises:
        CheckpointError: on every rank; the checkpoint belongs to another model.
    """
    targets: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    persistent = module.state_dict().keys()
    with CheckpointTensors(checkpoint, module, context) as tensors:
        # Skips tables that the model recomputes; another version of the library may have more of them.
        targets = {name: target for name, target in targets.items() if name in persistent or tensors.has(name)}
        if difference := next(_differences(tensors, targets), None):  # The same on every rank.
            failed = CheckpointError(
                f"The checkpoint of step {checkpoint.step} does not fit this model: {difference}. Use the model section "
                "that it was trained with, or another run.name."
            )
            failed.is_reported_elsewhere = not context.is_main
            raise failed
        for name, target in targets.items():
            copy_values(target, tensors.value(name, target.shape))


def restore_slots(engine: Engine, checkpoint: SelectedCheckpoint, context: RankContext) -> None:
    """Collective. Loads the optimizer's state of each parameter, and the loss scale."""
    with CheckpointTensors(checkpoint, engine.module, context) as tensors:
        engine.load_named_slots(tensors.slots)
    engine.load_scalars(checkpoint.state["engine"])


def _differences(tensors: CheckpointTensors, targets: dict[str, torch.Tensor]) -> Iterator[str]:
    for name, target in targets.items():
        if not tensors.has(name):
            yield f"it has no {name}"
        elif tensors.num_elements(name) != target.numel():
            yield f"{name} has {tensors.num_elements(name)} elements in it and {target.numel()} in this model"

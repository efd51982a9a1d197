"""Finds trainable parameters that get no gradient, by one micro-batch before any engine is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtrain.data.order import StepPlan
from dtrain.data.seeding import DataPosition, seed_all
from dtrain.models.freezing import frozen_statistics
from dtrain.tasks.protocol import Task


def parameters_without_gradient(
    module: nn.Module, task: Task, plan: StepPlan, *, train_mode: Callable[[nn.Module], None]
) -> list[str]:
    """Returns the names of trainable parameters without a gradient from micro-batch 0 of step 0, e.g. an unused pooler.

    Every rank computes the same from the same micro-batch. Leaves weights and buffers unchanged, and all gradients None.
    """
    position = DataPosition(0, plan.micro_batches(0)[0])
    rows: Mapping[str, Sequence[Any]] = task.splits["train"][list(position.example_index)]
    device = next(module.parameters()).device
    train_mode(module)
    seed_all(plan.seed, "forward", 0, 0)
    with frozen_statistics(module):
        loss = task.loss(module, {name: tensor.to(device) for name, tensor in task.collate(rows, position).items()})
    if loss.requires_grad:
        torch.autograd.backward(loss)
    unused = [
        name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    module.zero_grad(set_to_none=True)
    return unused

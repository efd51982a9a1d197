"""Finds trainable parameters that get no gradient, by a few micro-batches before any engine is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dtrain.data.order import StepPlan
from dtrain.data.seeding import DataPosition, seed_all
from dtrain.models.freezing import frozen_statistics
from dtrain.models.host_copy import to_device
from dtrain.models.placement import compute_device, gathered
from dtrain.tasks.protocol import Task

PROBES = 4
"""Micro-batches that are tried while some parameter has no gradient yet: others may use another expert, head or layer."""

LAYER_DROP_SETTINGS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Names that transformers gives to the share of layers that a training pass skips, in a model's config."""


def parameters_without_gradient(
    module: nn.Module, task: Task, plan: StepPlan, *, train_mode: Callable[[nn.Module], None]
) -> list[str]:
    """Returns the names of trainable parameters without a gradient from the first micro-batches, e.g. an unused pooler.

    Every rank computes the same from the same micro-batches. Leaves weights and buffers unchanged, and all gradients None.
    """
    train_mode(module)
    unused: list[str] = []
    with frozen_statistics(module), _all_layers(module):
        # From both ends: sorted by length, the first ones have short rows only, and a part may be for long ones.
        first, *others = enumerate(plan.micro_batches(0))
        for index, examples in [first, *reversed(others)][:PROBES]:
            seed_all(plan.seed, "forward", 0, index)
            _add_gradient(module, task, DataPosition(0, examples))
            unused = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
            if not unused:
                break
    module.zero_grad(set_to_none=True)
    return unused


def _add_gradient(module: nn.Module, task: Task, position: DataPosition) -> None:
    rows: Mapping[str, Sequence[Any]] = task.splits["train"][list(position.example_index)]
    device = compute_device(module)
    tensors = to_device(task.collate(rows, position), device)
    with gathered(module):  # without a backward pass a sharded model would stay so, and its parameters have no gradient
        loss = task.loss(module, tensors)
        if loss.requires_grad:
            torch.autograd.backward(loss)


@contextmanager
def _all_layers(module: nn.Module) -> Iterator[None]:
    """Turns LayerDrop off: a layer that one micro-batch drops is no unused one."""
    shares = [
        (part, part.layerdrop) for part in module.modules() if isinstance(getattr(part, "layerdrop", None), float)
    ]
    for part, _ in shares:
        part.layerdrop = 0.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, share in shares:
            part.layerdrop = share


def layer_drop_settings(module: nn.Module) -> list[str]:
    """Returns the settings of a model's config that let a training pass skip layers."""
    config = getattr(module, "config", None)
    return [name for name in LAYER_DROP_SETTINGS if getattr(config, name, None)]

"""What `engine.precision=bf16` would gain for a prepared run on this machine's CPU, for `--dry-run`."""

from __future__ import annotations

import time

import torch
from pydantic import ValidationError
from torch import nn

from dtrain.config.schema import Config
from dtrain.data.order import StepPlan
from dtrain.data.seeding import DataPosition
from dtrain.engine.forward_only import autocast
from dtrain.models.freezing import frozen_statistics
from dtrain.models.modes import restored_modes
from dtrain.models.placement import compute_device, needs_every_rank
from dtrain.tasks.protocol import Task
from dtrain.training.build import PreparedModel
from dtrain.training.precision_timing import time_precisions, unchanged_random_state

MAX_ROW_S = 1.0
"""A model whose forward and backward on one row take longer is not timed."""

PASS_S = 0.3
"""About how long a timed pass may take: the micro-batch is cut to as many rows."""


def describe_precision(config: Config, task: Task, prepared: PreparedModel, plan: StepPlan) -> str | None:
    """Returns one line of the plan; None where bf16 is no choice: on a GPU, in another precision than fp32.

    Leaves weights, buffers, modes and random states as they are, and all gradients None.
    """
    module = prepared.module
    if config.engine.precision != "fp32" or compute_device(module).type != "cpu":
        return None
    if any(parameter.dtype != torch.float32 for parameter in module.parameters() if parameter.is_floating_point()):
        return None
    if not _allows_bf16(config):
        return None
    if config.model.compile:
        return "precision  bf16 was not timed, because model.compile=true would compile the model for it"
    if needs_every_rank(module):
        return "precision  bf16 was not timed, because the engine shards the model, so that every rank takes part in each pass"
    try:
        with restored_modes(module):
            prepared.train_mode(module)
            with unchanged_random_state(), frozen_statistics(module):
                return f"precision  {_measure(module, task, plan)}"
    finally:
        module.zero_grad(set_to_none=True)


def _measure(module: nn.Module, task: Task, plan: StepPlan) -> str:
    micro_batches = plan.micro_batches(0)
    examples = micro_batches[len(micro_batches) // 2]  # sorted by length: of middle size

    def run(precision: str, rows: int) -> None:
        position = DataPosition(0, examples[:rows])
        batch = task.collate(task.splits["train"][list(position.example_index)], position)
        with autocast(precision, "cpu"):
            loss = task.loss(module, batch)
        if loss.requires_grad:
            torch.autograd.backward(loss)
        module.zero_grad(set_to_none=True)

    begin = time.perf_counter()
    run("fp32", 1)
    row_s = time.perf_counter() - begin
    if row_s > MAX_ROW_S:
        return f"bf16 was not timed: forward and backward of a single row take {row_s:.1f} s in fp32"
    rows = min(len(examples), max(int(PASS_S / row_s), 1))
    return time_precisions(lambda precision: run(precision, rows)).describe()


def _allows_bf16(config: Config) -> bool:
    """Returns whether the other settings allow `engine.precision=bf16`."""
    values = config.model_dump()
    try:
        Config.model_validate({**values, "engine": {**values["engine"], "precision": "bf16"}})
    except ValidationError:
        return False
    return True

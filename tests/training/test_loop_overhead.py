"""What the loop adds to forward, loss, backward, clipping and update: counted in torch's operations, not in time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.data.batches import StepBatches
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.training.late_totals import to_floats
from dtrain.training.look_ahead import LookAhead
from dtrain.training.loop import batches_ahead, run_micro_batches, take_step
from tests.support import training
from tests.support.training import Setting

SETTING = Setting(
    steps=3, rows=64, global_batch_size=8, micro_batch_size=4, optimizer="adamw", learning_rate=1e-3, max_grad_norm=1e3
)


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def ready(setting: Setting = SETTING) -> tuple[training.Run, list[StepBatches]]:
    """A run before its first step, and its batches."""
    run = training.build(ONE_PROCESS, setting)
    batches = list(batches_ahead(run.settings, run.task, run.engine, start=0))
    run.look_ahead = LookAhead((one for one in batches), run.task, ONE_PROCESS)
    run.settings.train_mode(run.engine.module)
    return run, batches


def plain_step(run: training.Run, batches: StepBatches, *, update: bool) -> None:
    """The same work by hand."""
    for micro_batch in batches.micro_batches:
        loss = run.task.loss(run.engine.model, dict(micro_batch.tensors))
        (loss * 0.125).backward()
    if update:
        parameters = [p for p in run.engine.module.parameters() if p.grad is not None]
        nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        run.engine._optimizer.step()  # type: ignore[attr-defined]
        for parameter in parameters:
            parameter.grad = None


def added(run: training.Run, batches: StepBatches, work: Any, *, update: bool) -> dict[str, int]:
    """The operations of `work` that `plain_step` does not have."""
    for _ in range(2):  # the first update makes the moments, the second one gathers them for the fused kernel
        plain_step(run, batches, update=True)
    with Operations() as plain:
        plain_step(run, batches, update=update)
    for parameter in run.engine.module.parameters():
        parameter.grad = None
    with Operations() as ours:
        work()
    assert not plain.counts - ours.counts
    return dict(ours.counts - plain.counts)


def test_a_micro_batch_adds_only_the_copy_of_its_loss() -> None:
    run, batches = ready()

    def work() -> None:
        to_floats(run_micro_batches(run.engine, run.task, batches[0], scale=0.125, seed=0))

    found = added(run, batches[0], work, update=False)

    transfers = {"aten::stack": 1, "aten::_to_copy": 1}  # one for all micro-batches, to float64 on the host
    assert found == {"aten::detach": len(batches[0].micro_batches), **transfers}


def test_a_step_adds_only_the_targets_of_the_next_one() -> None:
    run, batches = ready(replace(SETTING, micro_batch_size=8))
    run.look_ahead.start()
    step = run.look_ahead.next_step
    assert step is not None

    found = added(run, batches[0], lambda: take_step(run, step), update=True)

    counting = {"aten::detach": 1}  # numpy counts the labels
    loss = {"aten::detach": 1, "aten::_local_scalar_dense": 1}
    assert found == {name: counting.get(name, 0) + number for name, number in loss.items()}


def test_counting_sees_an_operation_that_a_loop_adds() -> None:
    run, batches = ready()

    def work() -> None:
        run_micro_batches(run.engine, run.task, batches[0], scale=0.125, seed=0)
        torch.zeros(1).isnan()

    assert "aten::isnan" in added(run, batches[0], work, update=False)

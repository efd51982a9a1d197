"""A model that fails on one example, and what a run makes of it; the same on one process and on many ranks.

Row 12 of 21 is the bad one. In file order, with a global batch of 8 and micro-batches of 3, it lies in step 2 (of 1, 2,
3), micro-batch 1: with two ranks, that of rank 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import nn

from dtrain.data.batches import step_batches
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.protocol import Engine, StepWeight
from dtrain.errors import NonFiniteError
from dtrain.tasks.classification import ClassificationTask
from dtrain.training.loop import run_micro_batches
from dtrain.training.monitors.non_finite import NonFinite
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import tiny, training
from tests.support.tiny import Table
from tests.support.training import Setting

BAD_ROW = 12
BAD_TOKEN = 4
Kind = Literal["none", "loss", "loss_alone", "gradient"]
"""What is not a number where the bad token is: nothing, loss and gradient, only one of them."""

FAILING: tuple[Kind, ...] = ("loss", "loss_alone", "gradient")

SETTING = Setting(steps=4, shuffle=False, optimizer="adamw", learning_rate=1e-3, warmup=2)


class Journal:
    """Keeps every record, and what else a monitor writes; both a monitor and a log."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.events: list[dict[str, Any]] = []

    def after_step(self, record: StepRecord) -> Decision:
        self.records.append(record)
        return Decision.CONTINUE

    def event(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    def train(self, **values: Any) -> None:
        self.event("train", **values)

    def step(self, examples: int) -> None:
        self.event("step", examples=examples)

    def as_json(self) -> list[dict[str, Any]]:
        """The records; what is not finite as text, since nan is not even equal to itself."""
        return [_readable(asdict(record)) for record in self.records]


class Weights:
    """Keeps a copy of the weights before the last step that was taken, and after it. A monitor."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.now = training.weights_of(engine)

    def after_step(self, _record: StepRecord) -> Decision:
        self.now = training.weights_of(self._engine)
        return Decision.CONTINUE


def _readable(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.nan


def model(kind: Kind, setting: Setting) -> nn.Module:
    """The tiny BERT, whose loss or gradient is not a number where a batch holds the bad token."""
    module: nn.Module = tiny.bert(dropout=setting.dropout, layers=2)

    def spoil(_module: nn.Module, _args: Any, inputs: dict[str, Any], output: Any) -> Any:
        bad = (inputs["input_ids"] == BAD_TOKEN).any(dim=1, keepdim=True)
        if not bool(bad.any()):
            return output
        if kind == "loss":
            output.logits = output.logits * math.nan
        elif kind == "loss_alone":  # a constant: the other examples' gradient is fine
            output.logits = torch.where(bad, torch.full_like(output.logits, math.nan), output.logits)
        elif kind == "gradient":
            output.logits = _BadGradient.apply(output.logits)
        return output

    module.register_forward_hook(spoil, with_kwargs=True)
    return module


def task(setting: Setting, *, without_labels: frozenset[int] = frozenset(), rows: int = 21) -> ClassificationTask:
    """The usual task, with the bad token in one row, and no label for some rows."""
    learns = training.task(setting)
    columns = tiny.sentences(rows)[list(range(rows))]
    if rows > BAD_ROW:
        columns["input_ids"][BAD_ROW][1] = BAD_TOKEN
    labels = [None if index in without_labels else label for index, label in enumerate(columns["label"])]
    learns.splits = {**learns.splits, "train": Table({"input_ids": columns["input_ids"], "label": labels})}
    return learns


def stopped(context: RankContext, setting: Setting, kind: Kind) -> dict[str, Any]:
    """Collective. A run under train.non_finite=stop: how it ended, and the weights before and after the bad step."""
    run = training.build(context, setting, model(kind, setting), task(setting))
    journal, error = Journal(), None
    before = Weights(run.engine)
    try:
        run.go(journal, NonFinite("stop", journal), before)
    except NonFiniteError as raised:
        error = str(raised)
    after = training.weights_of(run.engine)
    return {
        "error": error,
        "records": journal.as_json(),
        "events": [_readable(event) for event in journal.events],
        "untouched": before.now == after,
        "updates": run.state.updates,
        "step": run.state.step,
    }


def skipped(context: RankContext, setting: Setting, kind: Kind, learns: Any = None) -> dict[str, Any]:
    """Collective. A run under train.non_finite=skip, to its end."""
    run = training.build(context, setting, model(kind, setting), learns or task(setting))
    journal = Journal()
    run.go(journal, NonFinite("skip", journal))
    return {
        "records": journal.as_json(),
        "weights": training.weights_of(run.engine),
        "updates": run.state.updates,
        "step": run.state.step,
        "rates": [run.settings.learning_rate(update) for update in range(4)],
    }


@contextmanager
def _steps(context: RankContext, setting: Setting) -> Iterator[Any]:
    """An engine as a function of step and discard."""
    run = training.build(context, setting)
    plan = run.settings.plan
    coming = list(
        step_batches(
            plan,
            run.task.splits["train"],
            run.task.collate,
            context,
            lock_step=run.engine.lock_step,
            start=0,
            stop=3,
            workers=0,
        )
    )

    def take(step: int, *, discard: bool = False) -> Any:
        run.settings.train_mode(run.engine.module)
        scale = context.world_size / coming[step].examples
        run_micro_batches(run.engine, run.task, coming[step], scale=scale, seed=7)
        return run.engine.step(StepWeight(1.0, 1.0), discard=discard)

    yield run.engine, take
    run.engine.release()


def _state(engine: Engine) -> dict[str, Any]:
    """Collective. Weights and moments; None stands for other ranks' values."""
    return {
        entry.name: (
            None if entry.value is None else entry.value.clone(),
            {key: value.clone() for key, value in entry.slots.items()},
        )
        for entry in engine.named_state(here=engine.context.is_main)
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Every bit."""
    if one.keys() != other.keys():
        return False
    for name, (value, slots) in one.items():
        also, its = other[name]
        if slots.keys() != its.keys() or (value is not None and not torch.equal(value, also)):
            return False
        if any(not torch.equal(slots[key], its[key]) for key in slots):
            return False
    return True


def discarded(context: RankContext, setting: Setting) -> dict[str, Any]:
    """Collective. Steps 0 and 2 with a discarded step 1 between them, against steps 0 and 2 alone."""
    with _steps(context, setting) as (engine, take):
        first = take(0)
        before = _state(engine)
        dropped = take(1, discard=True)
        after = _state(engine)
        third = take(2)
        end = _state(engine)
    with _steps(context, setting) as (engine, take):
        take(0)
        alone = take(2)
        expected = _state(engine)
    return {
        "applied": [first.applied, dropped.applied, third.applied],
        "kept": _same(before, after),
        "moved": not _same(after, end),
        "as_if_it_had_not_been": _same(end, expected) and third.grad_norm == alone.grad_norm,
        "has_moments": any(slots for _, slots in end.values()),
    }


def everything(context: RankContext, setting: Setting) -> dict[str, Any]:
    """Collective. All of the above, for one start of the ranks."""
    momentum = replace(setting, optimizer="sgd", momentum=0.9, learning_rate=0.1)
    return {
        "stopped": {kind: stopped(context, setting, kind) for kind in FAILING},
        "skipped": {kind: skipped(context, setting, kind) for kind in FAILING},
        "discarded": {"adamw": discarded(context, setting), "sgd": discarded(context, momentum)},
    }

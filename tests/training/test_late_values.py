"""Values of a step that are read after the next one has begun: every digit is that of a run that reads them at once.

On CUDA the loop does so. Here it is made to do so on the CPU. Whole runs are in test_late_runs.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine import single
from dtrain.errors import NonFiniteError
from dtrain.training import late_totals
from dtrain.training.loop import LoopSettings, is_read_at_once
from dtrain.training.monitors.calls import at_once_rule
from dtrain.training.monitors.non_finite import NonFinite
from dtrain.training.monitors.protocol import Decision, StepEnd, StepRecord
from tests.support import faults, training
from tests.support.faults import Journal
from tests.support.multirank import run_ranks
from tests.support.training import Setting

SETTING = replace(faults.SETTING, steps=9, dropout=0.1, max_grad_norm=0.9)
"""Of 21 rows in batches of 8: three steps an epoch. Without a monitor the steps 1, 2, 4, 5, 7 and 8 are read late."""


class LateJournal(Journal):
    """Keeps the records, the weights that it finds, and the number of steps that the run counts. Needs some steps at once."""

    def __init__(self, run: training.Run, at_once: Iterable[int] = ()) -> None:
        super().__init__()
        self._run, self._at_once = run, frozenset(at_once)
        self.seen: list[Any] = []

    def needs_at_once(self, end: StepEnd) -> bool:
        return end.step in self._at_once

    def after_step(self, record: StepRecord) -> Decision:
        self.seen.append([self._run.state.step, self._run.state.updates, training.weights_of(self._run.engine)])
        return super().after_step(record)


def run(context: RankContext, setting: Setting, kind: faults.Kind, *, late: bool, at_once: Iterable[int]) -> Any:
    """Collective. A run that skips bad steps; and how many values it read late."""
    devices, real = single.DECIDING_DEVICES, late_totals.copy_to_host
    late_steps = 0

    def counted(values: torch.Tensor) -> Callable[[], list[float]]:
        nonlocal late_steps
        late_steps += 1
        return real(values)

    single.DECIDING_DEVICES = ("cpu",) if late else ()
    late_totals.copy_to_host = counted
    try:
        built = training.build(context, setting, faults.model(kind, setting), faults.task(setting))
        journal = LateJournal(built, at_once)
        built.go(journal, NonFinite("skip", journal))
    finally:
        single.DECIDING_DEVICES, late_totals.copy_to_host = devices, real
    for record in journal.records:
        record.traffic = None  # two small all-reduces instead of one
    slots = {
        entry.name: {slot: tensor.double().tolist() for slot, tensor in entry.slots.items()}
        for entry in built.engine.named_state(here=context.is_main)
    }
    return {
        "records": journal.as_json(),
        "events": [faults._readable(event) for event in journal.events],
        "seen": journal.seen,
        "weights": training.weights_of(built.engine),
        "slots": slots,
        "late": late_steps,
    }


def assert_same(setting: Setting, kind: faults.Kind, *, at_once: Iterable[int] = (), late_steps: int) -> None:
    today, late = (run(ONE_PROCESS, setting, kind, late=way, at_once=at_once) for way in (False, True))

    assert (today.pop("late"), late.pop("late")) == (0, late_steps)
    is_same = late == today
    assert is_same, "they differ"  # pytest would compare them line by line for a minute


@pytest.mark.parametrize("kind", ["none", *faults.FAILING])
def test_steps_and_weights_are_those_of_a_run_that_reads_them_at_once(kind: faults.Kind) -> None:
    assert_same(
        SETTING, kind, late_steps=6
    )  # bad steps 2, 5 and 8: each in the middle, and before one that is read at once


@pytest.mark.parametrize("at_once", [(1,), (2,), (1, 2, 3, 4), (5, 6)])
def test_steps_that_a_monitor_needs_at_once_may_be_anywhere(at_once: tuple[int, ...]) -> None:
    assert_same(SETTING, "loss_alone", at_once=at_once, late_steps=6 - len({1, 2, 4, 5, 7, 8} & {*at_once}))


@pytest.mark.parametrize("steps", [2, 5, 6])
def test_the_last_step_may_be_the_bad_one_or_the_one_after_it(steps: int) -> None:
    assert_same(replace(SETTING, steps=steps), "loss", late_steps=steps - steps // 3 - (steps % 3 > 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"max_grad_norm": None},
        {"max_grad_norm": 1e-3},
        {"micro_batch_size": 8},
        {"warmup": 6},  # a skipped step must not take a step of the schedule
        {"double": True},
        {"thaw": ((1, "embeddings"),), "freeze": ("embeddings",)},
        {"layer_decay": 0.5},
    ],
    ids=str,
)
def test_settings_that_change_an_update_change_nothing_about_it(changes: dict[str, Any]) -> None:
    assert_same(replace(SETTING, **changes), "loss_alone", late_steps=6)


def test_the_comparison_sees_an_update_that_was_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_totals.LateTotals, "has_faults", torch.tensor(False))

    with pytest.raises(AssertionError):
        assert_same(SETTING, "loss_alone", late_steps=6)


def test_the_comparison_sees_a_learning_rate_that_does_not_know_of_a_skipped_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = LoopSettings.__init__

    def by_step(settings: LoopSettings, **values: Any) -> None:
        calls = iter(range(100))
        real(settings, **{**values, "learning_rate": lambda _updates: values["learning_rate"](next(calls))})

    monkeypatch.setattr(LoopSettings, "__init__", by_step)
    late = run(ONE_PROCESS, SETTING, "loss", late=True, at_once=())
    monkeypatch.undo()

    assert late["weights"] != run(ONE_PROCESS, SETTING, "loss", late=False, at_once=())["weights"]


def test_a_run_that_stops_at_a_bad_step_has_the_weights_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "DECIDING_DEVICES", ("cpu",))
    built = training.build(ONE_PROCESS, SETTING, faults.model("loss", SETTING), faults.task(SETTING))
    journal = LateJournal(built)

    with pytest.raises(NonFiniteError, match=r"Step 2: the loss is nan \(rank 0, micro-batch 1, examples 11, 12, 13\)"):
        built.go(journal, NonFinite("stop", journal))

    (_, _, after_1), (step, updates, after_2) = journal.seen
    assert (step, updates) == (2, 1)
    assert after_1 == after_2 == training.weights_of(built.engine)


# Which steps are read at once


def rule(changes: dict[str, Any], *monitors: Any) -> list[int]:
    """The steps of a run that are read at once."""
    built = training.build(ONE_PROCESS, replace(SETTING, **changes))
    steps = training.batches_ahead(built.settings, built.task, built.engine, start=0)
    built.look_ahead = training.LookAhead(steps, built.task, ONE_PROCESS)
    built.look_ahead.start()
    needs, found = at_once_rule(monitors, ONE_PROCESS), []
    while (step := built.look_ahead.next_step) is not None:
        if is_read_at_once(built, step, needs):
            found.append(step.batches.step + 1)
        built.look_ahead.advance([], weighted_sq_norm=None)
    return found


def test_a_step_is_read_at_once_where_somebody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [*range(1, 9)]
    assert rule({"steps": 8}) == every  # the CPU is never behind the host
    monkeypatch.setattr(single, "DECIDING_DEVICES", ("cpu",))

    assert rule({"steps": 8}) == [3, 6, 8]  # ends of epochs and of the run
    assert rule({"steps": 8, "log_gradients": 5}) == [3, 5, 6, 8]
    assert rule({"steps": 8, "optimizer": "sgd"}) == every
    assert rule({"steps": 8}, Journal()) == every  # a user's monitor that may look at anything


def test_a_setting_that_drops_updates_by_their_loss_needs_it_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "DECIDING_DEVICES", ("cpu",))
    built = training.build(ONE_PROCESS, SETTING)
    steps = training.batches_ahead(built.settings, built.task, built.engine, start=0)
    built.look_ahead = training.LookAhead(steps, built.task, ONE_PROCESS)
    built.look_ahead.start()
    step, never = built.look_ahead.next_step, at_once_rule([], ONE_PROCESS)
    assert step is not None
    assert not is_read_at_once(built, step, never)

    built.settings = replace(built.settings, drops=lambda _loss: False)

    assert is_read_at_once(built, step, never)
    built.look_ahead.close()


# On ranks


@pytest.mark.ranks
def test_two_ranks_have_the_digits_of_two_that_read_at_once() -> None:
    for rank in run_ranks(both, 2, timeout_s=120):
        for today, late in rank.values():
            assert (today.pop("late"), late.pop("late")) == (0, 6)
            assert late == today


def both(context: RankContext) -> Any:
    """Collective. Each kind of fault, read at once and late. The bad example is rank 1's."""
    return {
        kind: [run(context, SETTING, kind, late=late, at_once=()) for late in (False, True)]
        for kind in ("none", *faults.FAILING)
    }


def test_values_that_are_infinite_are_told_from_those_that_are_not_numbers() -> None:
    totals = late_totals.LateTotals([torch.tensor(1.0), torch.tensor(math.inf)], torch.device("cpu"), ONE_PROCESS)

    values = totals.start_copy(torch.tensor(2.0))()

    assert values.losses == [1.0, math.inf]
    assert math.isnan(values.loss)
    assert (values.faults, values.grad_norm, values.applied) == (1, 2.0, False)


def one_monitor_on_rank_0(context: RankContext) -> int:
    single.DECIDING_DEVICES = ("cpu",)
    built = training.build(context, SETTING)
    journal = Journal()
    built.go(*([journal] if context.is_main else []))
    return built.state.step


@pytest.mark.ranks
def test_ranks_with_other_monitors_read_every_step_at_once() -> None:
    assert run_ranks(one_monitor_on_rank_0, 2) == [SETTING.steps] * 2

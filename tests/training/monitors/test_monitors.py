"""When an evaluation is due, what counts as better, what is logged, and what a fault line says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dtrain.config.schema import Best
from dtrain.errors import NonFiniteError
from dtrain.training.monitors.evaluations import EarlyStopping, Evaluate, KeepBest, is_better, is_due
from dtrain.training.monitors.logging_steps import LogSteps
from dtrain.training.monitors.non_finite import NonFinite, describe
from dtrain.training.monitors.protocol import Decision, Fault, RunState
from tests.support.faults import Journal
from tests.support.steps import TOTAL, record

# When


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (1, list(range(1, 15))),
        (3, [3, 6, 9, 12, 14]),
        (7, [7, 14]),
        (100, [14]),
        ("epoch", [4, 8, 12, 14]),
        ("1 epoch", [4, 8, 12, 14]),
        ("2 epochs", [8, 14]),
        ("3 epochs", [12, 14]),
        ("9 epochs", [14]),
        ("never", []),
    ],
)
def test_an_evaluation_is_due_as_asked_and_once_after_the_last_step(every: int | str, due: list[int]) -> None:
    assert [step for step in range(1, TOTAL + 1) if is_due(every, record(step))] == due


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 49])
def test_every_second_epoch_is_counted_right_whatever_its_number_of_steps(steps_per_epoch: int) -> None:
    ends = [
        step
        for step in range(1, 6 * steps_per_epoch)
        if is_due(
            "2 epochs",
            record(
                step,
                epoch=(step - 1) // steps_per_epoch + ((step - 1) % steps_per_epoch + 1) / steps_per_epoch,
                ends_epoch=step % steps_per_epoch == 0,
                is_last=False,
            ),
        )
    ]

    assert ends == [2 * steps_per_epoch, 4 * steps_per_epoch]


def test_the_metrics_of_an_evaluation_are_there_for_the_monitors_below() -> None:
    asked: list[int] = []
    monitor = Evaluate(3, lambda step: asked.append(step) or {"loss": 2.0})
    due, not_due = record(3), record(4)

    assert (monitor.after_step(due), monitor.after_step(not_due)) == (Decision.CONTINUE, Decision.CONTINUE)
    assert asked == [3]
    assert due.metrics == {"loss": 2.0}
    assert not_due.metrics is None


# Better


@pytest.mark.parametrize(
    ("value", "best", "mode", "better"),
    [
        (1.0, None, "min", True),
        (1.0, 1.0, "min", False),
        (1.0, 1.0, "max", False),
        (0.9, 1.0, "min", True),
        (0.9, 1.0, "max", False),
        (1.1, 1.0, "max", True),
        (-0.5, -0.6, "max", True),
        (0.0, -0.0, "max", False),
        (math.nan, None, "min", False),
        (math.nan, 1.0, "max", False),
        (math.inf, 1.0, "max", False),
        (-math.inf, 1.0, "min", False),
        (math.inf, None, "min", False),
    ],
)
def test_better_is_strict_and_only_a_finite_number_can_be(
    value: float, best: float | None, mode: str, better: bool
) -> None:
    assert is_better(value, best, mode) is better


def keep(values: list[float], *, mode: str, metric: str = "f1", patience: int = 10) -> tuple[RunState, list[int], int]:
    """State, the steps that were exported, and how many were seen before the early stop."""
    state, exported, step = RunState(), [], 0
    best = KeepBest(Best(metric=metric, mode=mode), state, lambda: exported.append(step))
    stop = EarlyStopping(patience, state)
    for step, value in enumerate(values, start=1):
        seen = record(step, metrics={metric: value, "loss": 0.0})
        best.after_step(seen)
        if stop.after_step(seen) == Decision.STOP:
            return state, exported, step
    return state, exported, len(values)


def test_of_equal_values_the_first_is_kept_in_either_direction() -> None:
    up, down = keep([0.2, 0.7, 0.7, 0.6], mode="max"), keep([0.2, 0.1, 0.1, 0.3], mode="min")

    assert (up[0].best, up[0].best_step, up[0].patience, up[1]) == (0.7, 2, 2, [1, 2])
    assert (down[0].best, down[0].best_step, down[0].patience, down[1]) == (0.1, 2, 2, [1, 2])


def test_a_value_that_is_not_a_number_is_never_kept_and_counts_as_no_better() -> None:
    state, exported, _ = keep([math.nan, 0.3, math.nan, math.inf], mode="max")

    assert (state.best, state.best_step, state.patience) == (0.3, 2, 2)
    assert exported == [2]


def test_patience_counts_evaluations_without_a_better_one_in_a_row() -> None:
    assert keep([0.5, 0.4, 0.6, 0.5, 0.4, 0.9], mode="max", patience=2)[2] == 5
    assert keep([0.5, 0.4, 0.6, 0.5, 0.7, 0.9], mode="max", patience=2)[2] == 6
    assert keep([math.nan, math.nan], mode="max", patience=2)[2] == 2


def test_steps_without_an_evaluation_cost_no_patience() -> None:
    state = RunState(best=0.5, best_step=1, patience=5)

    assert KeepBest(Best(metric="f1"), state, lambda: None).after_step(record(2)) == Decision.CONTINUE
    assert EarlyStopping(1, state).after_step(record(2)) == Decision.CONTINUE
    assert state.patience == 5


# What is logged


def logged(every: int, **changes: Any) -> list[int]:
    journal = Journal()
    monitor = LogSteps(every, journal)
    for step in range(1, TOTAL + 1):
        monitor.after_step(record(step, **(changes if step == 6 else {})))
    assert sum(event["event"] == "step" for event in journal.events) == TOTAL  # the bar moves at each
    return [event["step"] for event in journal.events if event["event"] == "train"]


def test_every_kth_step_is_logged_and_the_first_and_the_last() -> None:
    assert logged(5) == [1, 5, 10, 14]
    assert logged(100) == [1, 14]
    assert logged(1) == list(range(1, 15))


def test_a_step_that_was_not_finite_is_logged_whatever_the_interval() -> None:
    assert logged(5, finite=False) == [1, 5, 6, 10, 14]


def test_a_train_line_holds_what_the_contract_names() -> None:
    journal = Journal()
    LogSteps(1, journal).after_step(record(3, loss=math.nan))

    line = journal.events[-1]
    assert {"step", "loss", "grad_norm", "learning_rate", "examples", "targets", "epoch"} <= set(line)
    assert (line["step"], line["epoch"], line["examples"], line["targets"]) == (3, 0.75, 8, 20)
    assert (line["grad_norm"], line["learning_rate"], line["applied"]) == (1.0, 0.1, True)
    assert math.isnan(line["loss"])


# Faults


FAULT = Fault(rank=3, micro_batch=2, loss="inf", examples=[40, 7])


def test_a_fault_line_says_where_and_the_error_the_same() -> None:
    journal = Journal()
    bad = record(9, loss=math.nan, finite=False, applied=False, faults=(FAULT,))

    with pytest.raises(NonFiniteError) as error:
        NonFinite("stop", journal).after_step(bad)

    assert str(error.value).startswith("Step 9: the loss is inf (rank 3, micro-batch 2, examples 40, 7).")
    assert "train.non_finite=skip" in str(error.value)
    assert error.value.exit_code == 5
    line = journal.events[0]
    assert (line["event"], line["kind"], line["step"]) == ("fault", "non_finite", 9)
    assert (line["ranks"], line["micro_batches"], line["example_index"]) == ([3], [2], [40, 7])


def test_skipping_logs_the_fault_and_goes_on() -> None:
    journal = Journal()
    bad = record(9, loss=math.nan, finite=False, applied=False, faults=(FAULT,))

    assert NonFinite("skip", journal).after_step(bad) == Decision.CONTINUE
    assert [event["event"] for event in journal.events] == ["fault"]
    assert NonFinite("stop", journal).after_step(record(10)) == Decision.CONTINUE
    assert len(journal.events) == 1


def test_a_long_list_of_faults_is_shortened_in_words() -> None:
    faults = tuple(Fault(rank, 0, "nan", list(range(20))) for rank in range(6))

    said = describe(record(2, finite=False, faults=faults))

    assert "examples 0, 1, 2," in said
    assert "15, ...;" in said
    assert "and 2 more micro-batches" in said
    assert "rank 4" not in said

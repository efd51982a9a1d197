"""The loop on one process: against an independent one, and where a step cannot be taken.

What several ranks agree on is in tests/training/test_loop_agreement.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config.schema import Best
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.training.monitors.evaluations import EarlyStopping, Evaluate, KeepBest
from dtrain.training.monitors.protocol import Decision, RunState, StepRecord
from tests.support import faults, tiny, training
from tests.support.faults import Journal
from tests.support.training import Setting

# Against a loop that shares no code with dtrain's

PLAIN = Setting(
    rows=21,
    steps=20,
    dropout=0.0,
    shuffle=False,
    optimizer="adamw",
    learning_rate=3e-3,
    max_grad_norm=0.1,
    warmup=5,
)
SINGLE_PRECISION = replace(PLAIN, learning_rate=3e-4)
"""A rate as one fine-tunes with. AdamW blows rounding up where a gradient is all but zero, by as much as a step is long."""


def independent_loop(
    *, steps: int = 20, broken: str | None = None, double: bool = True, peak: float = 3e-3
) -> dict[str, Any]:
    """Steps of plain PyTorch: 21 rows in file order, batches of 8, 8 and 5, in micro-batches of 3.

    broken: a mistake to make, as negative control. peak: the learning rate after warm-up.
    """
    model, table = tiny.bert(dropout=0.0, layers=2).train(), tiny.sentences(21)
    model = model.double() if double else model
    plain = [p for n, p in model.named_parameters() if (n.endswith("bias") or "LayerNorm" in n) and broken != "decay"]
    decayed = [p for p in model.parameters() if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=1e-8)
    reported = []
    for step in range(steps):
        start = step % 3 * 8
        batch = list(range(start, min(start + 8, 21)))
        loss_sum = 0.0
        for micro in (batch[i : i + 3] for i in range(0, len(batch), 3)):
            ids = [torch.tensor(table[[row]]["input_ids"][0]) for row in micro]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
            logits = model(input_ids=padded, attention_mask=(padded != 0).long()).logits
            labels = torch.tensor(table[micro]["label"])
            loss = -logits.log_softmax(dim=1)[torch.arange(len(micro)), labels].sum()
            divisor = len(micro) * math.ceil(len(batch) / 3) if broken == "mean_of_means" else len(batch)
            (loss / divisor).backward()
            loss_sum += float(loss.detach())
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        for parameter in model.parameters():
            if norm > 0.1 and broken != "clip":
                parameter.grad.mul_(0.1 / (norm + 1e-6))
        rate = peak * (step / 5 if step < 5 else (steps - step) / (steps - 5))
        for group in optimizer.param_groups:
            group["lr"] = rate if broken != "schedule" else peak * min((step + 1) / 5, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reported.append({"loss": loss_sum / len(batch), "grad_norm": float(norm)})
    return {"steps": reported, "weights": {n: p.detach().double().tolist() for n, p in model.named_parameters()}}


@cache
def plain_run(*, steps: int = 20) -> dict[str, Any]:
    return training.run(ONE_PROCESS, replace(PLAIN, steps=steps, double=True))


def assert_equal(reference: dict[str, Any], found: dict[str, Any], *, to: float) -> None:
    assert training.worst(reference, found) <= to
    assert training.worst(reference, found, "grad_norm") <= to
    assert training.apart(reference, found) <= to


def test_twenty_steps_equal_those_of_an_independent_loop() -> None:
    assert max(step["grad_norm"] for step in plain_run()["steps"]) > 0.1  # the clip bites
    assert_equal(independent_loop(), plain_run(), to=1e-9)


def test_the_controls_below_are_equal_too_while_unbroken() -> None:
    assert_equal(independent_loop(steps=8), plain_run(steps=8), to=1e-9)


def test_twenty_steps_in_single_precision_are_equal_to_1e6() -> None:
    assert_equal(independent_loop(double=False, peak=3e-4), training.run(ONE_PROCESS, SINGLE_PRECISION), to=1e-6)


@pytest.mark.parametrize("broken", ["mean_of_means", "clip", "decay", "schedule"])
def test_a_loop_with_a_mistake_is_rejected(broken: str) -> None:
    with pytest.raises(AssertionError):
        assert_equal(independent_loop(steps=8, broken=broken), plain_run(steps=8), to=1e-5)


def test_workers_that_prepare_batches_change_no_bit() -> None:
    setting = replace(PLAIN, steps=4, dropout=0.1, shuffle=True)

    ahead, here = training.run(ONE_PROCESS, replace(setting, workers=2)), training.run(ONE_PROCESS, setting)

    assert ahead["steps"] == here["steps"]
    assert ahead["weights"] == here["weights"]


# What a record and the state say


def go(setting: Setting, *monitors: Any, learns: Any = None) -> tuple[list[StepRecord], RunState]:
    journal = Journal()
    run = training.build(ONE_PROCESS, setting, learns=learns)
    run.go(journal, *monitors)
    return journal.records, run.state


SHORT = Setting(steps=7, shuffle=False, optimizer="adamw", learning_rate=1e-3, warmup=0)


def test_records_count_steps_from_one_and_epochs_in_parts() -> None:
    records, state = go(SHORT)

    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert [record.epoch for record in records] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 7 / 3])
    assert [record.ends_epoch for record in records] == [False, False, True] * 2 + [False]
    assert [record.is_last for record in records] == [False] * 6 + [True]
    assert [record.examples for record in records] == [8, 8, 5, 8, 8, 5, 8]
    assert [record.targets for record in records] == [8, 8, 5, 8, 8, 5, 8]
    assert [record.learning_rate for record in records] == pytest.approx([1e-3 * (7 - k) / 7 for k in range(7)])
    assert (state.step, state.updates, state.examples, state.targets) == (7, 7, 50, 50)


def test_a_run_goes_on_from_where_its_state_says() -> None:
    run = training.build(ONE_PROCESS, SHORT)
    run.state.step, run.state.updates = 5, 4
    journal = Journal()
    run.go(journal)

    assert [(record.step, record.examples) for record in journal.records] == [(6, 5), (7, 8)]
    assert journal.records[0].learning_rate == pytest.approx(1e-3 * (7 - 4) / 7)


def test_a_finished_run_takes_no_step() -> None:
    run = training.build(ONE_PROCESS, SHORT)
    run.state.step = 7
    journal = Journal()
    run.go(journal)

    assert journal.records == []


def test_every_epoch_is_announced_before_its_first_step() -> None:
    run = training.build(ONE_PROCESS, SHORT)
    seen: list[tuple[int, int]] = []

    run.begin_epoch = lambda epoch: seen.append((epoch, run.state.step))  # type: ignore[method-assign]
    run.go()

    assert seen == [(0, 0), (1, 3), (2, 6)]


# Stopping


class StopAt:
    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, record: StepRecord) -> Decision:
        return Decision.STOP if record.step == self._step else Decision.CONTINUE


def test_a_wish_to_stop_rides_with_the_next_step_and_ends_the_run_after_it() -> None:
    records, state = go(SHORT, StopAt(3))

    assert [record.step for record in records] == [1, 2, 3, 4]
    assert state.step == 4


def test_after_an_evaluation_a_wish_to_stop_holds_at_once() -> None:
    records, _ = go(SHORT, Evaluate(2, lambda _step: {"loss": 1.0}), StopAt(4))

    assert [record.step for record in records] == [1, 2, 3, 4]


class Returns:
    def __init__(self, value: Any) -> None:
        self._value = value

    def after_step(self, record: StepRecord) -> Any:
        return self._value


def test_a_monitor_that_returns_nothing_continues() -> None:
    records, _ = go(SHORT, Returns(None))

    assert len(records) == SHORT.steps


@pytest.mark.parametrize("value", [True, 7, "stop"])
def test_what_is_no_decision_is_refused_with_the_monitor_and_the_step(value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Returns\.after_step returned {value!r} at step 1\. Return Decision"):
        go(SHORT, Returns(value))


def test_early_stopping_keeps_the_best_step() -> None:
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 0.0, 6: 0.0, 7: 0.0}
    state, exported = RunState(), []
    keep = KeepBest(Best(metric="loss"), state, lambda: exported.append(True))

    records, _ = go(SHORT, Evaluate(1, lambda step: {"loss": values[step]}), keep, EarlyStopping(2, state))

    assert [record.step for record in records] == [1, 2, 3, 4]  # a tie is not better
    assert (state.best, state.best_step, len(exported)) == (1.0, 2, 2)


# Steps that cannot be taken


@cache
def faulty() -> dict[str, Any]:
    return faults.everything(ONE_PROCESS, faults.SETTING)


@pytest.mark.parametrize("kind", ["loss", "loss_alone"])
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_rank_and_examples(kind: str) -> None:
    found = faulty()["stopped"][kind]

    assert "Step 2: the loss is nan (rank 0, micro-batch 1, examples 11, 12, 13)." in found["error"]
    assert found["untouched"]
    assert (found["step"], found["updates"]) == (2, 1)
    fault = found["events"][-1]
    assert fault["event"] == "fault"
    assert (fault["step"], fault["loss"], fault["ranks"]) == (2, "nan", [0])
    assert (fault["micro_batches"], fault["example_index"]) == ([1], [11, 12, 13])


def test_a_gradient_that_is_not_a_number_stops_the_run_though_the_loss_is_one() -> None:
    found = faulty()["stopped"]["gradient"]

    assert "Step 2: the loss is 0." in found["error"]
    assert "but the gradient norm is nan" in found["error"]
    assert math.isfinite(float(found["records"][-1]["loss"]))
    assert found["untouched"]
    assert (found["step"], found["updates"]) == (2, 1)


@pytest.mark.parametrize("kind", faults.FAILING)
def test_a_skipped_step_moves_neither_weights_nor_schedule(kind: str) -> None:
    found = faulty()["skipped"][kind]
    records = found["records"]

    assert [record["applied"] for record in records] == [True, False, True, True]
    assert [record["finite"] for record in records] == [True, False, True, True]
    assert (found["step"], found["updates"]) == (4, 3)
    assert [record["learning_rate"] for record in records] == [found["rates"][update] for update in (0, 1, 1, 2)]
    assert all(math.isfinite(x) for value in found["weights"].values() for x in torch.tensor(value).flatten().tolist())


def test_a_skipped_step_leaves_the_rest_as_a_step_without_targets_does() -> None:
    without = faults.task(faults.SETTING, without_labels=frozenset(range(8, 16)))

    nothing_to_learn = faults.skipped(ONE_PROCESS, faults.SETTING, "none", without)

    for kind in faults.FAILING:
        assert faulty()["skipped"][kind]["weights"] == nothing_to_learn["weights"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_discarded_step_is_as_if_it_had_not_been(optimizer: str) -> None:
    assert faulty()["discarded"][optimizer] == {
        "applied": [True, False, True],
        "kept": True,
        "moved": True,
        "as_if_it_had_not_been": True,
        "has_moments": True,
    }


def test_a_step_without_a_single_target_changes_nothing_and_divides_by_nothing() -> None:
    nothing = frozenset(range(21))
    run = training.build(ONE_PROCESS, faults.SETTING, learns=faults.task(faults.SETTING, without_labels=nothing))
    before, journal = training.weights_of(run.engine), Journal()
    run.go(journal)

    assert training.weights_of(run.engine) == before
    assert [(r.loss, r.grad_norm, r.targets) for r in journal.records] == [(0.0, 0.0, 0)] * 4
    assert [(r.applied, r.finite) for r in journal.records] == [(False, True)] * 4
    assert (run.state.step, run.state.updates, run.state.targets) == (4, 0, 0)


def test_one_example_is_a_training_set() -> None:
    records, _ = go(replace(SHORT, rows=1, steps=3))

    assert [(r.examples, r.targets, r.ends_epoch) for r in records] == [(1, 1, True)] * 3
    assert records[2].loss < records[0].loss

"""Sorting by length and the token budget: the same answer at every world size, and that of the plain list without dropout.

Dropout is on where only the number of ranks differs, because the list of micro-batches is then the same.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.lengths import token_lengths
from dtrain.distributed.evaluation_exchange import SHARED_BYTES, StopWanted, share_from_main
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.training import build
from dtrain.training.evaluation import evaluate_split
from dtrain.training.stopping import RunStopped
from tests.support import tiny, training
from tests.support.evaluated import records_of
from tests.support.multirank import run_ranks
from tests.support.training import Setting, apart, worst

pytestmark = pytest.mark.ranks

SORTED = Setting(table=True)
BUDGET = Setting(table=True, micro_batch_tokens=40)
LONG = {
    "steps": 50,
    "dropout": 0.0,
    "rows": 60,
    "learning_rate": 0.5,
    "max_grad_norm": None,
}  # a clip would hide a scale


def micro_batches(setting: Setting) -> list[list[int]]:
    return build.step_plan(setting.config(), training.task(setting)).micro_batches(0)


def test_the_lists_differ_or_this_file_could_not_fail() -> None:
    plain = micro_batches(replace(SORTED, sort_by_length=False))

    assert plain == micro_batches(Setting())
    assert micro_batches(SORTED) != plain
    assert micro_batches(BUDGET) not in (plain, micro_batches(SORTED))
    assert micro_batches(replace(SORTED, local_steps=2)) == plain, "a rank that learns alone gets a fair sample"


@cache
def single(setting: Setting) -> dict[str, Any]:
    return training.run(ONE_PROCESS, setting)


@pytest.mark.parametrize("setting", [SORTED, BUDGET], ids=["sorted", "budget"])
@pytest.mark.parametrize(("engine", "stage", "world_size"), [("auto", None, 2), ("auto", None, 3), ("deepspeed", 2, 2)])
def test_every_number_of_ranks_takes_the_same_steps(
    setting: Setting, engine: str, stage: int | None, world_size: int
) -> None:
    found = run_ranks(training.run, world_size, replace(setting, engine=engine, zero_stage=stage), timeout_s=120)[0]

    assert worst(single(setting), found) <= 1e-6
    assert apart(single(setting), found) <= 2e-6


def test_a_seed_per_rank_is_rejected() -> None:
    found = run_ranks(training.run, 2, replace(SORTED, broken="seed_per_rank"))[0]

    assert worst(single(SORTED), found) > 1e-6


@pytest.mark.parametrize("setting", [SORTED, BUDGET], ids=["sorted", "budget"])
def test_fifty_steps_without_dropout_are_those_of_the_plain_list(setting: Setting) -> None:
    plain = single(replace(SORTED, sort_by_length=False, **LONG))
    found = single(replace(setting, **LONG))

    assert found["steps"] != plain["steps"]
    assert worst(plain, found) <= 1e-6  # the promise is 1e-5
    assert worst(plain, single(replace(setting, **LONG, broken="scaled_gradient"))) > 1e-6


def test_a_budget_below_the_longest_row_is_refused_with_the_smallest_that_works() -> None:
    setting = replace(BUDGET, micro_batch_tokens=10)
    task = training.task(setting)
    lengths = [len(ids) for ids in task.splits["train"][[*range(setting.rows)]]["input_ids"]]
    longest = max(lengths)

    with pytest.raises(
        ConfigError, match=f"row {lengths.index(longest)} of the split train .*={longest} or more"
    ) as said:
        build.step_plan(setting.config(), task)

    assert said.value.exit_code == 2
    build.step_plan(replace(BUDGET, micro_batch_tokens=longest).config(), task)
    with pytest.raises(ConfigError, match="needs the number of tokens of each row"):
        build.step_plan(setting.config(), training.task(replace(setting, table=False)))


def test_a_fixed_padding_counts_for_the_budget() -> None:
    task = training.task(BUDGET)
    task.padding = replace(task.padding, length=32)

    assert [
        len(batch) for batch in build.step_plan(replace(BUDGET, micro_batch_tokens=64).config(), task).micro_batches(0)
    ] == [2] * 4
    with pytest.raises(ConfigError, match=r"micro_batch_tokens=32 or more"):
        build.step_plan(replace(BUDGET, micro_batch_tokens=31).config(), task)


# Evaluation


def evaluated(context: RankContext, tokens: int | None = None) -> dict[str, Any]:
    """Collective. An evaluation of 23 rows of known length, and the number of its collectives."""
    task = training.task(SORTED)
    task.splits = {**task.splits, "validation": tiny.arrow_sentences(23, seed=5)}
    forward = ForwardOnly(tiny.bert(layers=2), SORTED.config(), context)
    before = context.traffic.copy()
    found = evaluate_split(forward, task, "validation", micro_batch_size=4, micro_batch_tokens=tokens)
    collectives = context.traffic.since(before).collectives
    return {"metrics": dict(found.metrics), "records": records_of(found, context), "collectives": collectives}


@pytest.mark.parametrize(("world_size", "tokens"), [(2, None), (3, None), (3, 40), (3, 10_000)])
def test_an_evaluation_takes_three_collectives_and_gives_the_digits_of_one_process(
    world_size: int, tokens: int | None
) -> None:
    """With 10,000 tokens there is one micro-batch, and two ranks have none."""
    alone = evaluated(ONE_PROCESS, tokens)

    for found in run_ranks(evaluated, world_size, tokens):
        assert found["collectives"] == 3
        assert found["metrics"] == alone["metrics"]
        assert found["records"] == alone["records"]


def test_a_sorted_evaluation_runs_the_largest_first_and_gives_results_in_data_order() -> None:
    task = training.task(SORTED)
    rows = tiny.arrow_sentences(23, seed=5)
    task.splits = {**task.splits, "validation": rows}
    forward, widths = ForwardOnly(tiny.bert(layers=2), SORTED.config(), ONE_PROCESS), []
    sizes: list[int] = []
    real = task.score

    def score(module: Any, batch: Any, **more: Any) -> Any:
        widths.append(batch["input_ids"].shape[1])
        sizes.append(batch["input_ids"].numel())
        return real(module, batch, **more)

    task.score = score  # type: ignore[method-assign]
    found = evaluate_split(forward, task, "validation", micro_batch_size=4)
    task.splits = {**task.splits, "validation": tiny.sentences(23, seed=5)}
    plain = evaluate_split(forward, task, "validation", micro_batch_size=4)

    assert sizes[:6] == sorted(sizes[:6], reverse=True), "what needs most memory comes first"
    assert max(widths) == max(len(ids) for ids in rows["input_ids"])
    assert sum(sizes[:6]) < 0.8 * sum(sizes[6:])
    assert [r["example_index"] for r in found.records] == list(range(23))
    assert [r["prediction"] for r in found.records] == [r["prediction"] for r in plain.records]
    assert [r["loss"] for r in found.records] == pytest.approx([r["loss"] for r in plain.records], rel=1e-5)


@pytest.mark.parametrize("limit", [1, 60, 10_000])
def test_an_evaluation_by_tokens_keeps_the_limit_and_gives_the_results_of_one_by_rows(limit: int) -> None:
    task = training.task(SORTED)
    rows = tiny.arrow_sentences(23, seed=5)
    task.splits = {**task.splits, "validation": rows}
    forward = ForwardOnly(tiny.bert(layers=2), SORTED.config(), ONE_PROCESS)
    plain = evaluate_split(forward, task, "validation", micro_batch_size=4)
    shapes: list[tuple[int, int]] = []
    real = task.score

    def score(module: Any, batch: Any, **more: Any) -> Any:
        shapes.append(tuple(batch["input_ids"].shape))
        return real(module, batch, **more)

    task.score = score  # type: ignore[method-assign]
    found = evaluate_split(forward, task, "validation", micro_batch_size=4, micro_batch_tokens=limit)

    assert all(rows * width <= limit or rows == 1 for rows, width in shapes), "a row that is too long is alone"
    assert len(shapes) == {1: 23, 10_000: 1}.get(limit, len(shapes))
    assert len({rows for rows, _ in shapes}) > 1 or limit != 60, "short rows come in larger micro-batches"
    assert [r["example_index"] for r in found.records] == list(range(23))
    assert [r["prediction"] for r in found.records] == [r["prediction"] for r in plain.records]
    assert [r["loss"] for r in found.records] == pytest.approx([r["loss"] for r in plain.records], rel=1e-5)
    assert found.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-6)


def test_an_evaluation_by_tokens_of_rows_without_lengths_is_refused_at_the_start_and_in_an_evaluation() -> None:
    task = training.task(SORTED)
    task.splits = {**task.splits, "validation": tiny.sentences(4)}
    forward = ForwardOnly(tiny.bert(layers=1), SORTED.config(), ONE_PROCESS)
    config = SORTED.config()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"micro_batch_tokens": 99})})

    with pytest.raises(ConfigError, match=r"^evaluation\.micro_batch_tokens=99 needs the number of tokens of each row"):
        evaluate_split(forward, task, "validation", micro_batch_size=4, micro_batch_tokens=99)
    with pytest.raises(ConfigError, match=r"^evaluation\.micro_batch_tokens=99 needs .* evaluation\.micro_batch_size"):
        build.step_plan(config, task)


def test_a_long_evaluation_says_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.tasks.progress.LOG_EVERY_S", 0.0)
    monkeypatch.setattr(log, "propagate", True)
    task = training.task(SORTED)
    task.splits = {**task.splits, "validation": tiny.arrow_sentences(11, seed=5)}

    with caplog.at_level(logging.INFO, logger="dtrain"):
        evaluate_split(
            ForwardOnly(tiny.bert(layers=1), SORTED.config(), ONE_PROCESS), task, "validation", micro_batch_size=4
        )

    assert [line for line in caplog.messages if line.startswith("evaluation: ")] == [
        f"evaluation: validation: rows: {done} of 11 ({share} %)" for done, share in ((4, 36), (7, 64))
    ]


def test_a_table_of_another_split_ends_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    task = training.task(SORTED)
    other = token_lengths(tiny.arrow_sentences(11, seed=9))
    monkeypatch.setattr("dtrain.training.evaluation.row_lengths", lambda *_: other)

    with pytest.raises(DataError, match="those of other rows"):
        evaluate_split(
            ForwardOnly(tiny.bert(layers=1), SORTED.config(), ONE_PROCESS), task, "validation", micro_batch_size=4
        )


class Signaled:
    """A signal on rank 1: at once, or after the results were gathered."""

    def __init__(self, context: RankContext, *, late: bool) -> None:
        self.why = None
        self._is_there = context.rank == 1 and not late
        self._comes = context.rank == 1

    def attempt(self, work: Any) -> bool:
        work()
        return True

    def is_signaled(self) -> bool:
        there, self._is_there = self._is_there, self._comes
        return there


def stopped(context: RankContext) -> list[str]:
    """Collective. How evaluations end in which rank 1 has got a signal."""
    ended = []
    for late in (False, True):
        forward = ForwardOnly(tiny.bert(layers=1), SORTED.config(), context)
        stop: Any = Signaled(context, late=late)
        before = context.traffic.copy()
        try:
            evaluate_split(forward, training.task(SORTED), "validation", micro_batch_size=4, stop=stop)
        except RunStopped:
            ended.append(f"stopped after {context.traffic.since(before).collectives}")
    return ended


def test_a_signal_on_one_rank_stops_all_of_them_in_the_next_collective() -> None:
    assert run_ranks(stopped, 2) == [["stopped after 1", "stopped after 3"]] * 2


def shared(context: RankContext) -> list[Any]:
    """Collective. What rank 0 makes reaches all: small, large, as an error, and not at all if a rank has to stop."""
    small = share_from_main(lambda: {"loss": 0.1, "nan": float("inf")}, context, wants_stop=lambda: False)
    large = share_from_main(lambda: "x" * (SHARED_BYTES + 1), context, wants_stop=lambda: False)

    def fail() -> None:
        raise DataError("no such metric")

    with pytest.raises(DataError, match="no such metric"):
        share_from_main(fail, context, wants_stop=lambda: False)
    with pytest.raises(StopWanted):
        share_from_main(lambda: 1, context, wants_stop=lambda: context.rank == context.world_size - 1)
    return [small, len(large)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_rank_0_made_reaches_every_rank(world_size: int) -> None:
    expected = [{"loss": 0.1, "nan": float("inf")}, SHARED_BYTES + 1]

    assert all(found == expected for found in run_ranks(shared, world_size))


def test_out_of_memory_names_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = training.build(ONE_PROCESS, BUDGET)
    monkeypatch.setattr(run.engine, "backward", exhausted)

    with pytest.raises(DtrainError, match=r"Set train.micro_batch_tokens lower"):
        run.go()


def test_the_config_of_a_new_run_sorts() -> None:
    assert Config.model_validate({"run": {"name": "t"}, "task": {"name": "causal_lm"}}).train.sort_by_length

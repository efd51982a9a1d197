"""Lengths of rows from Arrow offsets, and what they say about micro-batches."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from dtrain.data.batches import evaluation_batches, step_batches
from dtrain.data.lengths import RowLengths, list_lengths, token_lengths
from dtrain.data.order import StepPlan, assign_micro_batches, chunks
from dtrain.distributed.topology import SINGLE
from dtrain.errors import DataError
from tests.support.tiny import Table


def table(lengths: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [[7] * length for length in lengths]})


def of(lengths: list[int]) -> RowLengths:
    found = token_lengths(table(lengths))
    assert found is not None
    return found


def lognormal(rows: int) -> list[int]:
    """Lengths like those of GLUE."""
    drawn = np.random.default_rng(0).lognormal(np.log(24), 0.55, rows)
    return [int(length) for length in np.clip(np.round(drawn), 5, 128)]


def test_lengths_are_those_of_the_rows_shown_whatever_the_table_below_looks_like() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    halves = datasets.concatenate_datasets([table(lengths[:3]), table(lengths[3:])])

    assert of(lengths).width.tolist() == lengths
    for rows in (halves, halves.select([6, 0, 0]), halves.shuffle(seed=1), halves.select(range(2, 5))):
        found = token_lengths(rows)
        assert found is not None
        assert found.width.tolist() == [len(ids) for ids in rows["input_ids"]]
        assert found.sequences.tolist() == [1] * len(rows)


def test_windows_and_choices_count_all_their_sequences_at_the_longest() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[[1] * 5, [1] * 3], [[1] * 2], [], [[1], [1] * 4, [1]]]})

    found = token_lengths(rows)

    assert found is not None
    assert found.sequences.tolist() == [2, 1, 0, 3]
    assert found.width.tolist() == [5, 2, 0, 4]
    assert found.tokens.tolist() == [8, 2, 0, 6]
    assert found.cost([0, 3]) == (2 + 3) * 5


def test_rows_without_token_lists_have_no_lengths() -> None:
    assert token_lengths(Table({"input_ids": [[1, 2]]})) is None
    assert token_lengths(datasets.Dataset.from_dict({"pixels": [[1.0]]})) is None
    assert token_lengths(datasets.Dataset.from_dict({"input_ids": ["text"]})) is None
    missing = datasets.Dataset.from_dict({"labels": [None, None]})
    found = token_lengths(missing, "labels", minimum=1)
    assert found is not None
    assert found.width.tolist() == [1, 1]
    assert list_lengths(missing, "labels") is None


def test_a_fixed_width_and_tokens_left_out_are_what_a_batch_has() -> None:
    rows = table([3, 1, 5])

    fixed, shifted = token_lengths(rows, length=16), token_lengths(rows, left_out=1, minimum=1)

    assert fixed is not None
    assert shifted is not None
    assert fixed.width.tolist() == [16, 16, 16]
    assert fixed.order([2, 0, 1]) == [2, 0, 1], "rows of one width are not moved"
    assert shifted.width.tolist() == [2, 1, 4]


# The list of micro-batches


def test_a_step_is_sorted_by_length_before_it_is_cut_and_ties_keep_their_order() -> None:
    lengths = [4, 2, 4, 1, 2, 4, 9, 1]
    plan = StepPlan(8, 8, 3, seed=0, shuffle=False, lengths=of(lengths), sort_by_length=True)

    assert plan.micro_batches(0) == [[3, 7, 1], [4, 0, 2], [5, 6]]


def test_rows_of_one_length_and_unknown_lengths_give_the_plain_list() -> None:
    plain = StepPlan(100, 32, 5, seed=3, shuffle=True)

    for step in range(4):
        for lengths in (of([6] * 100), None):
            plan = replace(plain, lengths=lengths, sort_by_length=True)
            assert plan.micro_batches(step) == plain.micro_batches(step)


@pytest.mark.parametrize("sorts", [True, False])
@pytest.mark.parametrize("limit", [128, 300, 4096])
def test_a_token_budget_is_kept_and_loses_no_example(limit: int, sorts: bool) -> None:
    lengths = of(lognormal(200))
    plan = StepPlan(200, 32, 8, seed=0, shuffle=True, lengths=lengths, sort_by_length=sorts, micro_batch_tokens=limit)

    for step in range(plan.steps_per_epoch):
        found = plan.micro_batches(step)
        assert sorted(itertools.chain(*found)) == sorted(plan.indices(step))
        assert all(lengths.cost(batch) <= limit for batch in found)
        grown = [[*batch, after[0]] for batch, after in itertools.pairwise(found)]
        assert all(lengths.cost(batch) > limit for batch in grown), "no micro-batch has room for the next row"


def test_sorting_raises_the_share_of_real_tokens() -> None:
    lengths = of(lognormal(10_007))

    def fill(**options: Any) -> float:
        plan = StepPlan(10_007, 32, 8, seed=0, shuffle=True, **options)
        return lengths.fill([batch for step in range(200) for batch in plan.micro_batches(step)])

    assert fill() == pytest.approx(0.51, abs=0.02)
    assert fill(lengths=lengths, sort_by_length=True) == pytest.approx(0.75, abs=0.02)
    assert fill(lengths=lengths, sort_by_length=True, micro_batch_tokens=256) > 0.83
    assert lengths.fill(chunks(range(10_007), 32)) < 0.40
    assert lengths.fill(chunks(lengths.order(range(10_007)), 32)) > 0.98


# Which rank runs what


@pytest.mark.parametrize("lock_step", [False, True])
@pytest.mark.parametrize("number", [1, 3, 8, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shares_by_cost_count_each_micro_batch_once(number: int, world_size: int, lock_step: bool) -> None:
    costs = [random.Random(number).randint(1, 900) for _ in range(number)]
    shares = [
        assign_micro_batches(number, rank=rank, world_size=world_size, lock_step=lock_step, costs=costs)
        for rank in range(world_size)
    ]

    counted = sorted(a.micro_batch for share in shares for a in share if a.counted)
    assert counted == list(range(number))
    assert all(a.micro_batch == 0 for share in shares for a in share if not a.counted)
    assert all(share for share in shares)
    assert sum(not any(a.counted for a in share) for share in shares) == max(world_size - number, 0)
    if lock_step:
        assert len({len(share) for share in shares}) == 1
        for at_once in zip(*shares, strict=True):
            known = [costs[a.micro_batch] for a in at_once if a.counted]
            later = [
                costs[a.micro_batch] for share in shares for a in share[shares[0].index(at_once[0]) + 1 :] if a.counted
            ]
            assert not later or min(known) >= max(later), "what runs at the same time costs alike"


def test_equal_costs_are_shared_as_without_costs() -> None:
    for world_size, lock_step in itertools.product((1, 2, 3), (False, True)):
        for rank in range(world_size):
            place: Any = {"rank": rank, "world_size": world_size, "lock_step": lock_step}
            assert assign_micro_batches(7, **place, costs=[5] * 7) == assign_micro_batches(7, **place)


def test_ranks_finish_at_about_the_same_time() -> None:
    lengths = of(lognormal(6_400))
    plan = StepPlan(6_400, 64, 8, seed=0, shuffle=True, lengths=lengths, sort_by_length=True)

    def worst(by_cost: bool) -> float:
        """The slowest rank's tokens by those of an equal share, over 100 steps."""
        ratios = []
        for step in range(100):
            batches = plan.micro_batches(step)
            costs = [lengths.cost(batch) for batch in batches]
            loads = [
                sum(
                    costs[a.micro_batch]
                    for a in assign_micro_batches(
                        len(batches), rank=rank, world_size=2, lock_step=False, costs=costs if by_cost else None
                    )
                )
                for rank in range(2)
            ]
            ratios.append(max(loads) / (sum(loads) / 2))
        return float(np.mean(ratios))

    assert worst(by_cost=False) > 1.1
    assert worst(by_cost=True) < 1.04


# A table of other rows


def collate(rows: Any, _position: Any) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row) for row in rows["input_ids"]]
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)}


@pytest.mark.parametrize("stale", ["another split", "another truncation"])
def test_lengths_of_other_rows_are_an_error_that_names_the_place(stale: str) -> None:
    lengths = lognormal(64)
    rows, right = table(lengths), of(lengths)
    wrong = of(lognormal(128)[64:] if stale == "another split" else [min(length, 20) for length in lengths])

    def train(known: RowLengths) -> None:
        plan = StepPlan(64, 16, 4, seed=0, shuffle=True, lengths=known, sort_by_length=True)
        for _ in step_batches(plan, rows, collate, SINGLE, lock_step=False, start=0, stop=4, workers=0):
            pass

    def evaluate(known: RowLengths) -> None:
        more: Any = {"micro_batch_size": 4, "lock_step": False, "workers": 0, "lengths": known}
        assert len(list(evaluation_batches(rows, collate, SINGLE, **more))) == 16

    for work in (train, evaluate):
        work(right)
        with pytest.raises(
            DataError, match=r"by the table of lengths it has \d+: the lengths are those of other rows"
        ) as said:
            work(wrong)
        assert "the rows in memory" in str(said.value)


def test_the_error_names_the_folder_of_the_cache(tmp_path: Any) -> None:
    table([3, 4]).save_to_disk(str(tmp_path / "train"))

    found = token_lengths(datasets.load_from_disk(str(tmp_path / "train")))

    assert found is not None
    with pytest.raises(DataError, match=str(tmp_path / "train")):
        found.check({"input_ids": torch.zeros(2, 3)}, [0, 1])


def test_what_no_task_promised_is_not_checked() -> None:
    found = token_lengths(table([3, 4]), is_promised=False)

    assert found is not None
    found.check({"input_ids": torch.zeros(2, 99)}, [0, 1])

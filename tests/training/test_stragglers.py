"""The rule that names the rank that all others wait for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dtrain.training.stragglers import RankWork, find_straggler


def work(compute_s: float, data_s: float = 0.0, computed: int = 1000, micro_batches: int = 100) -> RankWork:
    return RankWork(compute_s, data_s, computed, micro_batches)


def test_the_rank_that_works_longer_than_the_median_is_named_with_its_factor() -> None:
    found = find_straggler([work(10.0), work(11.0), work(16.5), work(11.0)])

    assert found is not None
    assert (found.rank, found.part) == (2, "compute")
    assert found.factor == pytest.approx(1.5)


def test_a_rank_that_waits_for_its_batches_is_named_with_that_reason() -> None:
    found = find_straggler([work(10.0, 0.1), work(10.2, 6.0), work(10.0, 0.1)])

    assert found is not None
    assert (found.rank, found.part) == (1, "data")


@pytest.mark.parametrize(
    "ranks",
    [
        [],
        [work(10.0)],  # nobody waits for it
        [work(10.0), work(12.9), work(10.0)],  # 1.29 times
        [work(0.0), work(0.0), work(0.0)],
        [work(0.0, micro_batches=0, computed=0)] * 3,
    ],
)
def test_no_rank_is_named_without_reason(ranks: Sequence[RankWork]) -> None:
    assert find_straggler(ranks) is None


def test_of_two_ranks_the_slower_one_is_compared_with_the_faster() -> None:
    found = find_straggler([work(14.0), work(10.0)])

    assert found is not None
    assert (found.rank, found.factor) == (0, pytest.approx(1.4))


@pytest.mark.parametrize(
    "ranks",
    [
        # More micro-batches than others, each as fast.
        [work(20.0, computed=2000, micro_batches=200), work(10.0), work(10.0)],
        # Longer rows in as many micro-batches.
        [work(20.0, computed=2000), work(10.0), work(10.0)],
        # A few long micro-batches that take as long as the many short ones of the others: per micro-batch far slower.
        [work(10.0, micro_batches=20), work(10.0), work(10.0)],
        # Half of the tokens, in long rows: attention costs more for each, and the rank is done when the others are.
        [work(10.0, computed=500, micro_batches=50), work(10.0), work(10.0)],
        # Idle but for one dummy a step, and others with two micro-batches.
        [work(20.0, micro_batches=200, computed=2000), work(20.0, micro_batches=200, computed=2000), work(9.0)],
        # Short rows: slow per token, but not per micro-batch, because each has its fixed cost.
        [work(9.0, computed=500), work(10.0), work(10.0)],
    ],
)
def test_more_or_less_work_by_design_is_no_fault(ranks: Sequence[RankWork]) -> None:
    assert find_straggler(ranks) is None


def test_a_slow_rank_is_named_although_it_has_more_work() -> None:
    found = find_straggler([work(40.0, computed=2000, micro_batches=200), work(10.0), work(10.0)])

    assert found is not None
    assert (found.rank, found.factor) == (0, pytest.approx(2.0))


def test_a_task_without_tokens_is_judged_by_its_micro_batches() -> None:
    found = find_straggler([work(10.0, computed=0), work(15.0, computed=0), work(10.0, computed=0)])

    assert found is not None
    assert found.rank == 1

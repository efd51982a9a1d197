"""What crosses ranks, at world sizes 1, 2 and 3: several assertions share one run of ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from dtrain.distributed.collectives import (
    agree,
    all_gather,
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast,
    broadcast_object,
    every_rank,
    gather,
    node_first,
    reduce_sum,
    scatter,
)
from dtrain.distributed.evaluation_exchange import gather_for_metrics
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.errors import DataError, DtrainError, Interrupted
from tests.support.contexts import placed
from tests.support.multirank import RanksFailed, run_ranks

pytestmark = pytest.mark.ranks


def _moves_tensors(context: RankContext) -> None:
    rank, size = context.rank, context.world_size
    everyone = torch.arange(size)
    mine = torch.tensor([rank, 10 * rank], dtype=torch.float64)
    kept = mine.clone()

    total = all_reduce_sum(mine, context)
    assert total.tolist() == [everyone.sum(), 10 * everyone.sum()]
    assert all_reduce_max(mine, context).tolist() == [size - 1, 10 * (size - 1)]
    reduced = reduce_sum(mine, context, dst=size - 1)
    assert (reduced is None) == (rank != size - 1)
    assert reduced is None or reduced.tolist() == total.tolist()
    assert mine.tolist() == kept.tolist(), "arguments are left alone"

    # Rank r holds r rows, so rank 0 none; the dtypes are ones that gloo has no name for, too.
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float64):
        uneven = torch.full((rank, 2), rank, dtype=torch.float32).to(dtype)
        parts = all_gather(uneven, context)
        assert [tuple(part.shape) for part in parts] == [(r, 2) for r in range(size)]
        assert all(torch.equal(part, torch.full((r, 2), r).to(dtype)) for r, part in enumerate(parts))
        assert all(part.dtype == dtype for part in parts)
    gathered = gather(torch.full((rank,), rank), context, dst=0)
    assert (gathered is None) == (rank != 0)
    assert gathered is None or [part.tolist() for part in gathered] == [[r] * r for r in range(size)]
    assert [part.dim() for part in all_gather(torch.tensor(1.5), context)] == [0] * size

    parts = [torch.full((r, 3), float(r)) for r in range(size)] if rank == 0 else None
    assert torch.equal(scatter(parts, context), torch.full((rank, 3), float(rank)))
    last = size - 1
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(broadcast(weight if rank == last else None, context, src=last), weight)
    assert torch.equal(broadcast(weight if rank == 0 else None, context, like=torch.empty_like(weight)), weight)
    assert broadcast(torch.empty(0, 5) if rank == 0 else None, context).shape == (0, 5)


def _moves_objects_and_decisions(context: RankContext) -> None:
    rank, size = context.rank, context.world_size
    assert all_gather_object({"rank": rank, "pad": "\u00e9" * rank}, context) == [
        {"rank": r, "pad": "\u00e9" * r} for r in range(size)
    ]
    assert broadcast_object([1, None, "a"] if rank == 0 else object(), context) == [1, None, "a"]
    assert agree(rank == size - 1, context) == 1
    assert agree(0, context) == 0
    assert agree(rank, context) == size - 1
    barrier(context)


def _share(context: RankContext, count: int) -> torch.Tensor:
    """Interleaved and backwards, so that neither rank order nor row order is data order."""
    return torch.arange(count)[context.rank :: context.world_size].flip(0)


def _gathers_in_data_order(context: RankContext) -> None:
    for count in (0, 1, 2, 7):
        index = _share(context, count)
        values: dict[str, torch.Tensor] = {
            "loss": index.to(torch.float64) / 3,
            "logits": torch.stack([index, -index], dim=1).to(torch.float32),
        }
        if not len(index) and count:
            values = {}  # a rank without examples knows no shapes
        found: list[dict[str, torch.Tensor]] = []
        shared = gather_for_metrics(
            values, index, context, num_examples=count, work=lambda table, found=found: found.append(table) or "made"
        )
        assert shared == "made"
        assert len(found) == context.is_main, "only rank 0 holds all values"
        order = torch.arange(count)
        for table in found:
            assert torch.equal(table["loss"], order.to(torch.float64) / 3)
            assert torch.equal(table["logits"], torch.stack([order, -order], dim=1).to(torch.float32))
            assert (table["loss"].dtype, table["logits"].dtype) == (torch.float64, torch.float32)


def _refused(context: RankContext, index: torch.Tensor, values: dict[str, torch.Tensor], count: int) -> str:
    with pytest.raises(DtrainError) as caught:
        gather_for_metrics(values, index, context, num_examples=count, work=lambda _: None)
    return str(caught.value)


def _rejects_wrong_indices(context: RankContext) -> list[str]:
    last = context.rank == context.world_size - 1
    index = _share(context, 7)
    repeated = torch.cat([index, index[:1]]) if last else index
    lost = index[1:] if last else index
    outside = torch.where(index == index.max(), 7, index) if last else index
    wide = index.unsqueeze(1) if last else index
    return [
        *(_refused(context, wrong, {"loss": wrong.double()}, 7) for wrong in (repeated, lost, outside)),
        _refused(context, index, {"loss": index.double()[1:] if last else index.double()}, 7),
        _refused(context, index, {"loss": wide}, 7) if context.world_size > 1 else "disagree",
    ]


def _everything(context: RankContext) -> list[str]:
    _moves_tensors(context)
    _moves_objects_and_decisions(context)
    _gathers_in_data_order(context)
    return _rejects_wrong_indices(context)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_collective_gives_what_one_process_would_compute(world_size: int) -> None:
    messages = run_ranks(_everything, world_size)

    assert all(said == messages[0] for said in messages), "every rank raises the same"
    repeated, lost, outside, short, shapes = messages[0]
    first_of_last_rank = list(range(world_size - 1, 7, world_size))[-1]
    assert f"1 counted more than once ({first_of_last_rank})" in repeated
    assert f"1 missing ({first_of_last_rank})" in lost
    assert "1 out of range (7)" in outside
    assert "not as many rows of loss" in short
    assert "disagree" in shapes


def test_more_ranks_without_a_group_are_an_error_not_a_single_process() -> None:
    two = placed(ONE_PROCESS, world_size=2, local_world_size=2, launcher="env")

    with pytest.raises(RuntimeError, match="2 ranks, but no process group"):
        all_reduce_sum(torch.ones(1), two)


def _on_two_nodes(context: RankContext) -> RankContext:
    """Ranks 0 and 1 are node 0; the rest is node 1."""
    rank = context.rank
    node, local = (0, rank) if rank < 2 else (1, rank - 2)
    return placed(context, local_rank=local, local_world_size=2 - node, node_rank=node, num_nodes=2)


def _works_once_per_node(context: RankContext) -> list[Any]:
    nodes = _on_two_nodes(context)
    first = node_first(lambda: {"by": context.rank, "pid": os.getpid()}, nodes)
    second = node_first(lambda: (context.rank, "tuple"), nodes)

    def fail() -> None:
        if nodes.topology.node_rank == 1:
            raise DataError("row 3 of train.tsv has 2 columns")

    with pytest.raises(DataError) as caught:
        node_first(fail, nodes)
    barrier(context)  # the job is whole after an error that all share
    return [first["by"], second, str(caught.value)]


def test_one_rank_per_node_works_and_all_get_its_result_or_its_error() -> None:
    results = run_ranks(_works_once_per_node, 3)

    message = "row 3 of train.tsv has 2 columns"
    assert results == [[0, [0, "tuple"], message], [0, [0, "tuple"], message], [2, [2, "tuple"], message]]


def _works_on_every_rank(context: RankContext) -> list[Any]:
    before = context.traffic.copy()
    own = every_rank(lambda: (context.rank, "tuple"), context)
    collectives = context.traffic.since(before).collectives

    def fail() -> None:
        if context.rank == 1:
            raise DataError("rank 1 has no disk")

    with pytest.raises(DataError) as caught:
        every_rank(fail, context)
    barrier(context)  # the job is whole after an error that all share
    return [own, collectives, str(caught.value)]


def test_every_rank_works_and_waits_for_the_others_in_no_collective() -> None:
    results = run_ranks(_works_on_every_rank, 3)

    assert results == [[[rank, "tuple"], 0, "rank 1 has no disk"] for rank in range(3)]
    assert every_rank(lambda: (0, "tuple"), ONE_PROCESS) == [0, "tuple"]


def _breaks_in_node_work(context: RankContext) -> str:
    def work() -> None:
        raise KeyError("a mistake of ours")

    try:
        node_first(work, _on_two_nodes(context))
    except (KeyError, DtrainError) as error:
        if isinstance(error, KeyError):
            assert context.rank in (0, 2)
            return "itself"
        return str(error)
    return "nothing"


def test_a_mistake_in_node_work_does_not_leave_the_others_waiting() -> None:
    itself, other, _ = run_ranks(_breaks_in_node_work, 3)

    assert itself == "itself"
    assert "KeyError" in other


def _is_stopped_in_node_work(context: RankContext) -> list[Any]:
    def work() -> None:
        raise Interrupted("told to stop", 75)

    try:
        node_first(work, context)
    except (Interrupted, DtrainError) as error:
        return [type(error).__name__, str(error), error.exit_code]
    return []


def test_a_stop_that_reaches_the_rank_at_work_first_is_a_stop_on_all_ranks() -> None:
    assert run_ranks(_is_stopped_in_node_work, 2) == [["Interrupted", "told to stop", 75]] * 2


def _one_fails(context: RankContext) -> None:
    if context.rank == 1:
        raise ValueError("rank 1 is the culprit")
    barrier(context)


def test_the_rank_that_failed_first_is_the_one_reported() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 failed first[\s\S]*rank 1 is the culprit"):
        run_ranks(_one_fails, 3)


def test_ranks_that_hang_are_ended_and_shown_with_their_stacks() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)finished: \[0\].*_one_hangs"):
        run_ranks(_one_hangs_but_one, 2, timeout_s=6.0)


def _one_hangs_but_one(context: RankContext) -> None:
    """Rank 0 is done and waits in the group's end; rank 1 never gets there."""
    if context.rank == 1:
        import threading

        threading.Event().wait(60)
    del context

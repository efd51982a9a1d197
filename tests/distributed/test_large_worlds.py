"""What a large world costs, in operations and bytes per rank: nothing that a rank does may grow with all pairs of ranks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dtrain.config.load import load_config
from dtrain.distributed import evaluation_exchange, rendezvous
from dtrain.distributed.collectives import (
    BROADCAST_BYTES,
    all_gather_object,
    gather_object,
    gather_width,
    is_equal_on_all_ranks,
    scatter_object,
)
from dtrain.distributed.evaluation_exchange import gather_for_metrics
from dtrain.distributed.node_first import NodeWork, run_node_work
from dtrain.distributed.process_info import this_process
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.job.rank_checks import compare_configs
from dtrain.job.watchdog.coordinator import Coordinator, RankRecord
from dtrain.job.watchdog.rules import HangSettings
from tests.support.thread_ranks import run_thread_ranks

SIZES = (8, 64)


class CountingStore:
    """One rank's view of a store. Looks at a key are counted by their keys: how often a rank looks depends on time."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls = self.bytes = self.most_keys = 0

    def check(self, keys: list[str]) -> bool:
        self.most_keys = max(self.most_keys, len(keys))
        return bool(self._store.check(keys))

    def get(self, key: str) -> bytes:
        return self._count(self._store.get(key))

    def set(self, key: str, value: str) -> None:
        self._count(value.encode())
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:
        if amount:  # else it is a look
            self._count(b"")
        return int(self._store.add(key, amount))

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        return self._count(self._store.compare_set(key, expected_value, desired_value))

    def _count(self, value: bytes) -> bytes:
        self.calls += 1
        self.bytes += len(value)
        return value


def together(ranks: int, work: Any) -> tuple[list[CountingStore], list[Any]]:
    """Runs `work(rank, store)` on a thread per rank."""
    shared = HashStore()
    stores = [CountingStore(shared) for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        running = [pool.submit(work, rank, store) for rank, store in enumerate(stores)]
        return stores, [each.result(timeout=60) for each in running]


@pytest.mark.parametrize("ranks", SIZES)
def test_work_of_all_nodes_costs_each_rank_the_same_in_any_world(ranks: int) -> None:
    def work(rank: int, store: CountingStore) -> Any:
        return run_node_work(NodeWork(store, "w", rank, ranks, rank, ranks), lambda: rank * "x", progress_every_s=30.0)

    stores, results = together(ranks, work)

    assert results == [rank * "x" for rank in range(ranks)]
    assert max(store.most_keys for store in stores) == 1
    assert max(store.calls for store in stores) <= 5


def test_the_first_failing_node_is_the_one_that_all_ranks_report() -> None:
    def work(rank: int, store: CountingStore) -> str:
        def fail() -> None:
            raise DataError(f"node {rank}")

        unit = NodeWork(store, "w", rank, 6, rank, 6)
        with pytest.raises(DataError) as caught:
            run_node_work(unit, fail if rank in (2, 4) else (lambda: None), progress_every_s=30.0)
        return str(caught.value)

    assert set(together(6, work)[1]) == {"node 2"}


def meeting(ranks: int) -> list[CountingStore]:
    def work(rank: int, store: CountingStore) -> Any:
        return rendezvous.join(
            store,
            rank=rank,
            world_size=ranks,
            local_rank=None,
            node=f"node-{rank // 4}",
            deadline=time.monotonic() + 60,
            timeout_s=60.0,
        ).placement

    stores, places = together(ranks, work)
    assert places == [(rank % 4, 4, rank // 4, ranks // 4) for rank in range(ranks)]
    return stores


def test_a_rendezvous_is_read_by_rank_0_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MAX_POLL_S", 0.02)
    few, many = meeting(SIZES[0]), meeting(SIZES[1])

    # A rank reads the leader's reply once per look.
    assert max(store.bytes for store in many[1:]) < max(store.bytes for store in few[1:]) + 40 * 100
    assert many[0].calls <= few[0].calls * SIZES[1] / SIZES[0] + 10


def test_when_time_is_over_one_rank_lists_the_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MAX_POLL_S", 0.02)
    lists = Counter[str]()
    present = rendezvous._present
    monkeypatch.setattr(rendezvous, "_present", lambda *given: lists.update(["list"]) or present(*given))

    def work(rank: int, store: CountingStore) -> str:
        with pytest.raises(Exception, match="Missing: rank 0") as caught:
            rendezvous.join(
                store,
                rank=rank + 1,
                world_size=17,
                local_rank=None,
                node="n",
                deadline=time.monotonic() + 0.5,
                timeout_s=0.5,
            )
        return str(caught.value)

    messages = set(together(16, work)[1])

    assert len(messages) == 1
    assert lists["list"] == 1


# ---------------------------------------------------------------- collectives


@pytest.mark.parametrize("ranks", SIZES)
def test_equal_settings_are_compared_by_a_hash(ranks: int) -> None:
    config = load_config(None, ["data.name=cola", "data.path=x", "model.name_or_path=y"])
    processes = [this_process()] * ranks

    _, received = run_thread_ranks(lambda context: compare_configs(config, context, processes), ranks)

    assert set(received) == {64}


def test_other_settings_are_read_by_rank_0_and_named_to_all() -> None:
    configs = [
        load_config(None, ["data.name=cola", "data.path=x", "model.name_or_path=y", f"run.seed={seed}"])
        for seed in (1, 1, 2)
    ]
    processes = [this_process()] * 3

    def compare(context: RankContext) -> str:
        with pytest.raises(ConfigError) as refused:
            compare_configs(configs[context.rank], context, processes)
        return str(refused.value)

    messages, received = run_thread_ranks(compare, 3)

    assert len(set(messages)) == 1
    assert "run.seed: 1 on rank 0" in messages[0]
    assert max(received[1:]) < received[0]


def test_objects_are_compared_gathered_and_scattered() -> None:
    def work(context: RankContext) -> list[Any]:
        rank, size = context.rank, context.world_size
        return [
            is_equal_on_all_ranks({"a": [1, None]}, context),
            is_equal_on_all_ranks({"a": rank == 1}, context),
            gather_object(rank, context),
            scatter_object([["for", r] for r in range(size)] if context.is_main else None, context),
        ]

    found, _ = run_thread_ranks(work, 3)

    assert found == [[True, False, [0, 1, 2] if rank == 0 else None, ["for", rank]] for rank in range(3)]
    assert work(ONE_PROCESS) == [True, True, [0], ["for", 0]]


def test_a_rank_with_much_to_say_does_not_widen_the_messages_of_the_others() -> None:
    large, small = "x" * (4 * BROADCAST_BYTES), "y"

    def work(context: RankContext) -> list[int]:
        found = all_gather_object(large if context.rank == 3 else small, context)
        return [len(text) for text in found]

    found, received = run_thread_ranks(work, 16)

    assert found == [[1, 1, 1, len(large), *[1] * 12]] * 16
    assert max(received) < len(large) + 16 * 200
    assert gather_width([5, 7, 6]) == 7
    assert gather_width([0, 10 * BROADCAST_BYTES]) == 0
    assert gather_width([10 * BROADCAST_BYTES, 10 * BROADCAST_BYTES, 9 * BROADCAST_BYTES]) == 10 * BROADCAST_BYTES


def values_of(context: RankContext, rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    index = torch.arange(context.rank, rows, context.world_size).flip(0)
    return {"loss": index.double(), "prediction": torch.stack([index, -index], 1).to(torch.int16)}, index


@pytest.mark.parametrize("most_bytes", [1, 300, 2**26])
def test_the_values_of_an_evaluation_reach_rank_0_alone(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    monkeypatch.setattr(evaluation_exchange, "MAX_GATHER_BYTES", most_bytes)
    rows, ranks = 331, 16

    def evaluate(context: RankContext) -> list[Any]:
        held: list[Any] = []

        def work(table: dict[str, torch.Tensor]) -> float:
            order = torch.arange(rows)
            assert torch.equal(table["loss"], order.double())
            assert torch.equal(table["prediction"], torch.stack([order, -order], 1).to(torch.int16))
            held.append(len(table))
            return float(table["loss"].sum())

        shared = gather_for_metrics(*values_of(context, rows), context, num_examples=rows, work=work)
        return [shared, held]

    found, received = run_thread_ranks(evaluate, ranks)

    assert found == [[331 * 165.0, [2] if rank == 0 else []] for rank in range(ranks)]
    result = evaluation_exchange.SHARED_BYTES + 9
    assert max(received[1:]) == result + (ranks - 1) * 5 * 8  # the sizes of all, and the result


def test_a_wrong_index_is_named_on_every_rank_in_whichever_gather_it_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_exchange, "MAX_GATHER_BYTES", 1)

    def evaluate(context: RankContext) -> str:
        values, index = values_of(context, 40)
        if context.rank == 1:
            index[-1] = 40
        with pytest.raises(DtrainError) as caught:
            gather_for_metrics(values, index, context, num_examples=40, work=lambda _: None)
        return str(caught.value)

    found, _ = run_thread_ranks(evaluate, 4)

    assert set(found) == {found[0]}
    assert "1 out of range (40); 1 missing (1)" in found[0]


# ---------------------------------------------------------------- the monitors


def test_a_signal_that_all_ranks_pass_on_reaches_each_rank_once() -> None:
    received = Counter[int]()

    async def life(ranks: int) -> None:
        hub = Coordinator(range(ranks), HangSettings(10.0), report_end=lambda *_: asyncio.sleep(0))
        for rank in range(ranks):
            hub.add_rank(rank, RankRecord(lambda message, rank=rank: received.update([rank]), "host", 7))
        for rank in (5, *range(ranks)):  # rank 5 gets it first, and then each reports the one that it was sent
            hub.receive(rank, {"signal": 15, "reason": None})
        hub.add_rank(ranks, RankRecord(lambda message: received.update([ranks]), "host", 7))
        hub.receive(0, {"signal": 15, "reason": None})

    asyncio.run(life(64))

    assert received == {rank: 1 for rank in range(65) if rank != 5}

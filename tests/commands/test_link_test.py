"""The doctor's ranks: every pair of hosts is timed once, by the first rank of each, and all ranks together."""

from __future__ import annotations

from typing import Any

import pytest

from dtrain.commands import link_test
from dtrain.distributed.rank_context import RankContext
from tests.support.multirank import run_ranks

pytestmark = pytest.mark.ranks


def rank_measures(context: RankContext, hosts: list[str], firsts: list[int]) -> dict[str, Any]:
    link_test.SIZES = (1 << 12, 1 << 16)
    return link_test.measure(context, {"hosts": hosts, "firsts": firsts})


def test_each_pair_of_hosts_is_measured_once_and_all_ranks_together() -> None:
    # Two ranks on the second host: only its first one stands for it.
    found = run_ranks(rank_measures, 4, ["a", "b", "c"], [0, 1, 3])[0]

    assert [pair["hosts"] for pair in found["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert (found["hosts"], found["ranks"], found["backend"]) == (["a", "b", "c"], 4, "gloo")
    assert [timed["host"] for timed in found["precision"]] == ["a", "b", "c"]
    assert all(timed["fp32_s"] > 0 and timed["bf16_s"] > 0 and "bf16" in timed["found"] for timed in found["precision"])
    for timed in [*found["pairs"], found["all"]]:
        assert [size["bytes"] for size in timed["sizes"]] == [1 << 12, 1 << 16]
        assert 0 < timed["latency_s"] < 1
        assert timed["bandwidth"] > 0


def test_a_host_that_is_alone_has_no_pairs() -> None:
    found = run_ranks(rank_measures, 2, ["a"], [0])[0]

    assert found["pairs"] == []
    assert found["all"]["bandwidth"] > 0

"""Ranks of one node and its cores, with real ranks: the arithmetic is tested in tests/distributed/test_cpu.py."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pytest
import torch

from dtrain.console import log
from dtrain.distributed import cpu
from dtrain.distributed.rank_context import RankContext
from dtrain.job.cpu_sharing import share_cores
from tests.support.multirank import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")]


def ranks_share_cores(context: RankContext, bind: bool, narrow: bool) -> dict[str, Any]:
    """This rank's CPUs and threads, after a launcher that gave it one core of its own or none."""
    if narrow:
        ordered = sorted(cpu.allowed_cpus())
        os.sched_setaffinity(0, {ordered[context.rank % len(ordered)]})
    before, said = sorted(cpu.allowed_cpus()), []
    log.info = lambda text, *values: said.append(text % values)  # type: ignore[method-assign,assignment]
    share_cores(context, {}, bind=bind)
    threads = torch.get_num_threads()
    share_cores(context, {"OMP_NUM_THREADS": "3"}, bind=False)
    kept = torch.get_num_threads()
    return {"before": before, "after": sorted(cpu.allowed_cpus()), "threads": threads, "kept": kept, "said": said}


def test_two_ranks_run_on_different_cores_with_bind_cores() -> None:
    physical = len(cpu.physical_cores(cpu.allowed_cpus()))
    may_bind = physical >= 2 and (cpu.cpu_time_limit() or physical) >= physical

    one, two = run_ranks(ranks_share_cores, 2, True, False)
    free = run_ranks(ranks_share_cores, 2, False, False)

    assert one["before"] == two["before"]
    assert all(rank["after"] == rank["before"] for rank in free), "not without the setting"
    assert all(rank["threads"] == rank["kept"] for rank in (one, two)), "OMP_NUM_THREADS decides alone"
    if may_bind:
        assert not set(one["after"]) & set(two["after"])
        assert sorted(one["after"] + two["after"]) == one["before"]
        assert one["threads"] == two["threads"] == physical // 2
        assert " runs on CPUs " in one["said"][0]
    else:  # two hyper-threads of one core, or a container that may not use all that it sees
        assert [rank["after"] for rank in (one, two)] == [one["before"]] * 2
        assert re.search("keeps CPUs .*(more ranks|the container may use)", one["said"][0])


def test_a_binding_of_the_launcher_is_kept() -> None:
    ranks = run_ranks(ranks_share_cores, 2, True, True)

    assert [rank["after"] for rank in ranks] == [rank["before"] for rank in ranks]
    assert [rank["threads"] for rank in ranks] == [1, 1]

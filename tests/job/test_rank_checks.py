"""The checks that compare all ranks before a command runs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dtrain.distributed.cuda_devices import GpuIdentity
from dtrain.distributed.process_info import this_process
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import TopologyError
from dtrain.job import rank_checks
from tests.support.contexts import placed


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_package_that_one_node_lacks_is_named_whichever_node_it_is(
    monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    found = [{"torch": "2", "deepspeed": "0.19"} for _ in range(2)]
    del found[lacks]["deepspeed"]
    monkeypatch.setattr(rank_checks, "is_equal_on_all_ranks", lambda *_: False)
    monkeypatch.setattr(rank_checks, "gather_object", lambda *_: found)
    monkeypatch.setattr(rank_checks, "on_main", lambda work, _context: work())
    processes = [this_process(), this_process()]

    with pytest.raises(TopologyError) as refused:
        rank_checks.compare_software(placed(ONE_PROCESS, world_size=2), processes)

    assert re.search(rf"deepspeed: .*not set on rank {lacks} ", str(refused.value))
    assert "torch" not in str(refused.value)


H100, SLICE = "NVIDIA H100 (GPU-5d5b)", "NVIDIA A100 MIG 1g.5gb (MIG-a)"
ONE, OTHER, NONE = GpuIdentity("5d5b", H100, "0"), GpuIdentity("77aa", H100, "0"), GpuIdentity("", "the CPU", "")


def test_ranks_with_a_gpu_each_are_left_alone_and_so_are_ranks_on_the_cpu() -> None:
    # Containers and masks number them alike: only the UUID tells them apart.
    assert rank_checks.device_problem([ONE, OTHER], ["node1", "node1"]) is None
    assert rank_checks.device_problem([NONE, NONE], ["node1", "node1"]) is None


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (
            [ONE, OTHER, ONE],
            ["Ranks 0 and 2 (node0 and node2) both use NVIDIA H100 (GPU-5d5b)", "CUDA_VISIBLE_DEVICES: 0."],
        ),
        (
            [ONE, ONE._replace(mask="GPU-5d5b")],
            ["CUDA_VISIBLE_DEVICES: 0 on rank 0, GPU-5d5b on rank 1.", "--nproc-per-node"],
        ),
        ([GpuIdentity("MIG-a", SLICE, "MIG-a,MIG-b")] * 2, ["sees only the first MIG slice", "`nvidia-smi -L`"]),
        (
            [ONE, NONE],
            ["Rank 1 (node1) finds no GPU", "rank 0 (node0) uses NVIDIA H100", "CUDA_VISIBLE_DEVICES= (empty)"],
        ),
        ([NONE, ONE], ["Rank 0 (node0) finds no GPU", "1 of 2 ranks have none"]),
    ],
)
def test_one_gpu_for_two_ranks_or_for_some_of_them_is_refused_with_the_reason(
    gpus: list[GpuIdentity], said: list[str]
) -> None:
    problem = rank_checks.device_problem(gpus, [f"node{rank}" for rank in range(len(gpus))])

    assert problem is not None
    assert all(part in problem for part in said)


def test_the_gpus_of_all_ranks_are_compared_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [[list(ONE), ""], [list(ONE), ""]]
    monkeypatch.setattr(rank_checks, "gather_object", lambda own, _context: [own, *others])
    monkeypatch.setattr(rank_checks, "on_main", lambda work, _context: work())

    rank_checks.compare_devices(ONE_PROCESS, [this_process()])  # one process has nobody to compare with
    with pytest.raises(TopologyError, match=r"Rank 0 .* finds no GPU"):
        rank_checks.compare_devices(placed(ONE_PROCESS, world_size=3), [this_process()] * 3)


@pytest.mark.parametrize(
    "error",
    [
        TopologyError("This host has 4 GPUs, but torch finds none"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    ],
    ids=["refused", "of CUDA"],
)
def test_why_a_rank_cannot_use_its_gpu_is_told_to_all_with_its_host(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_topology: Any) -> Any:
        raise error

    sent: list[Any] = []
    monkeypatch.setattr(rank_checks, "device_of", refuse)
    monkeypatch.setattr(rank_checks, "gather_object", lambda own, _context: sent.append(own) or [[list(ONE), ""], own])
    monkeypatch.setattr(rank_checks, "on_main", lambda work, _context: work())
    process = this_process()

    with pytest.raises(TopologyError) as refused:
        rank_checks.compare_devices(placed(ONE_PROCESS, world_size=2), [process] * 2)

    assert sent, "the others wait for this rank"
    assert str(refused.value).startswith(f"Rank 1 ({process.host}): ")
    assert str(error).split()[-1] in str(refused.value)

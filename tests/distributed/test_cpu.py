"""Sharing a node's cores, on machines written down here; and reading them from planted /proc and /sys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.distributed import cpu as cpu_module
from dtrain.distributed.cpu import (
    Core,
    CpuShare,
    cpu_time_limit,
    format_cpu_list,
    parse_cpu_list,
    physical_cores,
    rank_share,
    split_cores,
)
from dtrain.distributed.rank_context import ONE_PROCESS
from tests.support.contexts import placed

# Two sockets of 16 cores with two hyper-threads: Linux numbers all first threads, then all second ones.
BIG = [Core(numa=index // 16, package=index // 16, cpus=(index, index + 32)) for index in range(32)]
EIGHT = [Core(0, 0, (index,)) for index in range(8)]
ALL = range(64)


def shares(masks: dict[int, object], machine: list[Core], limit: float | None = None) -> list[CpuShare]:
    """Of every rank; each sees the cores of its own mask."""
    return [
        rank_share(rank, masks, [core._replace(cpus=cpus) for core in machine if (cpus := _in(core, mask))], limit)
        for rank, mask in masks.items()
    ]


def _in(core: Core, mask: object) -> tuple[int, ...]:
    return tuple(cpu for cpu in core.cpus if cpu in mask)


def test_ranks_get_whole_cores_of_one_numa_node_each() -> None:
    two = shares(dict.fromkeys(range(2), ALL), BIG)
    four = shares(dict.fromkeys(range(4), ALL), BIG)

    assert [format_cpu_list(each.cpus) for each in two] == ["0-15,32-47", "16-31,48-63"]
    assert [each.threads for each in two] == [16, 16], "a thread for each core, not for each hyper-thread"
    assert [format_cpu_list(each.cpus) for each in four] == ["0-7,32-39", "8-15,40-47", "16-23,48-55", "24-31,56-63"]


def test_ranks_that_do_not_divide_the_cores_leave_none_idle() -> None:
    three = shares(dict.fromkeys(range(3), range(8)), EIGHT)

    assert [format_cpu_list(each.cpus) for each in three] == ["0-1", "2-4", "5-7"]
    assert [each.threads for each in three] == [2, 2, 2], "equal numbers of threads give equal digits"


def test_a_rank_crosses_numa_nodes_only_where_it_must() -> None:
    small = [Core(index // 4, 0, (index,)) for index in range(8)]

    within = split_cores(small, 3)  # at least 2 cores each: two ranks on one node, the third has the other for itself
    across = split_cores(BIG, 3)  # at least 10 each: only one fits a node of 16

    assert [len({core.numa for core in part}) for part in within] == [1, 1, 1]
    assert sorted(len(part) for part in within) == [2, 2, 4]
    assert [len(part) for part in across] == [10, 11, 11]
    for parts, machine in ((within, small), (across, BIG)):
        assert sorted(core for part in parts for core in part) == sorted(machine)


@pytest.mark.parametrize("ranks", range(1, 33))
def test_every_core_goes_to_one_rank_and_each_rank_gets_its_due(ranks: int) -> None:
    uneven = BIG[:13] + BIG[16:]

    for machine in (BIG, uneven, EIGHT):
        if ranks <= len(machine):
            parts = split_cores(machine, ranks)

            assert sorted(core for part in parts for core in part) == sorted(machine)
            assert len(parts) == ranks
            assert min(map(len, parts)) >= len(machine) // ranks


def test_cores_of_a_node_that_is_too_small_for_a_rank_stay_idle_where_the_others_have_room() -> None:
    machine = [Core(int(index >= 128), 0, (index,)) for index in range(135)]

    parts = split_cores(machine, 8)

    assert [len(part) for part in parts] == [16] * 8
    assert {core.numa for part in parts for core in part} == {0}


def test_more_ranks_than_cores_are_left_alone() -> None:
    nine = shares(dict.fromkeys(range(9), range(8)), EIGHT)

    assert {(each.threads, each.cpus) for each in nine} == {(1, None)}
    assert nine[0].reason == "there are more ranks (9) than cores (8)"


def test_what_the_launcher_has_bound_is_neither_widened_nor_cut_again() -> None:
    bound = shares({0: range(4), 1: range(4, 8)}, EIGHT)

    assert [(each.threads, each.cpus) for each in bound] == [(4, None), (4, None)], "four threads, not 4 // 2"


def test_ranks_bound_to_one_socket_together_share_that_socket() -> None:
    socket = {0: [*range(16), *range(32, 48)], 1: [*range(16, 32), *range(48, 64)]}
    bound = shares({0: socket[0], 1: socket[0], 2: socket[1], 3: socket[1]}, BIG)

    assert [format_cpu_list(each.cpus or ()) for each in bound] == [
        "0-7,32-39",
        "8-15,40-47",
        "16-23,48-55",
        "24-31,56-63",
    ]
    assert [each.threads for each in bound] == [8] * 4


def test_a_narrowed_mask_that_all_ranks_have_is_shared_and_nothing_outside_it_is_used() -> None:
    masked = shares(dict.fromkeys(range(2), range(4, 8)), EIGHT)

    assert [format_cpu_list(each.cpus) for each in masked] == ["4-5", "6-7"]


def test_masks_that_overlap_in_part_are_left_alone() -> None:
    mixed = shares({0: range(6), 1: range(4, 8)}, EIGHT)

    assert [(each.threads, each.cpus) for each in mixed] == [(3, None), (2, None)]


def test_one_hyper_thread_of_each_core_counts_as_a_core() -> None:
    half = shares(dict.fromkeys(range(2), range(32)), BIG)

    assert [format_cpu_list(each.cpus) for each in half] == ["0-15", "16-31"]
    assert [each.threads for each in half] == [16, 16]


def test_a_containers_limit_counts_for_threads_and_forbids_binding() -> None:
    """Other containers of the host have their limit of the same cores: each bound to the first two, they would queue."""
    one = shares({0: ALL}, BIG, limit=2.0)
    three = shares(dict.fromkeys(range(3), ALL), BIG, limit=7.5)
    ample = shares(dict.fromkeys(range(2), ALL), BIG, limit=64.0)

    assert [each.threads for each in one] == [2]
    assert [(each.threads, each.cpus) for each in three] == [(2, None)] * 3
    assert three[0].reason == "the container may use 7.5 of 32 cores, whichever are free"
    assert shares({0: ALL}, BIG, limit=0.5)[0].threads == 1
    assert [each.threads for each in ample] == [16, 16]
    assert ample[0].cpus is not None


def test_one_rank_is_never_bound() -> None:
    assert shares({0: range(8)}, EIGHT) == [CpuShare(8, None, "it is alone on its cores")]


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), OSError(22, "Invalid argument")])
def test_a_rank_that_cannot_be_bound_warns_and_continues(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    from dtrain.job import cpu_sharing

    said: list[str] = []

    def refuse(_cpus: object) -> None:
        raise error

    monkeypatch.setattr(cpu_module, "bind_process", refuse)
    monkeypatch.setattr(cpu_sharing.log, "warning", lambda text, *values: said.append(text % values))

    cpu_sharing._bind(CpuShare(8, frozenset(range(8)), ""), placed(ONE_PROCESS, world_size=2, rank=1))

    assert said == [f"run.bind_cores: rank 1 cannot be bound to CPUs 0-7: {error.strerror}."]


def test_a_rank_with_fewer_threads_than_cores_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dtrain.job import cpu_sharing

    said: list[str] = []
    monkeypatch.setattr(cpu_module, "bind_process", lambda _cpus: None)
    monkeypatch.setattr(cpu_sharing.log, "warning", lambda text, *values: said.append(text % values))
    own = torch.get_num_threads()

    for wanted, local_rank in ((own, 0), (own + 7, 1), (own + 7, 0)):
        cpu_sharing._bind(CpuShare(wanted, frozenset({0}), ""), placed(ONE_PROCESS, local_rank=local_rank))

    (line,) = said
    assert f"is bound to {own + 7} cores but uses {own}, because OMP_NUM_THREADS={own} is set" in line


def test_permuted_local_ranks_get_different_cores() -> None:
    permuted = {1: range(8), 0: range(8)}

    assert [format_cpu_list(each.cpus) for each in shares(permuted, EIGHT)] == ["4-7", "0-3"]


def test_the_kernels_lists_of_cpus() -> None:
    assert parse_cpu_list("0-2,8") == [0, 1, 2, 8]
    assert parse_cpu_list("5") == [5]
    assert parse_cpu_list("") == []
    assert format_cpu_list([8, 0, 2, 1]) == "0-2,8"
    assert format_cpu_list([]) == ""


# ---------------------------------------------------------------- what the kernel says


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_cores_and_their_nodes_are_read_from_the_kernel(tmp_path: Path) -> None:
    system = "sys/devices/system"
    files = {f"{system}/node/node{node}/cpulist": f"{node},{node + 2}" for node in range(2)}
    for cpu in range(4):
        files[f"{system}/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 2},{cpu % 2 + 2}"
        files[f"{system}/cpu/cpu{cpu}/topology/physical_package_id"] = str(cpu % 2)
    root = plant(tmp_path, files)

    assert physical_cores(range(4), root) == [Core(0, 0, (0, 2)), Core(1, 1, (1, 3))]
    assert physical_cores([3, 2], root) == [Core(0, 0, (2,)), Core(1, 1, (3,))], "only what the process may use"


def test_without_a_description_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert physical_cores([0, 5], tmp_path) == [Core(0, 0, (0,)), Core(0, 0, (5,))]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param(
            {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0, id="v2 in a container"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/step/cpu.max": "max 100000"},
            None,
            id="v2 unlimited",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/box/cpu.max": "400000 100000",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000",
            },
            1.5,
            id="v2 the narrowest of the groups above counts",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/docker/4f\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3.0,
            id="v1 in a container whose path is the host's",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
            id="v1 unlimited",
        ),
        pytest.param(
            {"proc/self/cgroup": "1:cpuset:/", "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1"}, None, id="v1 no cpu group"
        ),
        pytest.param({}, None, id="no control groups"),
    ],
)
def test_the_limit_of_a_container(tmp_path: Path, files: dict[str, str], limit: float | None) -> None:
    assert cpu_time_limit(plant(tmp_path, files)) == limit


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_binding_moves_all_threads_and_the_processes_that_come_later() -> None:
    code = """if True:
        import os, subprocess, sys, threading
        from dtrain.distributed import cpu
        one = min(cpu.allowed_cpus())
        done = threading.Event()
        thread = threading.Thread(target=done.wait, args=(60,), daemon=True)
        thread.start()
        cpu.bind_process([one])
        child = subprocess.run([sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"], capture_output=True)
        print(os.sched_getaffinity(thread.native_id) == {one}, child.stdout.split() == [str(one).encode()])
        done.set()
    """

    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[2],
    )

    assert answer.stdout.split() == ["True", "True"]
    assert cpu_module.allowed_cpus() == frozenset(os.sched_getaffinity(0))

"""Threads, devices, and what one process does not start. The launchers' variables are in test_launchers.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.mpi_bootstrap import finalize_mpi
from dtrain.distributed.process_group import process_group
from dtrain.distributed.topology import SINGLE
from dtrain.errors import TopologyError
from dtrain.job.cpu_sharing import set_threads


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_one_process_makes_no_process_group() -> None:
    env: dict[str, str] = {}

    with process_group(SINGLE, env) as topology:
        assert topology is SINGLE
        assert not dist.is_initialized()
        assert env == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}

    assert env == {}


@pytest.mark.usefixtures("threads")
def test_ranks_of_a_node_share_its_cores_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    two = replace(SINGLE, local_world_size=2)
    many = replace(SINGLE, local_world_size=16)

    assert set_threads(SINGLE, {}) == 7
    assert set_threads(two, {}) == 3
    assert set_threads(many, {}) == 1
    assert set_threads(SINGLE, {"OMP_NUM_THREADS": "5"}) == 1, "torch has read that variable itself: nothing is changed"


@pytest.mark.usefixtures("threads")
def test_a_container_gets_no_more_threads_than_its_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("dtrain.distributed.cpu.cpu_time_limit", lambda: 2.0)

    assert set_threads(SINGLE, {}) == 2
    assert set_threads(replace(SINGLE, local_world_size=2), {}) == 1


def test_each_local_rank_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    assert torch.cuda.is_available() or device_of(SINGLE) == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    third = replace(SINGLE, world_size=4, rank=3, local_rank=2, local_world_size=4)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert device_of(third) == torch.device("cuda", 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # srun --gpus-per-task shows each rank its own only
    assert device_of(third) == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 2), torch.device("cuda", 0)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(TopologyError, match="Local rank 2 has no CUDA device: 4 ranks on this node, 2 devices"):
        device_of(third)


def test_ending_mpi_does_nothing_where_it_never_began() -> None:
    before = "mpi4py.MPI" in sys.modules

    finalize_mpi()

    assert ("mpi4py.MPI" in sys.modules) == before


def test_reading_the_topology_imports_no_torch() -> None:
    code = "import sys; from dtrain.distributed.topology import Topology; Topology.from_env({}); print('torch' in sys.modules)"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert answer.stdout.strip() == "False"

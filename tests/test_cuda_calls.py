"""Calls of CUDA and NCCL with their answers set by hand: which are made, and in which order. docs/cuda.md lists all."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dtrain.commands import link_test
from dtrain.data.seeding import derive_seed, seed_all
from dtrain.distributed import collectives, process_group
from dtrain.distributed.topology import Topology
from dtrain.engine.bitwise import use_deterministic_kernels
from dtrain.tasks import target_loss
from dtrain.training.late_totals import copy_to_host

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_a_seed_goes_to_the_device_only_once_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed", seeds.append)

    seed_all("a", 1)
    assert seeds == []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    seed_all("a", 2)

    assert seeds == [derive_seed("a", 2)]


@pytest.mark.parametrize(("backends", "moves"), [("cpu:gloo,cuda:nccl", False), ("cuda:nccl", True)])
def test_numbers_of_the_host_go_to_the_device_only_where_the_group_cannot_send_them(
    backends: str, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: moved.append(tensor) or tensor)

    collectives._host_wire(torch.ones(3))

    assert len(moved) == moves


class Journal:
    """Stands for pinned memory and for an event, and notes what is done with them."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def empty(self, _shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> Any:
        self.notes.append(f"pinned={pin_memory} {dtype}")
        return SimpleNamespace(
            copy_=lambda _values, *, non_blocking: self.notes.append(f"copy non_blocking={non_blocking}"),
            tolist=lambda: self.notes.append("read") or [1.0],
        )

    def event(self) -> Any:
        return SimpleNamespace(
            record=lambda: self.notes.append("record"), synchronize=lambda: self.notes.append("synchronize")
        )


def test_a_steps_numbers_are_copied_to_pinned_memory_and_waited_for_only_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = Journal()
    monkeypatch.setattr("torch.empty", journal.empty)
    monkeypatch.setattr("torch.cuda.Event", journal.event)
    values: Any = SimpleNamespace(device=CUDA, shape=(1,), dtype=torch.float64)

    fetch = copy_to_host(values)
    started = list(journal.notes)

    assert started == ["pinned=True torch.float64", "copy non_blocking=True", "record"]
    assert fetch() == [1.0]
    assert journal.notes[3:] == ["synchronize", "read"]


@pytest.mark.parametrize(("has_cuda", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_nccl_moves_tensors_of_the_device_and_gloo_those_of_the_host(
    has_cuda: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, int, float]] = []

    def start(name: str, *, rank: int, timeout: Any, **_: Any) -> None:
        found.append((name, rank, timeout.total_seconds()))

    monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
    monkeypatch.setattr(dist, "init_process_group", start)
    monkeypatch.setattr(dist, "all_reduce", lambda _tensor: None)
    monkeypatch.setattr("torch.distributed.distributed_c10d._set_pg_timeout", lambda _timeout: None)
    topology = Topology(1, 2, 1, 2, 0, 1, "none", "127.0.0.1", 1)

    process_group._start_group(topology, None, 0.0, 1800.0)  # type: ignore[arg-type]

    assert found == [(backend, 1, 10.0)]


@pytest.fixture
def kernels() -> Iterator[None]:
    """Restores which kernels torch may choose."""
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.mem_efficient_sdp_enabled()
    cudnn_sdp, mode = torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.backends.cudnn.benchmark = before[0]
    torch.backends.cuda.enable_mem_efficient_sdp(before[1])
    torch.backends.cuda.enable_cudnn_sdp(cudnn_sdp)
    torch.use_deterministic_algorithms(mode)


@pytest.mark.usefixtures("kernels")
def test_bitwise_runs_use_kernels_with_a_fixed_order_of_additions() -> None:
    torch.backends.cudnn.benchmark = True

    use_deterministic_kernels()

    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark is False
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


def test_a_gpu_may_hold_more_logits_than_the_host() -> None:
    assert target_loss._most_logits(CUDA) == target_loss.MAX_LOGITS_ON_GPU > target_loss._most_logits(CPU)


@pytest.mark.parametrize(("device", "waits"), [(CUDA, 1), (CPU, 0)])
def test_the_link_test_measures_until_the_device_has_finished(
    device: torch.device, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)

    link_test._synchronize(device)

    assert len(waited) == waits

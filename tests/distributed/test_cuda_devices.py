"""Which CUDA device a rank uses, and what is wrong with CUDA_VISIBLE_DEVICES. torch's answers are set by hand."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dtrain.distributed import cuda_devices
from dtrain.distributed.cuda_devices import device_of, identify, read_mask, why_no_device
from dtrain.distributed.topology import SINGLE, Topology
from dtrain.errors import TopologyError


@pytest.mark.parametrize(
    ("value", "names", "problem"),
    [
        ("0,1", ["0", "1"], None),
        ("3", ["3"], None),
        (" 1 , 0 ", ["1", "0"], None),
        ("1gpu2,2ampere", ["1", "2"], None),  # CUDA reads the number at the beginning
        ("GPU-5d5b,GPU-99", ["GPU-5d5b", "GPU-99"], None),
        ("MIG-c6d4f1ef-42e4", ["MIG-c6d4f1ef-42e4"], None),
        ("", [], None),
        ("-1", [], None),
        ("NoDevFiles", [], None),
        ("0,0", [], "names 0 twice"),
        ("0,00", [], "names 0 twice"),
        ("GPU-a,GPU-a", [], "names GPU-a twice"),
        ("0,-1,2", ["0"], "stops reading at '-1'"),
        ("0,,2", ["0"], "stops reading at an empty entry"),
        ("0,x,2", ["0"], "stops reading at 'x'"),
        ("all", [], "stops reading at 'all'"),
        ("0,GPU-5d5b", ["0"], "Do not mix"),
        ("GPU-5d5b,1", ["GPU-5d5b"], "Do not mix"),
        ("cuda:0", [], "stops reading at 'cuda:0'"),
    ],
)
def test_the_mask_is_read_as_cuda_reads_it(value: str, names: list[str], problem: str | None) -> None:
    mask = read_mask(value)

    assert list(mask.names) == names
    assert (mask.problem is None) if problem is None else (problem in str(mask.problem))


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles", "void", "none", " "])
def test_gpus_hidden_on_purpose_are_not_missed(value: str) -> None:
    assert why_no_device(value, 4) is None


def test_a_host_without_a_gpu_computes_on_the_cpu_whatever_the_mask_says() -> None:
    # DeepSpeed's launcher sets the mask on hosts without a GPU too.
    assert [why_no_device(value, 0) for value in (None, "0,1", "0,0")] == [None] * 3


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "This host has 4 GPUs, but torch finds none: its driver"),
        ("0,0", "CUDA_VISIBLE_DEVICES=0,0 leaves no GPU: it names 0 twice"),
        ("7", "there is no GPU 7: this host has 4 GPUs, numbered from 0"),
        ("GPU-beef", "no GPU here has the name GPU-beef: `nvidia-smi -L`"),
        ("MIG-beef", "no GPU here has the name MIG-beef"),
        ("all", "CUDA stops reading at 'all'"),
        ("0,1", "its driver does not work (run nvidia-smi)"),
        ("0,x", "its driver does not work (run nvidia-smi)"),  # without the rest GPU 0 would be left
        ("0,7", "its driver does not work (run nvidia-smi)"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason_and_the_cure(value: str | None, found: str) -> None:
    problem = why_no_device(value, 4)

    assert problem is not None
    assert found in problem
    assert "put CUDA_VISIBLE_DEVICES= before the command" in problem
    assert value is None or "Set CUDA_VISIBLE_DEVICES=0,1,2,3 for all GPUs" in problem


def ranks_of(count: int, mask: str | None, monkeypatch: pytest.MonkeyPatch, *, visible: int) -> list[str]:
    """The device, or the refusal, of each local rank, where torch sees `visible` devices."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    found = []
    for rank in range(count):
        topology = replace(SINGLE, world_size=count, rank=rank, local_rank=rank, local_world_size=count, cuda_mask=mask)
        try:
            found.append(str(device_of(topology)))
        except TopologyError as error:
            found.append(str(error))
    return found


def test_each_local_rank_has_a_device_of_those_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_of(2, "GPU-a,GPU-b", monkeypatch, visible=2) == ["cuda:0", "cuda:1"]
    assert ranks_of(2, "5,7", monkeypatch, visible=2) == ["cuda:0", "cuda:1"]
    assert ranks_of(2, "3", monkeypatch, visible=1) == ["cuda:0", "cuda:0"]  # a mask for each rank, with one device


def test_fewer_devices_than_ranks_are_refused_with_the_mask_and_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    *good, fewer = ranks_of(3, "0,1,x,3", monkeypatch, visible=2)

    assert good == ["cuda:0", "cuda:1"]
    assert fewer == (
        "Local rank 2 has no CUDA device: 3 ranks on this node, 2 devices (CUDA_VISIBLE_DEVICES=0,1,x,3: CUDA stops "
        "reading at 'x'). Start at most one rank per device."
    )
    assert "CUDA_VISIBLE_DEVICES" not in ranks_of(3, None, monkeypatch, visible=2)[2]


def test_a_host_whose_gpus_torch_cannot_use_does_not_fall_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_devices, "count_gpu_files", lambda: 2)
    monkeypatch.setattr(cuda_devices, "has_driver_library", lambda: True)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "it names 0 twice" in ranks_of(1, "0,0", monkeypatch, visible=0)[0]
    assert "its driver does not work" in ranks_of(1, None, monkeypatch, visible=0)[0]
    assert ranks_of(1, "", monkeypatch, visible=0) == ["cpu"]
    monkeypatch.setattr(cuda_devices, "has_driver_library", lambda: False)  # a container that was given no GPU
    assert ranks_of(1, None, monkeypatch, visible=0) == ["cpu"]
    monkeypatch.setattr(cuda_devices, "has_driver_library", lambda: True)
    monkeypatch.setattr("torch.version.cuda", None)  # a torch for CPUs was installed on purpose
    assert ranks_of(1, None, monkeypatch, visible=0) == ["cpu"]


def test_gpus_that_the_kernel_does_not_let_this_job_open_are_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [Path("/dev", name) for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null")]
    monkeypatch.setattr(Path, "iterdir", lambda _folder: iter(files))
    given = ["/dev/nvidia1"]
    monkeypatch.setattr(os, "access", lambda file, _mode: str(file) in given)

    assert cuda_devices.count_gpu_files() == 1
    given.clear()  # Slurm's ConstrainDevices, and a job without --gres
    assert cuda_devices.count_gpu_files() == 0


def test_the_mask_is_read_from_the_environment_once() -> None:
    assert Topology.from_env({"CUDA_VISIBLE_DEVICES": "1,0"}).cuda_mask == "1,0"
    assert Topology.from_env({}).cuda_mask is None
    assert SINGLE.cuda_mask == ""


def properties(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(name="NVIDIA H100", pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0, **fields)


def test_a_gpu_is_told_by_its_uuid_and_a_mig_slice_by_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties(uuid="5d5ba0d6-d33d"))
    # Numbers differ between ranks with different masks, and in containers.
    assert identify(device, "0").key == identify(device, "1").key == identify(device, None).key
    assert identify(device, "0").name == "NVIDIA H100 (GPU-5d5ba0d6-d33d)"
    assert identify(device, "MIG-a,MIG-b").key == identify(device, "MIG-a").key != identify(device, "MIG-b").key
    assert identify(device, None).mask == "not set"

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties())
    assert identify(device, "0").key.endswith("/0:1b:0")

    # Consumer GPUs of AMD all have one UUID.
    found = [properties(uuid="58580000-0000"), properties(uuid="58580000-0000")]
    found[1].pci_bus_id = 0x2B
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda chosen: found[chosen.index])
    assert identify(device, None).key != identify(torch.device("cuda", 1), None).key

    nothing = SimpleNamespace(name="a GPU")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: nothing)
    assert identify(device, None).key != identify(torch.device("cuda", 1), None).key
    assert identify(device, "0").key != identify(device, "1").key
    assert identify(torch.device("cpu"), "0").key == ""


def test_slices_of_one_gpu_in_two_containers_are_not_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = properties(uuid="5d5b")  # both have the UUID of the whole GPU, and no mask
    given.name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: given)
    keys = set()
    for host in ("pod-0", "pod-1", "pod-1"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        keys.add(identify(torch.device("cuda", 0), None).key)

    assert len(keys) == 2

"""Errors of CUDA and NCCL, by texts that users reported: each is named with its cause and cure. No GPU is needed.

A line has the kind, where the text was reported (repository#number on GitHub), and the text.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from dtrain.distributed import node_first
from dtrain.distributed.collectives import is_lost_peer
from dtrain.distributed.device_faults import FAULTS, explain, find_fault
from dtrain.errors import DeviceError

NCCL_2_21 = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, "
RECORDED = [
    (
        "out of memory",
        "pytorch/pytorch#59778",
        "CUDA out of memory. Tried to allocate 2.26 GiB (GPU 0; 6.00 GiB total capacity",
    ),
    (
        "out of memory",
        "pytorch/pytorch#16417",
        "CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of",
    ),
    ("out of memory", "QwenLM/Qwen3#873", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("out of memory", "PKU-YuanGroup/Open-Sora-Plan#386", "enqueue.cc:1085 NCCL WARN Cuda failure 'out of memory'"),
    ("same GPU", "verl-project/verl#161", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10"),
    ("same GPU", "Peterande/D-FINE#289", "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 2000"),
    ("no interface", "codefuse-ai/MFTCoder#31", "Bootstrap : no socket interface found"),
    (
        "no interface",
        "NVIDIA/nccl#1837",
        "ncclSocketInit: connecting to address  with family 59936 is neither AF_INET(2) nor AF_INET6(10)",
    ),
    (
        "shared memory",
        "NVIDIA/nccl#525",
        "include/shm.h:28 NCCL WARN Call to posix_fallocate failed : No space left on device",
    ),
    (
        "shared memory",
        "hiyouga/EasyR1#228",
        "Error while creating shared memory segment /dev/shm/nccl-UmqSM9 (size 7340384)",
    ),
    (
        "shared memory",
        "NVIDIA/nccl-tests#166",
        "NCCL WARN Error: failed to extend /dev/shm/nccl-fjwOOB to 5967876 bytes",
    ),
    ("InfiniBand", "NVIDIA/nccl-tests#185", "NCCL WARN Call to ibv_modify_qp failed with error Network is unreachable"),
    ("InfiniBand", "NVIDIA/nccl#925", "Call to ibv_modify_qp failed with error No such device"),
    ("InfiniBand", "NVIDIA/nccl#562", "ibvwrap.c:130 NCCL WARN Call to ibv_create_qp failed"),
    (
        "InfiniBand",
        "NVIDIA/nccl#1405",
        "NCCL WARN NET/IB : Got completion from peer 10.216.210.236<54862> with status=12 opcode=0 len=0 vendor err 129",
    ),
    ("InfiniBand", "NVIDIA/nccl#1664", "NET/IBP:Got completion from peer 7.6.13.83<36315> with status=12 opcode=32698"),
    ("peer access", "verl-project/verl#1874", "CUDA error: peer access is not supported between these two devices"),
    ("peer access", "ray-project/ray_lightning#24", "NCCL WARN failed to open CUDA IPC handle : 217 peer access"),
    (
        "timeout",
        "NVIDIA/Megatron-LM#1207",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, "
        "Timeout(ms)=600000) ran for 600013 milliseconds before timing out.",
    ),
    (
        "timeout",
        "pytorch/pytorch#64241",
        "NCCL communicator was aborted on rank 1. Original reason for failure was: Work: WorkNCCL(OpType=ALLREDUCE, "
        "TensorShape=[1], Timeout(ms)=2000) timed out in call to wait().",
    ),
    ("ECC", "vllm-project/vllm#5222", "CUDA error: uncorrectable ECC error encountered"),
    ("ECC", "nagadit/DeepFaceLab_Linux#89", "CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered"),
    ("lost GPU", "NVIDIA/open-gpu-kernel-modules#1151", "NVRM: Xid (PCI:0000:06:00): 79, GPU has fallen off the bus."),
    ("lost GPU", "pytorch/pytorch#170045", "Last error: Cuda failure 999 'unknown error'"),
    ("assert", "xhw205/GPLinker_torch#14", "CUDA error: device-side assert triggered"),
    ("assert", "pytorch/pytorch#25537", "block: [0,0,0], thread: [31,0,0] Assertion `t >= 0 && t < n_classes` failed."),
    ("illegal access", "hpcaitech/Open-Sora#694", "CUDA error: an illegal memory access was encountered"),
    (
        "illegal access",
        "InternLM/lmdeploy#3258",
        "Process group watchdog thread terminated with exception: CUDA error: an illegal memory access was encountered",
    ),
    ("ordinal", "pytorch/pytorch#92315", "CUDA error: invalid device ordinal"),
    ("ordinal", "pytorch/pytorch#131650", "device >= 0 && device < num_gpus INTERNAL ASSERT FAILED at CUDAContext.cpp"),
    ("busy", "facebookresearch/detectron2#2580", "CUDA error: all CUDA-capable devices are busy or unavailable"),
    ("busy", "AILab-CVC/YOLO-World#385", "CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ("old driver", "uzh-rpg/rpg_open_remode#9", "CUDA driver version is insufficient for CUDA runtime version"),
    (
        "old driver",
        "yhlleo/DeepSegmentor#31",
        "Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver / cuda driver combination",
    ),
    (
        "old driver",
        "hpcaitech/ColossalAI#4381",
        "CUDA: Error 804: forward compatibility was attempted on non supported HW",
    ),
    (
        "not ready",
        "hiyouga/LlamaFactory#7888",
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    ),
    ("no kernel", "vllm-project/vllm#18835", "CUDA error: no kernel image is available for execution on the device"),
    (
        "forked",
        "facebookresearch/pycls#183",
        "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing",
    ),
    (
        "not deterministic",
        "Lightning-AI/litgpt#2124",
        "Deterministic behavior was enabled, but this operation is not deterministic because it uses CuBLAS",
    ),
    (
        "route",
        "hkproj/pytorch-transformer-distributed#1",
        "NCCL error: unhandled system error\nncclSystemError: System call failed.\nLast error:\n"
        "socketStartConnect: Connect to 192.168.19.14<52822> failed : No route to host",
    ),
    (
        "route",
        "NVIDIA/nccl-tests#166",
        "NCCL WARN Connect to 10.0.0.2<45763> failed : Software caused connection abort",
    ),
    (
        "remote",
        "NVIDIA/nccl#2076",
        NCCL_2_21 + "remote process exited or there was a network error, NCCL version 2.21.5",
    ),
    ("remote", "NVIDIA/nccl#1232", "NCCL WARN socketProgress: Connection closed by remote peer node2<42830>"),
    (
        "NCCL",
        "NVIDIA/nccl#1410",
        "NCCLUtils.hpp:275, unhandled cuda error, NCCL version 2.20.5\nCuda failure 1 'invalid argument'",
    ),
    ("NCCL", "NVIDIA/nccl#207", "NCCL error in: ProcessGroupNCCL.cpp:260, unhandled system error"),
]


@pytest.mark.parametrize(("name", "source", "text"), RECORDED, ids=[f"{name}-{source}" for name, source, _ in RECORDED])
def test_a_recorded_text_is_named_with_its_cause_and_cure(name: str, source: str, text: str) -> None:
    found = find_fault(text)

    assert found is not None, source
    assert found.fault.name == name
    first, shown = found.message.split("\n")
    assert first == f"{found.fault.cause} {found.fault.cure}"
    assert shown in text


def test_every_kind_has_a_recorded_text_and_says_what_to_do() -> None:
    assert {name for name, _, _ in RECORDED} == {fault.name for fault in FAULTS}
    for fault in FAULTS:
        assert fault.cause.endswith(".")
        assert fault.cure.endswith(".")
        assert "\n" not in fault.cause + fault.cure
        assert fault.exit_code in (1, 4)


def test_of_several_lines_the_one_that_says_why_is_shown() -> None:
    text = f"{NCCL_2_21}invalid usage\nncclInvalidUsage: This usually reflects\nLast error:\nDuplicate GPU detected : rank 1 and\nframe #0"

    found = find_fault(text)

    assert found is not None
    assert (found.fault.name, found.line) == ("same GPU", "Duplicate GPU detected : rank 1 and")


def test_what_nccl_says_last_is_shown_where_the_table_does_not_have_it() -> None:
    text = f"{NCCL_2_21}unhandled system error\nncclSystemError: System call failed.\nLast error:\nnvmlInit_v2() failed: 999\nframe #0"

    found = find_fault(text)

    assert found is not None
    assert (found.fault.name, found.line) == ("NCCL", "nvmlInit_v2() failed: 999")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: invalid device ordinal",  # of .to("cuda:7")
        "Found no NVIDIA driver on your system. CUDA",  # of .cuda()
        "CUDA error: no kernel image is available for execution on the device",  # of a library of kernels
        "NCCL error: unhandled system error",
    ],
)
def test_what_a_task_of_the_users_may_have_caused_keeps_its_traceback(text: str) -> None:
    assert getattr(explain(RuntimeError(text)), "is_bug", None) is True


UNRELATED = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection reset by peer"),  # of gloo, which has its own message
    RuntimeError("GET https://host/cuda/data.txt: Connection reset by peer"),  # of a task's own loader
    RuntimeError("cuda-3.example.org: Network is unreachable"),
    ValueError("CUDA error: device-side assert triggered"),  # a text about the error, by other code
    KeyError("NCCL error"),
]


@pytest.mark.parametrize("error", UNRELATED, ids=str)
def test_another_error_keeps_its_own_text(error: BaseException) -> None:
    assert explain(error) is None


def test_an_error_is_replaced_and_kept_as_the_cause() -> None:
    ecc = torch.distributed.DistBackendError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")

    explained = explain(ecc)

    assert isinstance(explained, DeviceError)
    assert explained.__cause__ is ecc
    assert (explained.exit_code, explained.is_bug) == (1, False)
    assert "hostfile" in str(explained).splitlines()[0]
    memory = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert "train.micro_batch_size lower" in str(memory)
    assert getattr(explain(RuntimeError("CUDA error: device-side assert triggered")), "is_bug", None) is True


@pytest.mark.parametrize("name", ["remote", "timeout"])
def test_a_lost_rank_is_looked_for_only_where_the_text_says_that_a_connection_ended(name: str) -> None:
    for kind, source, text in RECORDED:
        if kind == name and "Watchdog" not in text:
            assert is_lost_peer(RuntimeError(text)), source
    assert not is_lost_peer(RuntimeError("CUDA error: uncorrectable ECC error encountered"))


class Store:
    """The part of a store that work of a node uses when it fails."""

    def __init__(self) -> None:
        self.end = ""

    def compare_set(self, _key: str, _expected: str, value: str) -> None:
        self.end = value

    def add(self, _key: str, _amount: int) -> int:
        return 1


def test_a_fault_in_work_that_one_rank_does_for_its_node_is_named_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_first, "_wait_for_readers", lambda _work: None)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    store = Store()
    work = SimpleNamespace(store=store, rank=0, end_key="end", readers_key="readers")
    with pytest.raises(torch.OutOfMemoryError):
        node_first._publish_result(work, full)  # type: ignore[arg-type]

    told = json.loads(store.end)
    assert told["error"] == "DtrainError"
    assert told["message"].startswith(
        "Rank 0 failed in the work of its node: The memory of the GPU is full. Set train.micro"
    )

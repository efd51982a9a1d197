"""Explains errors of CUDA, its driver and NCCL: what happened, why, and what to do, in one line.

Their texts name a call, not a cause. The table has the texts that were found in reports of users; tests/distributed/
test_device_faults.py has one of each with its source. A text that is not in the table keeps its traceback.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from dtrain.errors import DeviceError, DtrainError, TopologyError

NETWORK = TopologyError.exit_code
HERE = DtrainError.exit_code
RESUME = "The same command goes on from the last checkpoint."


class DeviceFault(NamedTuple):
    """A kind of fault.

    Attributes:
        name: short name, unique.
        pattern: regular expression that finds it in an error's text.
        cause: what happened and why; a sentence.
        cure: what to do; sentences.
        exit_code: the exit code of the process that ends with it.
        is_bug: whether the code or the data may be wrong, so that the traceback is shown too.
        only_nccl: whether the pattern is also in errors of others, so that the text must name NCCL.
    """

    name: str
    pattern: str
    cause: str
    cure: str
    exit_code: int = HERE
    is_bug: bool = False
    only_nccl: bool = False


MEMORY_CURE = (
    "Set train.micro_batch_size lower (in an evaluation evaluation.micro_batch_size), data.max_length lower, "
    "model.gradient_checkpointing=true or engine.precision=bf16. If nvidia-smi shows another process on this GPU, end that."
)

FAULTS = (
    # The cause first. NCCL wraps it into "unhandled cuda error" and the like, which stand at the end.
    DeviceFault(
        "out of memory",
        r"CUDA out of memory|CUDA error: out of memory|(?:CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|[Cc]uda failure (?:2 )?'out of memory'",
        "The memory of the GPU is full.",
        MEMORY_CURE,
    ),
    DeviceFault(
        "same GPU",
        r"Duplicate GPU detected",
        "Two ranks use one GPU, and NCCL needs one for each.",
        "Start at most one rank per GPU, each with a CUDA_VISIBLE_DEVICES of its own or all with the same. NCCL counts MIG "
        "slices of one GPU as that GPU: start one rank for it.",
        NETWORK,
    ),
    DeviceFault(
        "no interface",
        r"no socket interface found|NCCL_SOCKET_IFNAME interface found|ncclSocketInit: connecting to address\s+with family",
        "NCCL finds no network interface of the name in NCCL_SOCKET_IFNAME on this host or another.",
        "Run `unset NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME` on all hosts: dtrain then chooses the interface. Or set it to a "
        "name that `ip -brief address` shows on every host.",
        NETWORK,
    ),
    DeviceFault(
        "shared memory",
        r"posix_fallocate failed ?: No space left|shared memory segment|failed to extend /dev/shm",
        "/dev/shm is full, or too small for NCCL.",
        "Give the container more (docker run --shm-size=8g, on Kubernetes an emptyDir with medium: Memory at /dev/shm), and "
        "remove what dead jobs left in /dev/shm/nccl-*. NCCL_SHM_DISABLE=1 does without it, but is slower.",
        NETWORK,
    ),
    DeviceFault(
        "InfiniBand",
        r"\bibv_\w+\W.*failed|NET/IBP? ?: ?Got (?:completion|async event)|NET/IB : Unable to",
        "InfiniBand or RoCE between two hosts does not work.",
        "Look at `ibstat` and the cables, the GID (NCCL_IB_GID_INDEX) and, in a container, the limit of locked memory (ulimit -l "
        "unlimited). NCCL_IB_DISABLE=1 uses TCP instead, which is slower.",
        NETWORK,
    ),
    DeviceFault(
        "peer access",
        r"peer access is not supported|failed to open CUDA IPC handle",
        "Two GPUs of this host cannot read each other's memory directly.",
        "Set NCCL_P2P_DISABLE=1: NCCL then copies through the host's memory. A virtual machine or a container may hide the "
        "connection (`nvidia-smi topo -m`).",
    ),
    DeviceFault(
        "timeout",
        r"Watchdog caught collective operation timeout|ran for \d+ milliseconds before timing out|timed out in call to wait\(\)",
        "A collective did not finish in time: another rank did not join it, or the network lost its data.",
        "Look at the ranks that did not report this error, and at hang-stacks.txt in the run folder. If all computed, test the "
        "network with `dtrain doctor`. " + RESUME,
        NETWORK,
    ),
    DeviceFault(
        "ECC",
        r"uncorrectable ECC error|CUDA_ERROR_ECC_UNCORRECTABLE|NVLink error|Uncorrectable NVLink|\bXid\b.*\b(?:48|63|64|74|94|95)\b",
        "The GPU's hardware failed: an error in its memory or links that could not be corrected.",
        "Take this host out of the hostfile, or leave out the GPU that `nvidia-smi -q -d ECC` names (CUDA_VISIBLE_DEVICES). A "
        "reset or reboot may clear it; if it comes back, the GPU is broken. " + RESUME,
    ),
    DeviceFault(
        "lost GPU",
        r"fallen off the bus|GPU is lost|CUDA error: (?:unknown error|unspecified launch failure|the launch timed out)"
        r"|[Cc]uda failure (?:999 )?'unknown error'|CUDA error: hardware stack error",
        "The GPU stopped working: it fell off the bus, its driver was reset, or a kernel crashed.",
        "Run `dmesg | grep -i xid` on this host: Xid 79 is power, heat or the slot. Reboot the host or leave it out of the "
        "hostfile. " + RESUME,
    ),
    DeviceFault(
        "assert",
        r"device-side assert triggered|Assertion `.*` failed",
        "A value is outside the range that the model has: mostly a label, a token id or a position.",
        "Run the same command on the CPU (CUDA_VISIBLE_DEVICES= before it), which names the line and the value.",
        is_bug=True,
    ),
    DeviceFault(
        "illegal access",
        r"illegal memory access|misaligned address|an illegal instruction was encountered",
        "A kernel accessed memory that is not its own: a bug in a kernel, or a faulty GPU.",
        "Run again with CUDA_LAUNCH_BLOCKING=1, which shows the call. model.compile=false, model.unpad=off and "
        "another host show which part it is.",
        is_bug=True,
    ),
    DeviceFault(
        "ordinal",
        r"invalid device ordinal|device >= 0 && device < num_gpus",
        "The program asked for a GPU that this process does not see.",
        "Compare CUDA_VISIBLE_DEVICES with `nvidia-smi -L`, and start at most one rank per visible GPU. Of several MIG slices a "
        "process sees the first.",
        NETWORK,
        is_bug=True,
    ),
    DeviceFault(
        "busy",
        r"devices? ?(?:\(s\))? ?(?:are|is|is/are) busy or unavailable",
        "The GPU takes no further process: it is in exclusive mode, or another process holds it.",
        "Look at the processes in nvidia-smi. `nvidia-smi -c DEFAULT` (as root) ends the exclusive mode.",
    ),
    DeviceFault(
        "old driver",
        r"driver version is insufficient|NVIDIA driver on your system is too old|Error 80[34]\b|unsupported display driver"
        r"|forward compatibility was attempted",
        "The driver of this host does not fit torch's CUDA.",
        "Install a newer NVIDIA driver, or a torch for the CUDA version that nvidia-smi shows (https://pytorch.org). After an "
        "update of the driver, reboot.",
        NETWORK,
    ),
    DeviceFault(
        "not ready",
        r"Error 802\b|system not yet initialized|no CUDA-capable device is detected|Found no NVIDIA driver",
        "CUDA finds no GPU that is ready.",
        "Run nvidia-smi on this host. With NVSwitch start the fabric manager (systemctl start nvidia-fabricmanager); in a container "
        "add --gpus all. To use the CPU, set CUDA_VISIBLE_DEVICES= before the command.",
        NETWORK,
        is_bug=True,
    ),
    DeviceFault(
        "no kernel",
        r"no kernel image is available",
        "This torch, or a library of kernels that the model uses, was not built for this GPU.",
        "Install a torch whose list of architectures (python -c 'import torch; print(torch.cuda.get_arch_list())') has this "
        "GPU's. To use the CPU, set CUDA_VISIBLE_DEVICES= before the command.",
        is_bug=True,
    ),
    DeviceFault(
        "forked",
        r"Cannot re-initialize CUDA in forked subprocess",
        "A data worker used CUDA.",
        "In a task or data set of your own, make tensors on the CPU, or set data.workers=0.",
        is_bug=True,
    ),
    DeviceFault(
        "not deterministic",
        r"does not have a deterministic implementation|not deterministic because it uses CuBLAS",
        "engine.bitwise=true, and the model uses a CUDA kernel that has no fixed order of additions.",
        "Set engine.bitwise=false, or use a model without that operation.",
        is_bug=True,
    ),
    # Then what only says that something outside this rank failed.
    DeviceFault(
        "route",
        r"Connect to \S+ failed ?: ?(?:No route to host|Connection timed out|Connection refused|Software caused)"
        r"|Network is unreachable",
        "NCCL cannot reach another host: a firewall, or the wrong interface.",
        "Open all TCP ports between the hosts. If they have several networks, set NCCL_SOCKET_IFNAME to the one they share. "
        "`dtrain doctor` tests every pair.",
        NETWORK,
        only_nccl=True,
    ),
    DeviceFault(
        "remote",
        r"remote process exited or there was a network error|ncclRemoteError|Connection closed by remote peer"
        r"|NCCL communicator was aborted|Connection reset by peer",
        "NCCL lost another rank: that rank ended, or the network failed.",
        "Look for the rank that reported another error first; without one, test the network with `dtrain doctor`. "
        + RESUME,
        NETWORK,
        only_nccl=True,
    ),
    DeviceFault(
        "NCCL",
        r"unhandled (?:system|cuda) error|ncclInternalError|ncclInvalidUsage|ncclSystemError|NCCL error",
        "NCCL failed, for a reason that is not in dtrain's table.",
        "Run again with NCCL_DEBUG=WARN: a line with `NCCL WARN` then names the cause.",
        NETWORK,
        is_bug=True,
    ),
)
"""The first pattern that matches is the one."""


@dataclass(frozen=True)
class FoundFault:
    """A fault in a text: its kind, and the line that shows it."""

    fault: DeviceFault
    line: str

    @property
    def message(self) -> str:
        """What happened and what to do, in one line; then the line that was found."""
        return f"{self.fault.cause} {self.fault.cure}\n{self.line}"


def find_fault(text: str) -> FoundFault | None:
    """Returns the fault that a text of CUDA or NCCL shows; None if the table does not have it."""
    for fault in FAULTS:
        match = re.search(fault.pattern, text)
        if match is not None and (not fault.only_nccl or "nccl" in text.lower()):
            if fault.name == "NCCL":  # what failed is in the line after this one, if NCCL knows it
                match = re.search(r"Last error:[ \t]*\n[ \t]*(\S)", text) or match
            first = match.start(match.lastindex or 0)
            start, end = text.rfind("\n", 0, first) + 1, text.find("\n", match.end())
            return FoundFault(fault, text[start : end if end >= 0 else None].strip())
    return None


def is_from_device(error: BaseException) -> bool:
    """Returns whether an error is of CUDA or NCCL: another one may quote their words."""
    text = str(error)
    signs = ("CUDA", "Cuda", "NCCL", "nccl", "CuBLAS", "cuda", "deterministic implementation")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def explain(error: BaseException) -> DeviceError | None:
    """Returns the error to report instead of one of CUDA or NCCL; None for any other error."""
    found = find_fault(str(error)) if is_from_device(error) else None
    if found is None:
        return None
    explained = DeviceError(found.message, found.fault.exit_code)
    explained.is_bug = found.fault.is_bug
    explained.__cause__ = error
    return explained

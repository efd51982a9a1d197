"""Which CUDA device a rank uses, and why a GPU of this host cannot be used: CUDA_VISIBLE_DEVICES, the driver, MIG.

torch is imported when used. Whether two ranks have one GPU is checked by job/rank_checks.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dtrain.distributed.process_info import boot_id
from dtrain.errors import TopologyError

if TYPE_CHECKING:
    import torch

    from dtrain.distributed.topology import Topology

MASK = "CUDA_VISIBLE_DEVICES"
HIDING = ("", "-1", "NoDevFiles", "none", "void")
"""Values that hide all GPUs on purpose: set by hand, by Slurm (NoDevFiles), and by NVIDIA's container runtime."""

TO_CPU = f"To use the CPU, put {MASK}= before the command."


class Mask(NamedTuple):
    """CUDA_VISIBLE_DEVICES as CUDA reads it.

    Attributes:
        names: the devices before the first one that CUDA does not accept.
        problem: why it is not read to its end, or hides everything; None if nothing is wrong.
    """

    names: Sequence[str]
    problem: str | None


def read_mask(value: str) -> Mask:
    """Reads CUDA_VISIBLE_DEVICES by CUDA's rules: a device twice hides all, and an unknown one ends the list. Pure."""
    if value.strip() in HIDING:
        return Mask([], None)
    names: list[str] = []
    kind = next((prefix for prefix in ("GPU-", "MIG-") if value.startswith(prefix)), "")
    for name in (part.strip() for part in value.split(",")):
        number = re.match(r"\+?\d+", name)
        if not (name.startswith(kind) if kind else number):
            found = "an empty entry" if not name else f"{name!r}"
            also = "Do not mix numbers, GPU- and MIG- names. " if re.match(r"GPU-|MIG-|\d", name) else ""
            return Mask(names, f"CUDA stops reading at {found}. {also}".strip())
        read = name if kind or number is None else str(int(number[0]))
        if read in names:
            return Mask([], f"it names {read} twice, and CUDA then hides all GPUs.")
        names.append(read)
    return Mask(names, None)


def device_of(topology: Topology) -> torch.device:
    """Returns the device of this rank: its CUDA device, which becomes the current one, or the CPU.

    Raises:
        TopologyError: more ranks on this node than CUDA devices; or the host has GPUs that torch cannot use, and nobody has
            asked for the CPU.
    """
    import torch

    if not torch.cuda.is_available():
        gpus = count_gpu_files() if torch.version.cuda is not None and has_driver_library() else 0
        if (problem := why_no_device(topology.cuda_mask, gpus)) is not None:
            raise TopologyError(problem)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # One visible device for several ranks: the launcher assigns a device to each rank (srun --gpus-per-task).
    index = 0 if count == 1 else topology.local_rank
    if index >= count:
        raise TopologyError(
            f"Local rank {topology.local_rank} has no CUDA device: {topology.local_world_size} ranks on this node, "
            f"{count} devices{_mask_text(topology.cuda_mask)}. Start at most one rank per device."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def why_no_device(value: str | None, gpus: int) -> str | None:
    """Returns why torch finds no GPU although this host has some; None if it has none, or the user has hidden them. Pure.

    Args:
        value: CUDA_VISIBLE_DEVICES; None where it is not set.
        gpus: number of GPUs of this host, visible or not.
    """
    if gpus == 0 or (value is not None and value.strip() in HIDING):
        return None
    if value is None:
        return (
            f"This host has {_count(gpus)}, but torch finds none: its driver does not work or does not fit torch's CUDA. Run "
            f"nvidia-smi, and compare its CUDA version with torch.version.cuda. {TO_CPU}"
        )
    mask = read_mask(value)
    first = mask.names[0] if mask.names else None  # what follows it can only take further GPUs away
    if first is None and mask.problem is not None:
        problem = mask.problem
    elif first is not None and first.isdecimal() and int(first) >= gpus:
        problem = f"there is no GPU {first}: this host has {_count(gpus)}, numbered from 0."
    elif first is not None and first.startswith(("GPU-", "MIG-")):
        problem = f"no GPU here has the name {first}: `nvidia-smi -L` lists the names."
    else:
        problem = f"this host has {_count(gpus)}, but its driver does not work (run nvidia-smi)."
    cure = f"Set {MASK}={','.join(map(str, range(gpus)))} for all GPUs, or unset it."
    return f"{MASK}={value} leaves no GPU: {problem} {cure} {TO_CPU}"


def count_gpu_files() -> int:
    """Returns the number of NVIDIA GPUs that the kernel lets this process open, whatever CUDA may use.

    A batch system shows a job that asked for no GPU the files of the host's GPUs, and does not let it open them.
    """
    try:
        files = [file for file in Path("/dev").iterdir() if re.fullmatch(r"nvidia\d+", file.name)]
    except OSError:
        return 0
    return sum(os.access(file, os.R_OK | os.W_OK) for file in files)


def has_driver_library() -> bool:
    """Returns whether the driver's library is here. A container that was given no GPU lacks it, even where it sees all of /dev."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class GpuIdentity(NamedTuple):
    """Which physical GPU a rank uses; equal for two ranks only if they use the same one.

    Attributes:
        key: UUID and PCI address of the GPU, or the MIG slice; where they do not tell it, host and number; "" on the CPU.
        name: what to call it in a message.
        mask: CUDA_VISIBLE_DEVICES of the rank; "not set" without.
    """

    key: str
    name: str
    mask: str


def identify(device: torch.device, cuda_mask: str | None) -> GpuIdentity:
    """Returns the identity of a rank's device. The UUID is the same in every container and under every mask."""
    mask = "not set" if cuda_mask is None else cuda_mask
    if device.type != "cuda":
        return GpuIdentity("", "the CPU", mask)
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = str(getattr(properties, "uuid", ""))
    pci = ":".join(f"{getattr(properties, f'pci_{part}_id', 0):x}" for part in ("domain", "bus", "device"))
    has_pci = hasattr(properties, "pci_bus_id")
    # CUDA gives a MIG slice the UUID of the whole GPU. A process sees only the first slice of its mask.
    if mask.startswith("MIG-"):
        uuid = key = mask.split(",")[0]
    elif " MIG " in f"{properties.name} ":  # two containers may each have a slice of one GPU, and no mask
        key = f"{uuid}/{pci}/{socket.gethostname()}"
    elif uuid or has_pci:
        # Some GPUs of AMD all have one UUID. A PCI address is that of the host, in its containers too.
        key = f"{uuid or boot_id()}/{pci}"
    else:
        key = f"{boot_id()}/{socket.gethostname()}/{mask}/{device.index}"
    shown = uuid if uuid.startswith("MIG-") else f"GPU-{uuid}" if uuid else f"PCI {pci}"
    return GpuIdentity(key, f"{properties.name} ({shown})", mask)


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def _mask_text(value: str | None) -> str:
    if not value:
        return ""
    problem = read_mask(value).problem
    first_mig = " Of several MIG slices a process sees the first: give each rank its own." if "MIG-" in value else ""
    return f" ({MASK}={value}{f': {problem}' if problem else ''}{first_mig})".replace(".)", ")")

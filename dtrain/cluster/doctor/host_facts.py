"""What the doctor wants to know of a host besides what a job needs: limits, room, network, devices.

Sent to the host with probe.py and agent.py: standard library only. A thing that cannot be found out is None.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B
"""Linux: an interface's IPv4 address, and its mask."""

VIRTUAL = ("virtio_net", "hv_netvsc", "vmxnet3", "xen_netfront", "vif", "ena", "gve")
"""Drivers of network cards that a virtual machine is given."""

NVIDIA_SMI_S, TORCH_S = 20.0, 60.0
"""How long a tool may take; a driver that hangs is a finding."""

DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Of NVIDIA's driver, of Windows' for Linux, of AMD's: signs that it is worth the while to ask torch."""

DEVICES_OF_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({
    "names": [torch.cuda.get_device_name(device) for device in range(count)],
    "cuda": torch.version.cuda or torch.version.hip,
    "usable": count,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if count else None,
}))
"""


def details(asked: dict[str, Any]) -> dict[str, Any]:
    """Everything, for one host. asked: output_dir, where runs are to be written."""
    return {
        "own_address": address_of(socket.gethostname()),
        "machine": this_machine(),
        "open_files": soft_and_hard(resource.RLIMIT_NOFILE),
        "locked_memory": soft_and_hard(resource.RLIMIT_MEMLOCK),
        "shm": room("/dev/shm") if Path("/dev/shm").is_dir() else None,
        "runs": room(asked["output_dir"]),
        "hf_cache": room(hub_cache()),
        "memory": memory(),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "gpus": gpus(),
    }


def address_of(name: str) -> str | None:
    """The IPv4 address that a name has on this host."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def this_machine() -> str:
    """Different for two machines, and for two containers of one."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/net").readlink()),
        ]
    return " ".join(found)


def soft_and_hard(limit: int) -> list[int | None]:
    """A limit of this process, as a job's would be; None for none."""
    return [None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(limit)]


def room(path: str) -> dict[str, Any] | None:
    """The file system that a path lies or would lie on, in bytes; None where there is no such folder and none above.

    `problem` alone where it cannot be looked at: a network file system whose server has gone, a folder that is closed.
    """
    folder = Path(path)
    try:
        while not folder.exists():
            if folder == folder.parent:
                return None
            folder = folder.parent
        found = os.statvfs(folder)
    except OSError as error:
        return {"path": str(folder), "problem": error.strerror or str(error)}
    return {
        "path": str(folder),
        "total": found.f_blocks * found.f_frsize,
        "free": found.f_bavail * found.f_frsize,
        "writable": os.access(folder, os.W_OK) and not found.f_flag & os.ST_RDONLY,
    }


def hub_cache() -> str:
    """Where Hugging Face's libraries keep what they fetch, by their own rules."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return str(Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser())


def memory() -> dict[str, int] | None:
    """Bytes in all and available, after the control group's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, available = found["MemTotal"], found.get("MemAvailable", found["MemFree"])
    for folder in control_groups("memory"):
        limit = number_in(folder / "memory.max") or number_in(folder / "memory.limit_in_bytes")
        used = number_in(folder / "memory.current") or number_in(folder / "memory.usage_in_bytes") or 0
        if limit is not None and limit < total:
            total, available = limit, min(available, max(limit - used, 0))
    return {"total": total, "available": available}


def control_groups(controller: str) -> list[Path]:
    """The folders of this process's control group and of all above it, as far as they can be seen from here."""
    root, found = Path("/sys/fs/cgroup"), []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / controller if controllers else root
            folder = top / name.lstrip("/")
            found += [top, *(each for each in (folder, *folder.parents) if top in each.parents)]
    return [folder for folder in found if folder.is_dir()]


def number_in(file: Path) -> int | None:
    """What a file of one number says."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def gpus() -> dict[str, Any] | None:
    """The devices that torch sees here, or that there are without it; None where there is no sign of any.

    Ranks see what torch sees: it decides, and the driver's own tool only tells the driver, and names where torch sees none.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None and not any(Path(file).exists() for file in DEVICE_FILES):
        return None
    found = devices_of_torch()
    names, driver = devices_of_driver(tool)
    if not found.get("usable") and not names and "driver_problem" not in driver:
        return None  # a tool or a device file without a device, such as that of a processor's own graphics
    return {**driver, **found, "names": found.get("names") or names}


def devices_of_driver(tool: str | None) -> tuple[list[str], dict[str, str]]:
    """NVIDIA's devices by nvidia-smi, and `driver`; or `driver_problem`, why it cannot be told where it should."""
    if tool is None:
        has_driver = Path(DEVICE_FILES[0]).exists()
        return [], {"driver_problem": "nvidia-smi is not on the PATH"} if has_driver else {}
    command = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], {"driver_problem": f"nvidia-smi: {error}"}
    if ended.returncode:
        said = (ended.stdout + ended.stderr).strip().splitlines() or ["without a word"]
        # Installed with its driver's package on a machine that has none of the devices.
        is_none = "No devices" in said[0]
        return [], {} if is_none else {"driver_problem": f"nvidia-smi ended with {ended.returncode}: {said[0]}"}
    lines = [[word.strip() for word in line.split(",")] for line in ended.stdout.splitlines()]
    rows = [row for row in lines if len(row) == 3]  # it may add a warning
    return [row[0] for row in rows], {"driver": rows[0][1]} if rows else {}


def devices_of_torch() -> dict[str, Any]:
    """What the torch here sees, in a process of its own: it may take long, or die."""
    command = [sys.executable, "-B", "-c", DEVICES_OF_TORCH]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"torch_problem": str(error)}
    try:
        found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        said = ended.stderr.strip().splitlines() or ["without a word"]
        return {"torch_problem": f"torch there: {said[-1]}"}
    return found


def way_to(address: str) -> dict[str, Any]:
    """How this host talks to an address: from which of its own, on which interface. Nothing is sent.

    Raises:
        OSError: there is no way.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own = str(probe.getsockname()[0])
    name = next((name for _, name in socket.if_nameindex() if ioctl_address(name, SIOCGIFADDR) == own), None)
    found: dict[str, Any] = {"address": own, "interface": name, "mtu": None, "speed_mbit": None, "network": None}
    found["is_line"] = False
    if name is not None:
        folder = Path("/sys/class/net") / name
        speed = number_in(folder / "speed")
        found["mtu"] = number_in(folder / "mtu")
        found["speed_mbit"] = speed if speed is not None and speed > 0 else None
        found["network"] = network_of(own, ioctl_address(name, SIOCGIFNETMASK))
        found["is_line"] = is_line(folder)
    return found


def is_line(interface: Path) -> bool:
    """Whether an interface's rate is that of a line: a container's or a virtual machine's only says a large number."""
    driver = (interface / "device" / "driver").resolve().name
    return (interface / "bonding").exists() or ((interface / "device").exists() and driver not in VIRTUAL)


def network_of(address: str, mask: str | None) -> str | None:
    """Such as 10.0.0.0/24."""
    if mask is None:
        return None
    bits = struct.unpack("!I", socket.inet_aton(mask))[0]
    first = struct.unpack("!I", socket.inet_aton(address))[0] & bits
    return f"{socket.inet_ntoa(struct.pack('!I', first))}/{bits.bit_count()}"


def ioctl_address(interface: str, request: int) -> str | None:
    """What the kernel says of an interface."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), request, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # no IPv4 address, or not Linux
            return None
    return socket.inet_ntoa(answer[20:24])

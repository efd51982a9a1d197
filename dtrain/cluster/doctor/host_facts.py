"""Collects the facts about a host that only the doctor needs: limits, disks, memory, network, GPUs.

Sent to the host with probe.py and agent.py, so it uses the standard library only. An unknown fact is None.
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
"""Linux ioctls: an interface's IPv4 address, and its netmask."""

VIRTUAL_DRIVERS = ("virtio_net", "hv_netvsc", "vmxnet3", "xen_netfront", "vif", "ena", "gve")
"""Drivers of virtual machines' network cards."""

NVIDIA_SMI_TIMEOUT_S, TORCH_TIMEOUT_S = 20.0, 60.0
"""Time limits of these tools; a driver that hangs is a finding."""

DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Device files of NVIDIA's driver, of Windows' for Linux and of AMD's. If there is one, torch is asked for devices."""

TORCH_QUERY = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({
    "names": [torch.cuda.get_device_name(device) for device in range(count)],
    "cuda": torch.version.cuda or torch.version.hip,
    "usable": count,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if count else None,
}))
"""


def collect_doctor_facts(order: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts about this host.

    Args:
        order: `output_dir`, where runs are written.
    """
    return {
        "own_address": resolve_address(socket.gethostname()),
        "machine": network_machine_id(),
        "open_files": read_limit(resource.RLIMIT_NOFILE),
        "locked_memory": read_limit(resource.RLIMIT_MEMLOCK),
        "shm": disk_space("/dev/shm") if Path("/dev/shm").is_dir() else None,
        "runs": disk_space(order["output_dir"]),
        "hf_cache": disk_space(hub_cache()),
        "memory": read_memory(),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "gpus": find_gpus(),
    }


def resolve_address(name: str) -> str | None:
    """Returns the IPv4 address that a name has on this host."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def network_machine_id() -> str:
    """Returns an ID that differs between machines, and between containers of one machine."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/net").readlink()),
        ]
    return " ".join(parts)


def read_limit(limit: int) -> list[int | None]:
    """Returns the soft and the hard value of a limit of this process, which a job has too; None for no limit."""
    return [None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(limit)]


def disk_space(path: str) -> dict[str, Any] | None:
    """Describes the file system of a path, or of the nearest existing folder above it.

    Returns:
        The folder's `path`, `total` and `free` in bytes, and `writable`. Only `path` and `problem` if the folder cannot
        be accessed, such as on a network file system without a server. None if no folder exists.
    """
    folder = Path(path)
    try:
        while not folder.exists():
            if folder == folder.parent:
                return None
            folder = folder.parent
        status = os.statvfs(folder)
    except OSError as error:
        return {"path": str(folder), "problem": error.strerror or str(error)}
    return {
        "path": str(folder),
        "total": status.f_blocks * status.f_frsize,
        "free": status.f_bavail * status.f_frsize,
        "writable": os.access(folder, os.W_OK) and not status.f_flag & os.ST_RDONLY,
    }


def hub_cache() -> str:
    """Returns the folder where Hugging Face's libraries cache downloads, by their own rules."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return str(Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser())


def read_memory() -> dict[str, int] | None:
    """Returns `total` and `available` memory in bytes, within the control group's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, available = values["MemTotal"], values.get("MemAvailable", values["MemFree"])
    for folder in control_groups("memory"):
        limit = read_number(folder / "memory.max") or read_number(folder / "memory.limit_in_bytes")
        used = read_number(folder / "memory.current") or read_number(folder / "memory.usage_in_bytes") or 0
        if limit is not None and limit < total:
            total, available = limit, min(available, max(limit - used, 0))
    return {"total": total, "available": available}


def control_groups(controller: str) -> list[Path]:
    """Returns the folders of this process's control group and of its visible parents."""
    root, folders = Path("/sys/fs/cgroup"), []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / controller if controllers else root
            folder = top / name.lstrip("/")
            folders += [top, *(each for each in (folder, *folder.parents) if top in each.parents)]
    return [folder for folder in folders if folder.is_dir()]


def read_number(file: Path) -> int | None:
    """Returns the number in a file; None if there is none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def find_gpus() -> dict[str, Any] | None:
    """Describes the GPUs that torch sees here, or that exist without being usable; None if there is no sign of any.

    Ranks use what torch sees. The driver's tool adds the driver's version, and the names of GPUs that torch does not see.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None and not any(Path(file).exists() for file in DEVICE_FILES):
        return None
    devices = query_torch()
    names, driver = query_driver(tool)
    if not devices.get("usable") and not names and "driver_problem" not in driver:
        return None  # a tool or a device file without a GPU, such as that of a processor's integrated graphics
    return {**driver, **devices, "names": devices.get("names") or names}


def query_driver(tool: str | None) -> tuple[list[str], dict[str, str]]:
    """Returns the names of NVIDIA's GPUs by nvidia-smi, and `driver`, its version.

    Instead of `driver`, the dictionary has `driver_problem` if the driver's version should be known, but is not.
    """
    if tool is None:
        has_driver = Path(DEVICE_FILES[0]).exists()
        return [], {"driver_problem": "nvidia-smi is not on the PATH"} if has_driver else {}
    command = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], {"driver_problem": f"nvidia-smi: {error}"}
    if result.returncode:
        output = (result.stdout + result.stderr).strip().splitlines() or ["no error message"]
        # The driver's package may be installed on a machine without a GPU.
        has_no_devices = "No devices" in output[0]
        problem = f"nvidia-smi exited with code {result.returncode}: {output[0]}"
        return [], {} if has_no_devices else {"driver_problem": problem}
    lines = [[word.strip() for word in line.split(",")] for line in result.stdout.splitlines()]
    rows = [row for row in lines if len(row) == 3]  # nvidia-smi may add a warning
    return [row[0] for row in rows], {"driver": rows[0][1]} if rows else {}


def query_torch() -> dict[str, Any]:
    """Returns the GPUs that torch sees here, or `torch_problem`. In a separate process, as torch may hang or crash."""
    command = [sys.executable, "-B", "-c", TORCH_QUERY]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"torch_problem": str(error)}
    try:
        devices: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        stderr = result.stderr.strip().splitlines() or ["no error message"]
        return {"torch_problem": stderr[-1]}
    return devices


def find_route(address: str) -> dict[str, Any]:
    """Describes how this host reaches an address. Sends nothing.

    Returns:
        `address`, the host's own on that route; `interface`, its name; `mtu` in bytes; `speed_mbit`, its line rate;
        `network`, such as 10.0.0.0/24; `is_physical`, whether the line rate is real. None for what is unknown.

    Raises:
        OSError: there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        local_address = str(probe.getsockname()[0])
    names = (name for _, name in socket.if_nameindex() if interface_address(name, SIOCGIFADDR) == local_address)
    name = next(names, None)
    route: dict[str, Any] = {
        "address": local_address,
        "interface": name,
        "mtu": None,
        "speed_mbit": None,
        "network": None,
    }
    route["is_physical"] = False
    if name is not None:
        folder = Path("/sys/class/net") / name
        speed = read_number(folder / "speed")
        route["mtu"] = read_number(folder / "mtu")
        route["speed_mbit"] = speed if speed is not None and speed > 0 else None
        route["network"] = network_of(local_address, interface_address(name, SIOCGIFNETMASK))
        route["is_physical"] = is_physical(folder)
    return route


def is_physical(interface: Path) -> bool:
    """Returns whether an interface's rate is that of a real line. Virtual machines and containers report any number."""
    driver = (interface / "device" / "driver").resolve().name
    is_bond = (interface / "bonding").exists()
    return is_bond or ((interface / "device").exists() and driver not in VIRTUAL_DRIVERS)


def network_of(address: str, mask: str | None) -> str | None:
    """Returns an address's network, such as 10.0.0.0/24."""
    if mask is None:
        return None
    bits = struct.unpack("!I", socket.inet_aton(mask))[0]
    first = struct.unpack("!I", socket.inet_aton(address))[0] & bits
    return f"{socket.inet_ntoa(struct.pack('!I', first))}/{bits.bit_count()}"


def interface_address(interface: str, request: int) -> str | None:
    """Returns the answer to an ioctl about an interface's address."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), request, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # no IPv4 address, or not Linux
            return None
    return socket.inet_ntoa(answer[20:24])

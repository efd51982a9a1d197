"""What the figures depend on: versions, processor, load; and how a process is bound to cores and its CPU time is read."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "transformers", "accelerate", "lightning", "datasets", "tokenizers", "numpy")
QUIET_LOAD = 0.5
"""Load average, over one minute, up to which the machine counts as free before a start."""


def versions() -> dict[str, str]:
    """Returns the version of Python and of each package, or "not installed"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def describe() -> dict[str, Any]:
    """Returns processor, cores, memory and load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def commit() -> str:
    """Returns the short commit of the tree, with "+" after it if files have changed; "unknown" outside git."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def load_warning() -> str | None:
    """Returns a sentence if other processes keep the machine busy."""
    load = os.getloadavg()[0]
    if load <= QUIET_LOAD:
        return None
    return (
        f"the load average was {load:.1f} before the start: other processes used the cores. "
        "Trust counts, then ratios of CPU time; not wall time."
    )


def bind(core: int) -> None:
    """Binds this process, and those that it starts, to the n-th of its cores."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def wait_for_device() -> None:
    """Waits until a GPU that this process uses has done its work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def tree_cpu_seconds() -> float:
    """Returns the CPU time of this process and of all its descendants, living or ended, in seconds."""
    ended = os.times()
    living = sum(_cpu_of(pid) for pid in _descendants(os.getpid()))
    return time.process_time() + ended.children_user + ended.children_system + living


def peak_memory_bytes() -> int:
    """Returns the largest resident memory of this process so far."""
    return _status("VmHWM")


def memory_bytes() -> int:
    """Returns the resident memory of this process."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _fields(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat after the command's name; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_of(pid: int) -> float:
    fields = _fields(pid)
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _descendants(root: int) -> list[int]:
    running = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    parents = {pid: fields[1] for pid in running if (fields := _fields(pid))}
    found, level = [], [root]
    while level:
        level = [pid for pid, parent in parents.items() if int(parent) in level]
        found += level
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()

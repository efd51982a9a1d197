"""Which cores this process may use, how many a container's limit leaves, and how ranks of one node share them out.

`share` is a pure function of a described machine. What the kernel says is read from /proc and /sys; where they are
missing (macOS), every logical CPU counts as a core of its own and nothing is ever bound.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

CPU_HIERARCHIES = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
"""Where systems mount version 1's controller of CPU time."""


class Core(NamedTuple):
    """A physical core. numa: the memory node it is near; cpus: those of its hyper-threads that may be used."""

    numa: int
    package: int
    cpus: tuple[int, ...]


class Share(NamedTuple):
    """What one rank gets. cpus: logical CPUs to bind it to; None to leave it where it is. why: in words."""

    threads: int
    cpus: frozenset[int] | None
    why: str


# ---------------------------------------------------------------- pure


def share(local_rank: int, masks: Mapping[int, Collection[int]], cores: Sequence[Core], limit: float | None) -> Share:
    """Threads and cores of one rank.

    Ranks with one and the same mask share it out; a rank with a mask of its own was bound by its launcher already and
    keeps it whole. A mask is never widened.

    Args:
        masks: by local rank, the logical CPUs that the launcher lets that rank use.
        cores: what the mask of this rank consists of, as `cores_of` gives it.
        limit: cores' worth of time that a container may use, shared by the ranks of the node; None: no limit.
    """
    mine = set(masks[local_rank])
    touching = [rank for rank, mask in masks.items() if mine & set(mask)]
    alike = sorted(rank for rank in touching if set(masks[rank]) == mine)
    threads = max(1, len(cores) // len(touching))
    if limit is not None:
        threads = min(threads, max(1, int(limit // len(masks))))
    if len(alike) == 1 or len(alike) != len(touching):
        alone = "it is alone on its cores" if len(touching) == 1 else "the launcher's bindings overlap"
        return Share(threads, None, alone)
    if limit is not None and limit < len(cores):
        return Share(threads, None, f"the container may use {limit:g} of {len(cores)} cores, whichever are free")
    if len(cores) < len(alike):
        return Share(threads, None, f"there are more ranks ({len(alike)}) than cores ({len(cores)})")
    part = split(cores, len(alike))[alike.index(local_rank)]
    cpus = frozenset(cpu for core in part for cpu in core.cpus)
    return Share(threads, cpus, f"{len(part)} of {len(cores)} cores")


def split(cores: Sequence[Core], ranks: int) -> list[list[Core]]:
    """Whole cores for each rank, at least len(cores) // ranks of them.

    A rank stays within one NUMA node where all ranks can; else the cores are cut evenly in the order of the nodes. All are
    given out, but those of a node that is too small for a rank where the others have room for all.
    """
    assert 1 <= ranks <= len(cores)
    ordered = sorted(cores)
    nodes = [[core for core in ordered if core.numa == numa] for numa in sorted({core.numa for core in ordered})]
    least = len(ordered) // ranks
    takes = [0] * len(nodes)
    for _ in range(ranks):
        room = [index for index, node in enumerate(nodes) if len(node) // least > takes[index]]
        if not room:
            return _cut(ordered, ranks)
        takes[max(room, key=lambda index: len(nodes[index]) / (takes[index] + 1))] += 1
    return [part for node, count in zip(nodes, takes, strict=True) if count for part in _cut(node, count)]


def _cut(cores: list[Core], parts: int) -> list[list[Core]]:
    return [cores[len(cores) * part // parts : len(cores) * (part + 1) // parts] for part in range(parts)]


def cpu_list(text: str) -> list[int]:
    """The kernel's short form of a list of CPUs: `0-2,8` -> [0, 1, 2, 8]."""
    found = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [cpu for first, last in found for cpu in range(int(first), int(last or first) + 1)]


def as_text(cpus: Iterable[int]) -> str:
    """[0, 1, 2, 8] -> `0-2,8`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# ---------------------------------------------------------------- read from the kernel


def allowed() -> frozenset[int]:
    """The logical CPUs that this process may use: what taskset, a launcher or a container's cpuset has left."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cores_of(cpus: Iterable[int], root: Path = Path("/")) -> list[Core]:
    """The physical cores that these logical CPUs belong to, by NUMA node, package and number.

    Args:
        root: folder that holds sys/; another one in tests.
    """
    system = root / "sys" / "devices" / "system"
    near = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in system.glob("node/node[0-9]*")
        for cpu in cpu_list(_text(folder / "cpulist"))
    }
    found: dict[tuple[int, int, int], list[int]] = {}
    for cpu in sorted(cpus):
        topology = system / "cpu" / f"cpu{cpu}" / "topology"
        siblings = cpu_list(_text(topology / "thread_siblings_list")) or [cpu]
        package = int(_text(topology / "physical_package_id") or 0)
        found.setdefault((near.get(cpu, 0), package, siblings[0]), []).append(cpu)
    return [Core(numa, package, tuple(threads)) for (numa, package, _), threads in sorted(found.items())]


def time_limit(root: Path = Path("/")) -> float | None:
    """How many cores' worth of time the container may use, by the narrowest of its control groups; None: no limit.

    A container with a limit of 2 on a host of 64 cores sees all 64: with a thread for each it is stopped, again and
    again, for the rest of every tenth of a second.

    Args:
        root: folder that holds proc/ and sys/; another one in tests.
    """
    limits: list[float] = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mounts: Iterable[str] = ("", "unified")
        elif "cpu" in controllers.split(","):
            mounts = CPU_HIERARCHIES
        else:
            continue
        for mount in mounts:
            limits += _limits(root / "sys" / "fs" / "cgroup" / mount, path.strip("/"))
    return min(limits, default=None)


def _limits(mount: Path, path: str) -> list[float]:
    """Of a group and all above it. Inside a container the mount may begin at the group itself, whatever its path says."""
    folder, found = mount / path, []
    while True:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # else "max", -1, or no such file
            found.append(int(quota) / int(period))
        if folder == mount:
            return found
        folder = folder.parent


def bind(cpus: Collection[int]) -> None:
    """Moves this process, the threads that it has and those that it will have to these CPUs.

    Processes that it starts later inherit them.

    Raises:
        OSError: the kernel, or a container's rules, do not allow it.
    """
    if sys.platform == "linux":
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it ended just now
                os.sched_setaffinity(int(task.name), cpus)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""

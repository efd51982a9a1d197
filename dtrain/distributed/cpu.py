"""CPU cores: which ones this process may use, how many a container's limit allows, and how ranks of a node share them.

`rank_share` is a pure function of a described machine. The rest reads /proc and /sys. Where they are missing (macOS),
every logical CPU counts as a core and no process is ever bound.

This file is also sent to other hosts as text: standard library only, and every import on one line.
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
"""Where systems mount the CPU controller of cgroup version 1."""


class Core(NamedTuple):
    """A physical core.

    Attributes:
        numa: number of its NUMA node.
        package: number of its socket.
        cpus: logical CPUs (hyper-threads) of this core that may be used.
    """

    numa: int
    package: int
    cpus: tuple[int, ...]


class CpuShare(NamedTuple):
    """The part of a node's CPUs that one rank gets.

    Attributes:
        threads: number of threads.
        cpus: logical CPUs to bind the rank to; None to leave the rank where it is.
        reason: the reason in words.
    """

    threads: int
    cpus: frozenset[int] | None
    reason: str


# ---------------------------------------------------------------- pure


def rank_share(
    local_rank: int, masks: Mapping[int, Collection[int]], cores: Sequence[Core], limit: float | None
) -> CpuShare:
    """Returns threads and cores of one rank.

    Ranks with equal masks divide the mask among themselves. A rank with a mask that no other rank has was bound by its
    launcher already and keeps all of it. A mask is never widened.

    Args:
        masks: by local rank, the logical CPUs that the launcher lets that rank use.
        cores: the cores of this rank's mask, as `physical_cores` returns them.
        limit: CPU time per second that the container may use, shared by the ranks of the node; None: no limit.
    """
    mask_of_rank = set(masks[local_rank])
    overlapping = [rank for rank, mask in masks.items() if mask_of_rank & set(mask)]
    sharers = sorted(rank for rank in overlapping if set(masks[rank]) == mask_of_rank)
    threads = max(1, len(cores) // len(overlapping))
    if limit is not None:
        threads = min(threads, max(1, int(limit // len(masks))))
    if len(sharers) == 1 or len(sharers) != len(overlapping):
        alone = "it is alone on its cores" if len(overlapping) == 1 else "the launcher's bindings overlap"
        return CpuShare(threads, None, alone)
    if limit is not None and limit < len(cores):
        return CpuShare(threads, None, f"the container may use {limit:g} of {len(cores)} cores, whichever are free")
    if len(cores) < len(sharers):
        return CpuShare(threads, None, f"there are more ranks ({len(sharers)}) than cores ({len(cores)})")
    part = split_cores(cores, len(sharers))[sharers.index(local_rank)]
    cpus = frozenset(cpu for core in part for cpu in core.cpus)
    return CpuShare(threads, cpus, f"{len(part)} of {len(cores)} cores")


def split_cores(cores: Sequence[Core], ranks: int) -> list[list[Core]]:
    """Divides cores among ranks; each rank gets at least len(cores) // ranks of them.

    Each rank stays within one NUMA node if that is possible for all ranks; else the cores are cut evenly in the order
    of the nodes. All cores are used, except those of a NUMA node that is too small for a rank if the other nodes have
    room for all ranks.
    """
    assert 1 <= ranks <= len(cores)
    ordered = sorted(cores)
    nodes = [[core for core in ordered if core.numa == numa] for numa in sorted({core.numa for core in ordered})]
    min_cores = len(ordered) // ranks
    ranks_on_node = [0] * len(nodes)
    for _ in range(ranks):
        with_room = [index for index, node in enumerate(nodes) if len(node) // min_cores > ranks_on_node[index]]
        if not with_room:
            return _cut(ordered, ranks)
        ranks_on_node[max(with_room, key=lambda index: len(nodes[index]) / (ranks_on_node[index] + 1))] += 1
    return [part for node, count in zip(nodes, ranks_on_node, strict=True) if count for part in _cut(node, count)]


def _cut(cores: list[Core], parts: int) -> list[list[Core]]:
    return [cores[len(cores) * part // parts : len(cores) * (part + 1) // parts] for part in range(parts)]


def parse_cpu_list(text: str) -> list[int]:
    """Parses the kernel's short form of a list of CPUs: `0-2,8` -> [0, 1, 2, 8]."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)]


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Formats CPUs in the kernel's short form: [0, 1, 2, 8] -> `0-2,8`."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


# ---------------------------------------------------------------- read from the kernel


def allowed_cpus() -> frozenset[int]:
    """Returns the logical CPUs that this process may use, after taskset, the launcher and the container's cpuset."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int], root: Path = Path("/")) -> list[Core]:
    """Returns the physical cores that these logical CPUs belong to, sorted by NUMA node, package and number.

    Args:
        root: folder that holds sys/; another one in tests.
    """
    system = root / "sys" / "devices" / "system"
    numa_nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in system.glob("node/node[0-9]*")
        for cpu in parse_cpu_list(_read(folder / "cpulist"))
    }
    threads: dict[tuple[int, int, int], list[int]] = {}
    for cpu in sorted(cpus):
        topology = system / "cpu" / f"cpu{cpu}" / "topology"
        siblings = parse_cpu_list(_read(topology / "thread_siblings_list")) or [cpu]
        package = int(_read(topology / "physical_package_id") or 0)
        threads.setdefault((numa_nodes.get(cpu, 0), package, siblings[0]), []).append(cpu)
    return [Core(numa, package, tuple(core_cpus)) for (numa, package, _), core_cpus in sorted(threads.items())]


def cpu_time_limit(root: Path = Path("/")) -> float | None:
    """Returns the CPU time per second that the container may use, by its narrowest control group; None: no limit.

    A container with a limit of 2 on a host of 64 cores sees all 64. With a thread for each, the kernel would pause it
    in every period of a tenth of a second.

    Args:
        root: folder that holds proc/ and sys/; another one in tests.
    """
    limits: list[float] = []
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mounts: Iterable[str] = ("", "unified")
        elif "cpu" in controllers.split(","):
            mounts = CPU_HIERARCHIES
        else:
            continue
        for mount in mounts:
            limits += _group_limits(root / "sys" / "fs" / "cgroup" / mount, path.strip("/"))
    return min(limits, default=None)


def _group_limits(mount: Path, path: str) -> list[float]:
    """Reads the limits of a group and its parents. In a container the mount may start at the group itself."""
    folder, limits = mount / path, []
    while True:
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # else "max", -1, or no such file
            limits.append(int(quota) / int(period))
        if folder == mount:
            return limits
        folder = folder.parent


def bind_process(cpus: Collection[int]) -> None:
    """Moves this process, with its present and future threads, to these CPUs. Child processes inherit them.

    Raises:
        OSError: the kernel, or a container's rules, do not allow it.
    """
    if sys.platform == "linux":
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # the thread has just ended
                os.sched_setaffinity(int(task.name), cpus)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""

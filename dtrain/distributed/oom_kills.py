"""Processes that the kernel has killed because the container's memory was full, by the counters of its control group."""

from __future__ import annotations

from pathlib import Path


def count_oom_kills(root: Path = Path("/")) -> int | None:
    """Returns how many processes of this container, or of a group around it, were killed for memory; None: unknown.

    Compare two counts: the first one includes earlier jobs.

    Args:
        root: folder that holds proc/ and sys/; another one in tests.
    """
    counts = []
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mounts, name = ["", "unified"], "memory.events"
        elif "memory" in controllers.split(","):
            mounts, name = ["memory"], "memory.oom_control"
        else:
            continue
        for mount in mounts:
            top = root / "sys" / "fs" / "cgroup" / mount
            # In a container the mount may start at the group itself.
            counts += [_count(folder / name) for folder in {top / path.strip("/"), top}]
    return max((count for count in counts if count is not None), default=None)


def _count(file: Path) -> int | None:
    values = [line.split() for line in _read(file).splitlines()]
    found = [int(value[1]) for value in values if len(value) == 2 and value[0] == "oom_kill" and value[1].isdecimal()]
    return found[0] if found else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""

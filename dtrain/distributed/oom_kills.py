"""Processes that the kernel has killed because the container's memory was full, by the counters of its control group."""

from __future__ import annotations

from pathlib import Path

from dtrain.distributed.control_groups import control_groups, read_text


def count_oom_kills(root: Path = Path("/")) -> int | None:
    """Returns how many processes of this container, or of a group around it, were killed for memory; None: unknown.

    Compare two counts: the first one includes earlier jobs.

    Args:
        root: folder that holds proc/ and sys/; another one in tests.
    """
    names = ("memory.events", "memory.oom_control")  # of versions 2 and 1
    groups = [folder for folders in control_groups("memory", root) for folder in (folders[0], folders[-1])]
    counts = [_count(folder / name) for folder in groups for name in names]
    return max((count for count in counts if count is not None), default=None)


def _count(file: Path) -> int | None:
    values = [line.split() for line in read_text(file).splitlines()]
    found = [int(value[1]) for value in values if len(value) == 2 and value[0] == "oom_kill" and value[1].isdecimal()]
    return found[0] if found else None

"""Finds the folders of this process's control groups, where the kernel shows the limits and counters of a container.

cpu.py has a copy of this search, because it is sent to other hosts as text and may import nothing of dtrain.
"""

from __future__ import annotations

from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> list[list[Path]]:
    """Returns, for each place where the controller may be mounted, the folders from this process's group up to the mount.

    Not all of them exist. In a container the mount may start at the group itself.

    Args:
        controller: pids, memory, ...
        root: folder that holds proc/ and sys/; another one in tests.
    """
    found = []
    for line in read_text(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and controller not in controllers.split(","):
            continue
        for mount in ("", "unified") if number == "0" else (controller,):  # version 2, alone or beside version 1
            top = root / "sys" / "fs" / "cgroup" / mount
            group = top / path.strip("/")
            found.append([folder for folder in (group, *group.parents) if folder.is_relative_to(top)])
    return found


def read_text(file: Path) -> str:
    """Returns the content of a file; empty without one."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""

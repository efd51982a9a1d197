"""Memory of a process."""

from __future__ import annotations

from pathlib import Path


def own_memory() -> int:
    """Returns bytes of this process that it shares with no file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

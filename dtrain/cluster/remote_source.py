"""Joins source files of dtrain into one text for a Python on another host, which need not have dtrain.

The files use the standard library only, and import from dtrain in single lines at the top.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROBE, CPU = HERE / "probe.py", HERE.parent / "distributed" / "cpu.py"


def join_sources(files: Iterable[Path]) -> str:
    """Returns one module made of several files. Each file may use names of the files before it."""
    lines = ["from __future__ import annotations"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if not line.startswith(("from __future__", "from dtrain."))]
    return "\n".join(lines) + "\n"

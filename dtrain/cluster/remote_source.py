"""Files of dtrain as one text for a Python on another host, where dtrain need not be: standard library only, all of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROBE, CORES = HERE / "probe.py", HERE.parent / "distributed" / "cpu.py"


def as_one_text(files: Iterable[Path]) -> str:
    """One module out of several; what they import of each other is there already, as they come in that order."""
    lines = ["from __future__ import annotations"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if not line.startswith(("from __future__", "from dtrain."))]
    return "\n".join(lines) + "\n"

"""How soon the launcher's output names a rank that was killed, or stopped, in the middle of training.

    .venv/bin/python tests/benchmarks/naming.py

Two ranks; rank 1 gets SIGKILL, or SIGSTOP with train.hang_timeout=10. Under torchrun, deepspeed and mpirun, three times each.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support import jobs  # noqa: E402

LAUNCHERS: dict[str, Callable[[], list[str]]] = {
    "torchrun": jobs.torchrun,
    "deepspeed": jobs.deepspeed,
    "mpirun": jobs.mpirun,
}


def seconds_until(folder: Path, start: list[str], number: signal.Signals, words: str) -> tuple[float, float, int, str]:
    """From the signal to the message, and to the end of the last process; the exit code; the message's first line."""
    settings = jobs.settings(folder, "run", **{k.replace(".", "__"): v for k, v in jobs.ENDLESS.items()})
    with jobs.started([*start, *settings, "train.hang_timeout=10"]) as job:
        job.wait_for("  loss ")
        rank, begin = job.ranks()[1], time.monotonic()
        os.kill(rank, number)
        job.wait_for(words)
        named = time.monotonic() - begin
        line = next(line for line in (*job.out, *job.err) if words in line)
        job.gone_within(30)
        gone = time.monotonic() - begin
        return named, gone, job.end(), line.strip()


def main() -> int:
    for name, start in LAUNCHERS.items():
        for number, words in ((signal.SIGKILL, "Rank 1 (process"), (signal.SIGSTOP, "Rank 1")):
            for turn in range(3):
                with tempfile.TemporaryDirectory() as place:
                    named, gone, code, line = seconds_until(Path(place) / "runs", start(), number, words)
                if turn == 0:
                    print(f"{name} {number.name}: {line}")
                print(
                    f"{name} {number.name}: named after {named:.2f} s, all gone after {gone:.2f} s, exit {code}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

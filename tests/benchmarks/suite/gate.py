"""Where a contestant waits for its turn: after each block of steps, until the driver lets it go on.

All contestants of a row run at once, each in its own process, but only one of them computes at a time. So start-up is
paid once, does not count, and the blocks of all contestants interleave.

A block's CPU time is from the end of the block before to its own end, so that work done ahead while waiting counts; its
wall time starts where the driver lets it go.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.suite import machine

MESSAGE_TIMEOUT_S = 900


class Gate:
    """The contestant's end. Call `after_step` once after each optimizer step; ranks other than 0 need none."""

    def __init__(
        self, path: Path | None, *, warm: int, block: int, at_step: Mapping[int, Callable[[], None]], traced: bool
    ) -> None:
        """
        Args:
            path: the driver's socket; None: nobody waits, and only steps are counted.
            warm: steps before the first block, which do not count.
            block: steps of a block.
            at_step: what to call after the n-th step, counted from 1.
            traced: keeps the time at which each step ended.
        """
        self._at_step = at_step
        self._traced = traced
        self.ends: list[float] = []
        """Monotonic time at the end of each step, in seconds; empty unless traced."""
        self._steps, self._next = 0, warm
        self._block = block
        self._cpu = self._wall = 0.0
        self._socket: socket.socket | None = None
        if path is not None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(MESSAGE_TIMEOUT_S)
            self._socket.connect(str(path))
            self._file = self._socket.makefile("rw", encoding="utf-8")

    def after_step(self) -> None:
        """Counts a step. At the end of a block it reports the times and waits."""
        self._steps += 1
        if self._traced:
            self.ends.append(time.monotonic())
        if (action := self._at_step.get(self._steps)) is not None:
            action()
        if self._socket is None or self._steps != self._next:
            return
        machine.wait_for_device()
        wall, cpu = time.perf_counter(), machine.tree_cpu_seconds()
        send(self._file, {"steps": self._steps, "cpu_s": cpu - self._cpu, "wall_s": wall - self._wall})
        if not self._file.readline():
            raise SystemExit("The driver has ended.")
        self._next += self._block
        self._cpu, self._wall = cpu, time.perf_counter()


def send(file: Any, message: dict[str, Any]) -> None:
    file.write(json.dumps(message) + "\n")
    file.flush()

"""The process that writes checkpoints while training goes on; a thread would compete for the interpreter lock.

It is started once, imports no torch, is told one order after the other on its standard input, and dies with its rank.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.checkpoint.publish import Order, publish
from dtrain.errors import CheckpointError

PR_SET_PDEATHSIG = 1
POLL_S = 0.5
CLOSE_S = 10.0

NOT_FOR_US = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Meant for the rank, which decides what becomes of a checkpoint on its way."""

_START = "import sys; sys.path.insert(0, sys.argv[1]); from dtrain.checkpoint.writer_process import serve; serve(sys.argv[2:])"


class Writer:
    """The other process, seen from the rank. At most one order is with it."""

    def __init__(self, texts: Mapping[str, bytes]) -> None:
        """
        Args:
            texts: small files by name that belong to every checkpoint, told once.
        """
        self._fd = -1
        self._texts = {name: content.decode("latin-1") for name, content in texts.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self._line = b""
        self.is_busy = False

    def order(self, order: Order, fd: int) -> None:
        """Hands an order over; the block behind `fd` must stay as it is until `result` gives something.

        Raises:
            CheckpointError: the process has died.
        """
        assert not self.is_busy, "at most one checkpoint is being written"
        self.start(fd)
        self._tell(asdict(order))
        self.is_busy = True

    def result(self, *, wait: bool) -> dict[str, Any] | None:
        """What became of the order: {"bytes", "seconds"}, or {"error", "file"}; None while it is at work, or without one.

        Raises:
            CheckpointError: the process has died.
        """
        if not self.is_busy:
            return None
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._line:
            ready, _, _ = select.select([pipe], [], [], POLL_S if wait else 0.0)
            if not ready and not wait:
                return None
            if ready:
                part = os.read(pipe, 65536)
                if not part:
                    raise self._died()
                self._line += part
        line, _, self._line = self._line.partition(b"\n")
        self.is_busy = False
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        """Ends the process; what it is writing is given up."""
        process, self._process = self._process, None
        if process is None:
            return
        if self.is_busy:
            process.kill()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self.is_busy = False

    def start(self, fd: int) -> None:
        """Starts the process for the block behind `fd`, unless it is there."""
        if self._process is not None and fd == self._fd:
            return
        self.close()
        root = str(Path(__file__).resolve().parents[2])
        # -I: nothing of the user's environment or folder is imported by chance.
        command = [sys.executable, "-I", "-c", _START, root, str(fd), str(os.getpid())]
        # Blocked in the child until it ignores them: launchers signal a rank's whole group, at any moment.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_US)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], close_fds=True
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._fd, self._line = fd, b""
        self._tell(self._texts)

    def _tell(self, value: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> CheckpointError:
        assert self._process is not None
        code = self._process.wait()
        self.is_busy = False
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return CheckpointError(
            f"The process that writes checkpoints ended {how} (process {self._process.pid}): killed from outside, or for "
            "want of memory? The checkpoints published before are whole; the same command goes on from the newest."
        )


def serve(arguments: list[str]) -> None:
    """What the other process does, until its standard input ends.

    Args:
        arguments: the block's file descriptor, and the number of the process that it may not outlive.
    """
    fd, parent = int(arguments[0]), int(arguments[1])
    for number in NOT_FOR_US:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    os.nice(5)  # training comes first
    texts = json.loads(sys.stdin.buffer.readline() or b"{}")
    static = {name: content.encode("latin-1") for name, content in texts.items()}
    while os.getppid() == parent and (line := sys.stdin.buffer.readline()):
        answer = _carry_out(Order.from_json(json.loads(line)), static, fd)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _carry_out(order: Order, static: Mapping[str, bytes], fd: int) -> dict[str, Any]:
    begin = time.monotonic()
    with mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ) as block, memoryview(block) as view:
        try:
            return publish(order, static, view)
        except OSError as error:
            told = {"error": error.strerror or str(error), "file": str(error.filename)}
        # Only here is the error gone, whose traceback holds parts of the view: the block cannot be closed before.
        return {**told, "seconds": time.monotonic() - begin}

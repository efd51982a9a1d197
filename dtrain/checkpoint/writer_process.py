"""The process that writes checkpoints while training continues. A thread would compete for the interpreter lock.

It is started once per rank, does not import torch, reads one request after the other from its standard input, and ends
when its rank ends.
"""

from __future__ import annotations

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

from dtrain.checkpoint.publish import WriteRequest, publish
from dtrain.distributed import linux_process
from dtrain.distributed.process_limit import process_limit_error
from dtrain.errors import CheckpointError

POLL_S = 0.5
CLOSE_S = 10.0

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals for the rank, which decides whether an unfinished checkpoint is completed."""

_START = "import sys; sys.path.insert(0, sys.argv[1]); from dtrain.checkpoint.writer_process import serve; serve(sys.argv[2:])"


class WriterProcess:
    """The writer process as its rank sees it. It handles at most one request at a time."""

    def __init__(self, static: Mapping[str, bytes]) -> None:
        """Prepares the process; `start` starts it.

        Args:
            static: small files by name that are part of every checkpoint. They are sent once.
        """
        self._fd = -1
        self._static = {name: content.decode("latin-1") for name, content in static.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self._output = b""
        self.is_busy = False

    def submit(self, request: WriteRequest, fd: int) -> None:
        """Sends a request. The buffer behind `fd` must not change until `result` returns one.

        Raises:
            CheckpointError: the process has died.
        """
        assert not self.is_busy, "at most one checkpoint is being written"
        self.start(fd)
        self._send(asdict(request))
        self.is_busy = True

    def result(self, *, wait: bool) -> dict[str, Any] | None:
        """Returns the result of the request. None while writing, or if there is no request.

        Returns:
            {"bytes", "seconds"} of a checkpoint that was written; {"error", "file", "seconds"} otherwise.

        Raises:
            CheckpointError: the process has died.
        """
        if not self.is_busy:
            return None
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._output:
            ready, _, _ = select.select([pipe], [], [], POLL_S if wait else 0.0)
            if not ready and not wait:
                return None
            if ready:
                received = os.read(pipe, 65536)
                if not received:
                    raise self._exit_error()
                self._output += received
        line, _, self._output = self._output.partition(b"\n")
        self.is_busy = False
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        """Ends the process. An unfinished checkpoint is abandoned."""
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
        """Starts the process for the buffer behind `fd`, unless it is running already."""
        if self._process is not None and fd == self._fd:
            return
        self.close()
        root = str(Path(__file__).resolve().parents[2])
        # -I: the process imports nothing from the user's environment or working folder.
        command = [sys.executable, "-I", "-c", _START, root, str(fd), str(os.getpid())]
        # Signals stay blocked until the child ignores them: launchers may signal a rank's process group at any moment.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], close_fds=True
            )
        except OSError as error:
            raise process_limit_error(error) or error from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._fd, self._output = fd, b""
        self._send(self._static)

    def _send(self, value: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._exit_error() from None

    def _exit_error(self) -> CheckpointError:
        assert self._process is not None
        code = self._process.wait()
        self.is_busy = False
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return CheckpointError(
            f"The process that writes checkpoints {how} (process {self._process.pid}): killed from outside, or out of "
            "memory? The checkpoints published before are complete; the same command resumes from the newest one."
        )


def serve(arguments: list[str]) -> None:
    """Runs in the writer process: handles requests until its standard input ends.

    Args:
        arguments: the buffer's file descriptor, and the process id of the rank that it must not outlive.
    """
    fd, parent = int(arguments[0]), int(arguments[1])
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    linux_process.send_on_parent_death()
    os.nice(5)  # Training has priority over writing.
    texts = json.loads(sys.stdin.buffer.readline() or b"{}")
    static = {name: content.encode("latin-1") for name, content in texts.items()}
    while os.getppid() == parent and (line := sys.stdin.buffer.readline()):
        result = _handle(WriteRequest.from_json(json.loads(line)), static, fd)
        sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


def _handle(request: WriteRequest, static: Mapping[str, bytes], fd: int) -> dict[str, Any]:
    begin = time.monotonic()
    with mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ) as buffer, memoryview(buffer) as view:
        try:
            return publish(request, static, view)
        except OSError as error:
            result = {"error": error.strerror or str(error), "file": str(error.filename)}
        # Return after the except clause: the error's traceback holds views, and the map cannot be closed before they
        # are released.
        return {**result, "seconds": time.monotonic() - begin}

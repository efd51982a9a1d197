"""Runs one host's command of a job, and ends it with everything it started when told to.

run_job.py starts this file over ssh, by its path. It uses the standard library only, so that it starts quickly. The
first line of standard input describes the command; every later line is an order. When the input ends, the launching
process has died, and everything here is ended. Nothing passes through a shell, and no value appears in a process list.

Standard output carries one JSON object a line: {"out": text} and {"err": text} are the command's output, {"ping": true}
answers a ping, {"report": {...}} is a line of dtrain's launcher, which takes orders ({"order": {...}} in the input), and
{"end": ...} is the command's result.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""The same as in linux_process.py, which cannot be imported here."""

GRACE_S = 3.0
"""Time from the end of the input to SIGKILL, in which a rank can write why it ended."""

SILENCE_LIMIT_S = 10.0
"""The launching process sends a ping every few seconds. If none arrives for this long, a launcher without ranks is
ended: the host is cut off and the ranks have ended for that reason, but the launcher may wait much longer for hosts
that it cannot reach."""

MAX_SILENCE_S = 300.0
"""After this time without a ping everything is ended."""

ORPHAN_TIMEOUT_S = 1.0
"""After the command has ended, time for its remaining processes to notice that and end by themselves."""

LINGER_LIMIT_S = 2.0
"""How long a launcher may run after dtrain has written exit.json: mpirun waits for a host that is cut off."""

EXIT_FILE = "DTRAIN_EXIT_FILE"
"""The same name as in launcher_env.py, which cannot be imported here."""

ORDERS_FD = "DTRAIN_ORDERS_FD"
"""As above: the command's end of the socket that carries orders and reports."""

DRAIN_TIMEOUT_S = 2.0
"""Time to read the rest of the output after the command has ended."""


class Supervisor:
    """Runs one command, follows orders from standard input, and reports on standard output."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._write_lock, self._last_order_s = threading.Lock(), time.monotonic()
        self._exit_file = Path(spec["exit_file"]) if spec.get("exit_file") else None
        self._old_stamp = stamp(self._exit_file)
        self._temp_folder = tempfile.TemporaryDirectory(prefix="dtrain-end-")
        self._temp_exit_file = Path(self._temp_folder.name) / "exit.json"
        self._launcher_signals = frozenset(spec.get("launcher_signals", ()))
        self._ends_with_exit_file = bool(spec.get("ends_with_exit_file"))
        self._orders: socket.socket | None = None
        env, inherited = self._child_env(spec["env"]), list[int]()
        if spec.get("takes_orders"):
            self._orders, command_end = socket.socketpair()
            inherited = [command_end.detach()]
            env[ORDERS_FD] = str(inherited[0])
        # torchrun starts each rank in a new session. As their subreaper this process remains their ancestor.
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._child = subprocess.Popen(
            spec["argv"],
            cwd=spec["cwd"],
            env=env,
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        for file in inherited:
            os.close(file)

    def _child_env(self, env: dict[str, str]) -> dict[str, str]:
        """Returns the command's environment, with the .venv of this Python on the PATH: DeepSpeed calls ninja."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, **env, EXIT_FILE: str(self._temp_exit_file)}

    def run(self) -> None:
        """Returns when the command has ended and none of its processes is left."""
        readers = [
            threading.Thread(target=self._forward_output, args=(stream, name), daemon=True)
            for stream, name in ((self._child.stdout, "out"), (self._child.stderr, "err"))
        ]
        targets = [self._follow_orders, self._end_when_cut_off]
        for target in targets if self._orders is None else [*targets, self._forward_reports]:
            threading.Thread(target=target, daemon=True).start()
        for thread in readers:
            thread.start()
        code = self._wait()
        _wait_for_descendants(ORPHAN_TIMEOUT_S)  # dtrain's ranks end with their launcher, and print why
        _end_descendants(kill=False)
        for reader in readers:
            reader.join(DRAIN_TIMEOUT_S)
        _end_descendants(kill=True)
        self._write({"end": {"code": code, "record": self._read_exit_record(code)}})
        self._temp_folder.cleanup()

    def _wait(self) -> int:
        """Returns the command's exit code; dtrain's if the launcher keeps running after dtrain wrote exit.json."""
        recorded_s: float | None = None
        while True:
            try:
                return self._child.wait(timeout=0.25)
            except subprocess.TimeoutExpired:
                record = self._read_exit_record(1) if self._ends_with_exit_file else None
            if record is not None and record["code"]:
                recorded_s = recorded_s or time.monotonic()
                if time.monotonic() > recorded_s + LINGER_LIMIT_S:
                    _end_descendants(kill=False)
                    return int(record["code"])

    def _forward_output(self, stream: BinaryIO, name: str) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(stream.fileno(), 65536):
            if text := decoder.decode(chunk):
                self._write({name: text})

    def _forward_reports(self) -> None:
        """Forwards the reports of a command that takes orders."""
        assert self._orders is not None
        with self._orders.makefile(encoding="utf-8") as reports:
            for line in reports:
                self._write({"report": json.loads(line)})

    def _order(self, order: dict[str, Any]) -> None:
        assert self._orders is not None
        if "start" in order:  # what an earlier start wrote into a folder of this host alone says nothing about this one
            self._old_stamp = stamp(self._exit_file)
        try:
            self._orders.sendall(json.dumps(order).encode() + b"\n")
        except OSError:  # the command has ended, which is reported
            return

    def _follow_orders(self) -> None:
        """Follows orders until the input ends, then ends everything."""
        for line in sys.stdin:
            self._last_order_s = time.monotonic()
            try:
                order = json.loads(line)
            except ValueError:  # a truncated line: the launching process has died
                order = {"kill": True}
            if "signal" in order:
                self._signal(order["signal"])
            elif "ping" in order:
                self._write(order)
            elif "order" in order:
                self._order(order["order"])
            elif "kill" in order:
                break
        else:
            self._signal(signal.SIGTERM)
            time.sleep(GRACE_S)
        _end_descendants(kill=True)

    def _end_when_cut_off(self) -> None:
        """Ends the command when the launching process has been silent for too long."""
        without_ranks_s = 0
        while True:
            time.sleep(1.0)
            without_ranks_s = without_ranks_s + 1 if _descendants() == [self._child.pid] else 0
            silence_s = time.monotonic() - self._last_order_s
            if silence_s > MAX_SILENCE_S or (silence_s > SILENCE_LIMIT_S and without_ranks_s > 1):
                _end_descendants(kill=False)

    def _signal(self, number: int) -> None:
        """Sends a signal to the launcher if it forwards it or has no ranks yet; else to its children, the ranks."""
        ranks = [] if number in self._launcher_signals else _children().get(self._child.pid, [])
        for pid in ranks or [self._child.pid]:
            _kill(pid, number)

    def _read_exit_record(self, code: int) -> dict[str, Any] | None:
        """Returns exit.json if dtrain wrote it during this job: in the run folder, or before there was one."""
        if self._exit_file is not None and stamp(self._exit_file) not in (None, self._old_stamp):
            return _read_object(self._exit_file)
        # The temporary file counts only after a failure: a restart within the job may have succeeded.
        return _read_object(self._temp_exit_file) if code else None

    def _write(self, frame: dict[str, Any]) -> None:
        with self._write_lock:
            try:
                sys.stdout.write(json.dumps(frame) + "\n")
                sys.stdout.flush()
            except OSError:  # the launching process has died, so the input ends as well
                return


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def stamp(path: Path | None) -> tuple[int, int] | None:
    """Returns what changes whenever a file is replaced or written; None if there is no file."""
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_ino, status.st_mtime_ns)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _children() -> dict[int, list[int]]:
    """Returns the children of each process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # Read as bytes: a process name may be cut in the middle of a character.
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:  # the process has just ended
                continue
            if fields[0] != b"Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    return children


def _descendants() -> list[int]:
    children, descendants, generation = _children(), [], [os.getpid()]
    while generation:
        generation = [child for parent in generation for child in children.get(parent, [])]
        descendants += generation
    return descendants


def _end_descendants(*, kill: bool) -> None:
    """Ends all descendants of this process.

    With `kill` they are gone when this returns, except for processes that the kernel does not end.
    """
    for number in (signal.SIGKILL,) if kill else (signal.SIGTERM, signal.SIGKILL):
        for pid in _descendants():
            _kill(pid, number)
        _wait_for_descendants(GRACE_S)


def _wait_for_descendants(limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while _descendants() and time.monotonic() < deadline:
        time.sleep(0.02)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):  # it belongs to another user: a program with the setuid bit
        return


def main() -> None:
    """Reads the description of the command from standard input and runs it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # sshd may send it; the end of the input is enough
    spec = json.loads(sys.stdin.readline() or "null")
    if spec is None:
        return
    sys.stdout.write("\n")  # a login script may have left a line open
    sys.stdout.flush()
    try:
        supervisor = Supervisor(spec)
    except OSError as error:
        message = f"{error.strerror}: {error.filename}"
        sys.stdout.write(json.dumps({"end": {"code": 127, "record": None, "problem": message}}) + "\n")
        return
    supervisor.run()


if __name__ == "__main__":
    main()

"""The far end of one host's part of a job: runs a command, and ends it with everything it started when told to.

Started over ssh by run.py, by its path: standard library only, so that it begins at once. Its standard input is the
leash. The first line says what to run; every other line is an order; and when the input ends (whoever held it has died,
or was killed), everything here is ended. Nothing is passed through a shell, and no value shows in a process list.

Standard output carries one JSON object a line: {"out": text} and {"err": text} are what the command wrote, {"end": ...}
is how it ended.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

GRACE_S = 3.0
"""From the end of the leash to SIGKILL: time for a rank to write why it ended."""

UNHEARD_S = 10.0
"""The holder says that it is there every few seconds. After so long without, a launcher without ranks is ended: its
host is cut off, its ranks have seen that, and it may wait for others that it cannot reach for much longer."""

UNHEARD_AT_ALL_S = 300.0
"""After so long everything is ended."""

ORPHANS_S = 1.0
"""How long what is left of a command that has ended may take to see that and end by itself."""

NOTED_S = 2.0
"""How long a launcher may stay after dtrain has written why it ended: mpirun waits for a host that is cut off."""

EXIT_FILE = "DTRAIN_EXIT_FILE"
"""As in launchers.py, which cannot be imported here."""

DRAIN_S = 2.0
"""How long the rest of the output may take once the command has ended."""


class Leash:
    """One command and its leash."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._say, self._heard_s = threading.Lock(), time.monotonic()
        self._note = Path(spec["note"]) if spec.get("note") else None
        self._before = _stamp(self._note)
        self._own_folder = tempfile.TemporaryDirectory(prefix="dtrain-end-")
        self._own_note = Path(self._own_folder.name) / "exit.json"
        self._launcher_takes = frozenset(spec.get("launcher_takes", ()))
        self._note_is_end = bool(spec.get("note_is_end"))
        # Ranks of torchrun are in sessions of their own; as their subreaper this process keeps them as children.
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._child = subprocess.Popen(
            spec["argv"],
            cwd=spec["cwd"],
            env=self._environment(spec["env"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def _environment(self, given: dict[str, str]) -> dict[str, str]:
        """With the tools of this Python's .venv on the path, as a shell there would have them: DeepSpeed calls ninja."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "PATH": path, **given, EXIT_FILE: str(self._own_note)}

    def run(self) -> None:
        """Until the command has ended and nothing that it started is left."""
        readers = [
            threading.Thread(target=self._pass_on, args=(stream, name), daemon=True)
            for stream, name in ((self._child.stdout, "out"), (self._child.stderr, "err"))
        ]
        for target in (self._obey, self._miss):
            threading.Thread(target=target, daemon=True).start()
        for thread in readers:
            thread.start()
        code = self._wait()
        _wait_for_descendants(ORPHANS_S)  # dtrain's ranks end with their launcher, and say so
        _end_descendants(kill=False)
        for reader in readers:
            reader.join(DRAIN_S)
        _end_descendants(kill=True)
        self._write({"end": {"code": code, "note": self._read_note(code)}})
        self._own_folder.cleanup()

    def _wait(self) -> int:
        """The exit code; dtrain's, of a launcher that stays after dtrain has written why it ended."""
        noted_s: float | None = None
        while True:
            try:
                return self._child.wait(timeout=0.25)
            except subprocess.TimeoutExpired:
                note = self._read_note(1) if self._note_is_end else None
            if note is not None and note["code"]:
                noted_s = noted_s or time.monotonic()
                if time.monotonic() > noted_s + NOTED_S:
                    _end_descendants(kill=False)
                    return int(note["code"])

    def _pass_on(self, stream: BinaryIO, name: str) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(stream.fileno(), 65536):
            if text := decoder.decode(chunk):
                self._write({name: text})

    def _obey(self) -> None:
        """Orders, until the leash ends."""
        for line in sys.stdin:
            self._heard_s = time.monotonic()
            try:
                order = json.loads(line)
            except ValueError:  # cut off in its middle: whoever wrote it is gone
                order = {"kill": True}
            if "signal" in order:
                self._signal(order["signal"])
            elif "here" in order:
                self._write(order)
            elif "kill" in order:
                break
        else:
            self._signal(signal.SIGTERM)
            time.sleep(GRACE_S)
        _end_descendants(kill=True)

    def _miss(self) -> None:
        """Ends what is cut off from who holds the leash."""
        alone_s = 0
        while True:
            time.sleep(1.0)
            alone_s = alone_s + 1 if _descendants() == [self._child.pid] else 0
            unheard_s = time.monotonic() - self._heard_s
            if unheard_s > UNHEARD_AT_ALL_S or (unheard_s > UNHEARD_S and alone_s > 1):
                _end_descendants(kill=False)

    def _signal(self, number: int) -> None:
        """To the launcher where it passes the signal on to its ranks, or has none yet; else to these, its children."""
        ranks = [] if number in self._launcher_takes else _children().get(self._child.pid, [])
        for pid in ranks or [self._child.pid]:
            _kill(pid, number)

    def _read_note(self, code: int) -> dict[str, Any] | None:
        """What dtrain wrote about its end, if it did so in this job: in the run folder, or before there was one."""
        if self._note is not None and _stamp(self._note) not in (None, self._before):
            return _object_in(self._note)
        return _object_in(self._own_note) if code else None  # a later start of the job may have mended it

    def _write(self, frame: dict[str, Any]) -> None:
        with self._say:
            try:
                sys.stdout.write(json.dumps(frame) + "\n")
                sys.stdout.flush()
            except OSError:  # nobody listens any more: the leash ends as well
                return


def _object_in(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _stamp(path: Path | None) -> tuple[int, int] | None:
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _children() -> dict[int, list[int]]:
    """Children of each process."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # A name may be cut in the middle of a character.
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:  # it has just ended
                continue
            if fields[0] != b"Z":
                found.setdefault(int(fields[1]), []).append(int(entry.name))
    return found


def _descendants() -> list[int]:
    children, found, new = _children(), [], [os.getpid()]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def _end_descendants(*, kill: bool) -> None:
    """Ends everything below this process; with `kill` it is gone when this returns, but for what the kernel holds."""
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
    except (ProcessLookupError, PermissionError):  # of another user: a program with the setuid bit
        return


def main() -> None:
    """Reads what to run, and runs it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # sshd sends it to who has a terminal; the leash says enough
    spec = json.loads(sys.stdin.readline() or "null")
    if spec is None:
        return
    sys.stdout.write("\n")  # what a login script has printed may lack its end of line
    sys.stdout.flush()
    try:
        leash = Leash(spec)
    except OSError as error:
        message = f"{error.strerror}: {error.filename}"
        sys.stdout.write(json.dumps({"end": {"code": 127, "note": None, "problem": message}}) + "\n")
        return
    leash.run()


if __name__ == "__main__":
    main()

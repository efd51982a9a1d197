"""The supervisor of one host's command: everything that the command started ends with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.run_job import SUPERVISOR
from dtrain.distributed.process_info import read_stat
from tests.support.jobs import until

pytestmark = pytest.mark.launchers

LONG = "import time; time.sleep(600)"

NEST = """
import os, subprocess, sys
# a launcher whose rank is in its own session and ignores SIGTERM
rank = "import signal, time, os; signal.signal(15, lambda *_: None); os.write(1, b'%d\\\\n' % os.getpid()); "
subprocess.Popen([sys.executable, "-c", rank + "[time.sleep(1) for _ in range(600)]"], start_new_session=True)
os.write(1, b"%d\\n" % os.getpid())  # print writes the number and the newline separately
import time; time.sleep(600)
"""


@contextmanager
def _supervisor(folder: Path, source: str, **spec: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(SUPERVISOR)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    complete = {"argv": [sys.executable, "-u", "-c", source], "env": {}, "cwd": str(folder), "exit_file": None, **spec}
    process.stdin.write(json.dumps(complete) + "\n")
    process.stdin.flush()
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"  # ends a line that a login script left open
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=20)
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def _send(process: subprocess.Popen[str], order: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()


def _close_and_read(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Closes its input and returns its frames until it ends. `communicate` would lose what readline has read ahead."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already
        process.stdin.close()
    return _frames_to_end(process)


def _frames_to_end(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Returns its frames until it ends by itself."""
    assert process.stdout is not None
    return [json.loads(line) for line in process.stdout]


def _pids(process: subprocess.Popen[str], count: int) -> list[int]:
    assert process.stdout is not None
    pids: list[int] = []
    while len(pids) < count:
        pids += map(int, json.loads(process.stdout.readline())["out"].split())
    return pids


def _is_gone(pid: int) -> bool:
    fields = read_stat(pid)
    return fields is None or fields[0] in "ZX"


def test_output_exit_code_and_environment_are_passed_on_unchanged(tmp_path: Path) -> None:
    source = "import os, sys; print(os.environ['A'], os.getcwd()); sys.stderr.write('\\u732b'); sys.exit(3)"
    with _supervisor(tmp_path, source, env={"A": "$(touch x);'", "PYTHONIOENCODING": "utf-8"}) as process:
        frames = _frames_to_end(process)
    assert "".join(frame.get("out", "") for frame in frames) == f"$(touch x);' {tmp_path}\n"
    assert "".join(frame.get("err", "") for frame in frames) == "\u732b"
    assert frames[-1] == {"end": {"code": 3, "record": None}}
    assert not (tmp_path / "x").exists()


def test_a_command_that_cannot_be_started_is_reported_with_the_reason(tmp_path: Path) -> None:
    with _supervisor(tmp_path, "", argv=["/no/such/program"]) as process:
        (frame,) = _close_and_read(process)
    assert frame["end"]["code"] == 127
    assert "No such file or directory: /no/such/program" in frame["end"]["problem"]


@pytest.mark.parametrize("end", ["input closed", "told to kill", "supervisor killed"])
def test_nothing_is_left_of_a_launcher_and_ranks_in_their_own_sessions(tmp_path: Path, end: str) -> None:
    with _supervisor(tmp_path, NEST) as process:
        pids = _pids(process, 2)
        if end == "told to kill":
            _send(process, {"kill": True})
        elif end == "supervisor killed":
            process.kill()
        frames = _close_and_read(process)
        gone = [pid for pid in pids if _is_gone(pid)]
    if end == "supervisor killed":
        assert until(lambda: any(_is_gone(pid) for pid in pids), 20)
        for pid in pids:  # unlike dtrain's ranks, this one does not end with its launcher
            if not _is_gone(pid):
                os.kill(pid, signal.SIGKILL)
        return
    assert gone == pids
    assert frames[-1]["end"]["code"] < 0


def test_a_signal_goes_to_the_launcher_only_if_that_forwards_it(tmp_path: Path) -> None:
    source = (
        "import os, signal, subprocess, sys, time\n"
        "handle = lambda name: signal.signal(signal.SIGUSR1, lambda *_: (os.write(1, name), os._exit(7)))\n"
        "child = os.fork()\n"
        "handle(b'rank' if child == 0 else b'launcher')\n"
        "os.write(1, b'0\\n')\n"  # print writes the number and the newline separately
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1])) if child else time.sleep(600)\n"
    )
    for signals, receiver in (([signal.SIGUSR1], "launcher"), ([], "rank")):
        with _supervisor(tmp_path, source, launcher_signals=signals) as process:
            _pids(process, 2)
            _send(process, {"signal": signal.SIGUSR1})
            frames = _frames_to_end(process)
        assert "".join(frame.get("out", "") for frame in frames).strip() == receiver
        assert frames[-1]["end"]["code"] == 7


def test_only_an_exit_file_of_this_job_counts(tmp_path: Path) -> None:
    exit_file = tmp_path / "exit.json"
    exit_file.write_text('{"code": 5}')
    with _supervisor(tmp_path, "pass", exit_file=str(exit_file)) as process:
        assert _frames_to_end(process)[-1]["end"]["record"] is None
    with _supervisor(
        tmp_path, f"open({str(exit_file)!r}, 'w').write('{{\"code\": 3}}')", exit_file=str(exit_file)
    ) as process:
        assert _frames_to_end(process)[-1]["end"]["record"] == {"code": 3}
    with _supervisor(tmp_path, f"open({str(exit_file)!r}, 'w').write('[')", exit_file=str(exit_file)) as process:
        assert _frames_to_end(process)[-1]["end"]["record"] is None


def test_an_exit_file_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    """A host with a folder of its own: only rank 0's host, another one, writes a new exit.json there."""
    exit_file = tmp_path / "exit.json"
    source = (
        f"import os, socket; orders = socket.socket(fileno=int(os.environ['DTRAIN_ORDERS_FD'])).makefile('rw'); "
        f"open({str(exit_file)!r}, 'w').write('{{\"code\": 4}}'); print(end='x', flush=True); orders.readline()"
    )
    with _supervisor(tmp_path, source, exit_file=str(exit_file), takes_orders=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"out": "x"}
        _send(process, {"order": {"start": {"restart": 1}}})
        assert _frames_to_end(process)[-1]["end"] == {"code": 0, "record": None}

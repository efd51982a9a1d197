"""The far end of a job's part: what it runs ends with it, however it is told, and whatever that has started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.run_job import LEASH
from dtrain.distributed.process_info import read_stat
from tests.support.jobs import until

pytestmark = pytest.mark.launchers

LONG = "import time; time.sleep(600)"

NEST = """
import os, subprocess, sys
# a launcher whose rank is in a session of its own, and deaf to SIGTERM
rank = "import signal, time, os; signal.signal(15, lambda *_: None); os.write(1, b'%d\\\\n' % os.getpid()); "
subprocess.Popen([sys.executable, "-c", rank + "[time.sleep(1) for _ in range(600)]"], start_new_session=True)
os.write(1, b"%d\\n" % os.getpid())  # print writes the number and the end of its line one by one
import time; time.sleep(600)
"""


@contextmanager
def _leash(folder: Path, source: str, **spec: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(LEASH)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    given = {"argv": [sys.executable, "-u", "-c", source], "env": {}, "cwd": str(folder), "note": None, **spec}
    process.stdin.write(json.dumps(given) + "\n")
    process.stdin.flush()
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"  # ends what a login script left unended
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def _say(process: subprocess.Popen[str], order: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()


def _rest(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Its frames until it ends, with the end of its own leash."""
    said, _ = process.communicate(timeout=30)
    return [json.loads(line) for line in said.splitlines()]


def _rest_while_held(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Its frames until it ends by itself."""
    assert process.stdout is not None
    return [json.loads(line) for line in process.stdout]


def _pids(process: subprocess.Popen[str], count: int) -> list[int]:
    assert process.stdout is not None
    found: list[int] = []
    while len(found) < count:
        found += map(int, json.loads(process.stdout.readline())["out"].split())
    return found


def _is_gone(pid: int) -> bool:
    fields = read_stat(pid)
    return fields is None or fields[0] in "ZX"


def test_output_exit_code_and_environment_come_back_as_they_were(tmp_path: Path) -> None:
    source = "import os, sys; print(os.environ['A'], os.getcwd()); sys.stderr.write('\\u732b'); sys.exit(3)"
    with _leash(tmp_path, source, env={"A": "$(touch x);'", "PYTHONIOENCODING": "utf-8"}) as process:
        frames = _rest_while_held(process)
    assert "".join(frame.get("out", "") for frame in frames) == f"$(touch x);' {tmp_path}\n"
    assert "".join(frame.get("err", "") for frame in frames) == "\u732b"
    assert frames[-1] == {"end": {"code": 3, "note": None}}
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    with _leash(tmp_path, "", argv=["/no/such/program"]) as process:
        (frame,) = _rest(process)
    assert frame["end"]["code"] == 127
    assert "No such file or directory: /no/such/program" in frame["end"]["problem"]


@pytest.mark.parametrize("way", ["held by nobody", "told to kill", "killed itself"])
def test_nothing_is_left_of_a_launcher_and_ranks_in_their_own_sessions(tmp_path: Path, way: str) -> None:
    with _leash(tmp_path, NEST) as process:
        pids = _pids(process, 2)
        if way == "told to kill":
            _say(process, {"kill": True})
        elif way == "killed itself":
            process.kill()
        frames = _rest(process)
        launcher_gone = [pid for pid in pids if _is_gone(pid)]
    if way == "killed itself":
        assert until(lambda: any(_is_gone(pid) for pid in pids), 20)
        for pid in pids:  # dtrain's ranks end with their launcher; this one knows nothing of that
            if not _is_gone(pid):
                os.kill(pid, signal.SIGKILL)
        return
    assert launcher_gone == pids
    assert frames[-1]["end"]["code"] < 0


def test_a_signal_goes_to_the_launcher_only_where_that_passes_it_on(tmp_path: Path) -> None:
    source = (
        "import os, signal, subprocess, sys, time\n"
        "say = lambda who: signal.signal(signal.SIGUSR1, lambda *_: (os.write(1, who), os._exit(7)))\n"
        "child = os.fork()\n"
        "say(b'rank' if child == 0 else b'launcher')\n"
        "os.write(1, b'0\\n')\n"  # print writes the number and the end of its line one by one
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1])) if child else time.sleep(600)\n"
    )
    for takes, who in (([signal.SIGUSR1], "launcher"), ([], "rank")):
        with _leash(tmp_path, source, launcher_takes=takes) as process:
            _pids(process, 2)
            _say(process, {"signal": signal.SIGUSR1})
            frames = _rest_while_held(process)
        assert "".join(frame.get("out", "") for frame in frames).strip() == who
        assert frames[-1]["end"]["code"] == 7


def test_only_a_note_of_this_job_counts(tmp_path: Path) -> None:
    note = tmp_path / "exit.json"
    note.write_text('{"code": 5}')
    with _leash(tmp_path, "pass", note=str(note)) as process:
        assert _rest_while_held(process)[-1]["end"]["note"] is None
    with _leash(tmp_path, f"open({str(note)!r}, 'w').write('{{\"code\": 3}}')", note=str(note)) as process:
        assert _rest_while_held(process)[-1]["end"]["note"] == {"code": 3}
    with _leash(tmp_path, f"open({str(note)!r}, 'w').write('[')", note=str(note)) as process:
        assert _rest_while_held(process)[-1]["end"]["note"] is None

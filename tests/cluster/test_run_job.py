"""Jobs with several commands on this machine, without ssh: how they end together, and what must not disturb them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster import round_watch
from dtrain.cluster import run_job as run
from dtrain.cluster.job_outcome import JobOutcome
from dtrain.cluster.rounds import RoundHost, RoundPlan
from dtrain.cluster.run_job import HostCommand, MultiHostJob, run_job
from tests.support.jobs import ROOT, until

pytestmark = pytest.mark.launchers

HOSTS = ("localhost", "127.0.0.1", "127.0.0.2")
LONG = "import time; time.sleep(600)"


class CollectedOutput:
    """An output sink that collects all text."""

    def __init__(self) -> None:
        self.text = ""

    def show(self, index: int, frame: Mapping[str, str]) -> None:
        self.text += "".join(frame.values())

    def finish(self) -> None:
        """Does nothing."""


def _job(folder: Path, *sources: str, **more: Any) -> MultiHostJob:
    commands = [
        HostCommand(host, [sys.executable, "-u", "-c", source], {})
        for host, source in zip(HOSTS, sources, strict=False)
    ]
    return MultiHostJob("a launcher", commands, folder, **more)


def _add_login_script(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Makes every host run a script before the command."""
    real = run.start_on

    def start(host: str, argv: Sequence[str]) -> Any:
        return real(host, ["sh", "-c", f'{script}; exec "$@"', "sh", *argv])

    monkeypatch.setattr(run, "start_on", start)


def _later(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Acts once the condition holds, in another thread, while the job runs in this one."""

    def wait() -> None:
        assert until(condition, 20)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("script", ["echo 3", "echo null", "printf welcome", 'echo "[1]"'])
def test_the_output_of_a_login_script_is_shown_and_does_no_harm(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_login_script(monkeypatch, script)
    output = CollectedOutput()
    outcome = run_job(_job(tmp_path, "print('done')", "import sys; sys.exit(3)"), output=output)
    assert (outcome.code, outcome.message) == (
        3,
        "127.0.0.1: a launcher exited with code 3; its output above gives the reason.",
    )
    assert "done\n" in output.text
    assert script.split()[1].strip('"') in output.text


def test_a_connection_that_ends_without_the_commands_result_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_login_script(monkeypatch, "exit 0")
    assert run_job(_job(tmp_path, "pass"), output=CollectedOutput()).code == 4


def test_a_process_name_that_is_not_valid_text_does_no_harm(tmp_path: Path) -> None:
    name = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xe8\\xae\\xad\\xe7', 0, 0, 0)"
    assert run_job(_job(tmp_path, f"{name}; print('done')"), output=CollectedOutput()) == JobOutcome(0, "")


def test_a_failure_before_there_is_a_run_folder_has_its_own_code_and_message(tmp_path: Path) -> None:
    record = {"code": 3, "cause": "DataError", "rank": 0, "host": "here", "message": "here: no such file"}
    write = f"import os, sys; open(os.environ['DTRAIN_EXIT_FILE'], 'w').write({json.dumps(record)!r}); sys.exit"
    failed = run_job(_job(tmp_path, f"{write}(1)", LONG), output=CollectedOutput())
    assert (failed.code, failed.message) == (3, "here: no such file")
    # If the launcher succeeds, a restart within the job has succeeded.
    assert run_job(_job(tmp_path, f"{write}(0)"), output=CollectedOutput()).code == 0


def test_a_launcher_that_keeps_running_after_its_ranks_have_ended_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun does this: it waits for its daemon on a host that is cut off."""
    record = {"code": 4, "cause": "TopologyError", "rank": 1, "host": "node2", "message": "node2 hangs"}
    source = f"open('exit.json', 'w').write({json.dumps(record)!r}); {LONG}"
    job = _job(tmp_path, source, exit_file=tmp_path / "exit.json", ends_with_exit_file=True)
    begin = time.monotonic()
    assert run_job(job, output=CollectedOutput()) == JobOutcome(4, "node2 hangs")
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("min_hosts", "sources", "code"),
    [
        (None, ("import sys; sys.exit(1)", LONG), 1),
        (2, ("print('done')", "import sys; sys.exit(1)", "print('done')"), 0),
        (2, (LONG, "import sys; sys.exit(1)"), 1),
        (1, ("import sys; sys.exit(1)", LONG), 1),  # the first host is the master
    ],
    ids=["fixed", "enough remain", "too few remain", "the first is lost"],
)
def test_a_job_ends_when_too_few_hosts_remain(
    min_hosts: int | None, sources: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SETTLE_S", 0.5)
    begin = time.monotonic()
    assert run_job(_job(tmp_path, *sources, min_hosts=min_hosts), output=CollectedOutput()).code == code
    assert time.monotonic() - begin < 15


def test_a_signal_reaches_a_launcher_that_has_no_ranks_yet(tmp_path: Path) -> None:
    started = tmp_path / "started"
    source = f"open({str(started)!r}, 'w'); {LONG}"
    _later(started.exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run_job(_job(tmp_path, source), output=CollectedOutput())
    assert (outcome.code, outcome.stop_signal) == (128 + signal.SIGTERM, signal.SIGTERM)
    assert "was stopped by SIGTERM as requested" in outcome.message


def test_a_job_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    started, released = tmp_path / "started", tmp_path / "released"
    wait = "import os, time\nwhile not os.path.exists({!r}): time.sleep(0.01)"
    source = f"open({str(started)!r}, 'w')\n" + wait.format(str(released))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _later(started.exists, lambda: (os.kill(os.getpid(), signal.SIGHUP), released.touch()))
        assert run_job(_job(tmp_path, source), output=CollectedOutput()) == JobOutcome(0, "")
    finally:
        signal.signal(signal.SIGHUP, before)


class _Stream:
    """A standard stream with a given `write`."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write

    def flush(self) -> None:
        """Does nothing."""

    def fileno(self) -> int:
        raise OSError("none")


def test_a_job_continues_when_its_output_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", _Stream(fail))
    outcome = run_job(_job(tmp_path, "for _ in range(3): print('a line')"))
    monkeypatch.undo()
    assert outcome == JobOutcome(0, "")


def test_a_blocked_terminal_does_not_block_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, stopped, released = tmp_path / "started", tmp_path / "stopped", threading.Event()
    stop = f"lambda *_: (open({str(stopped)!r}, 'w'), sys.exit(75))"
    source = f"import signal, sys; signal.signal(15, {stop}); print('started'); open({str(started)!r}, 'w'); {LONG}"
    monkeypatch.setattr("sys.stdout", _Stream(lambda text: released.wait(20)))
    _later(started.exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    _later(stopped.exists, released.set)
    outcome = run_job(_job(tmp_path, source))
    monkeypatch.undo()
    assert released.is_set()
    assert outcome.code == 75


def test_lines_of_several_hosts_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    printer = run._Printer(["node1", "node2"])
    for index, frame in [
        (0, {"out": "step 1"}),
        (1, {"out": "one\ntw"}),
        (1, {"out": "o\n"}),
        (0, {"err": "50 %"}),
        (0, {"err": " 60 %"}),
    ]:
        printer.show(index, frame)
    printer.finish()
    printed = capsys.readouterr()
    assert printed.out == "step 1\nnode2: one\nnode2: two\n"
    assert printed.err == "50 % 60 %\n"


@pytest.mark.parametrize("script", ["torchrun", "deepspeed", "mpirun"])
def test_files_in_the_users_folder_do_not_hide_modules(script: str, tmp_path: Path) -> None:
    for name in ("queue.py", "secrets.py", "dtrain/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong file')\n")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    ended = subprocess.run(
        [str(ROOT / "launch" / f"{script}.sh"), "hosts", "--dry-run", "train.max_steps=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"localhost$ cd {tmp_path} && ")


# ---------------------------------------------------------------- launchers that take orders

LAUNCHER = """
import json, os, socket, sys, time
with socket.socket(fileno=int(os.environ["DTRAIN_ORDERS_FD"])).makefile("rw") as orders:
    def report(**fields):
        print(json.dumps(fields), file=orders, flush=True)
    report(ready="host")
    for order in map(json.loads, orders):
        if "listen" in order:
            report(listening=1)
        elif "start" in order:
            report(ended=order["start"]["restart"], code=0, failure="")
        elif "finish" in order:
            break
"""
SLOW_END = f"{LAUNCHER}time.sleep(1.0)"


def _with_rounds(folder: Path, *sources: str, spares: int = 0, **more: Any) -> MultiHostJob:
    hosts = [RoundHost(host, host, 1, is_spare=index >= len(sources) - spares) for index, host in enumerate(HOSTS)]
    return _job(folder, *sources, rounds=RoundPlan(hosts[: len(sources)], 0, 1), **more)


def test_a_spare_host_that_cannot_start_its_launcher_does_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SETTLE_S", 0.1)
    job = _with_rounds(tmp_path, LAUNCHER, SLOW_END, "import sys; sys.exit(2)", spares=1)
    assert run_job(job, output=CollectedOutput()) == JobOutcome(0, "")
    job = _with_rounds(tmp_path, f"import time; time.sleep(1){LAUNCHER}", SLOW_END, "raise SystemExit(2)", spares=1)
    assert run_job(job, output=CollectedOutput()) == JobOutcome(0, "")


def test_a_job_that_is_stopped_before_there_are_ranks_does_not_succeed(tmp_path: Path) -> None:
    waits = "import os, signal, sys; signal.signal(15, lambda *_: sys.exit(0)); open(f'{os.getpid()}.up', 'w'); signal.pause()"
    stop = _later(lambda: len(list(tmp_path.glob("*.up"))) == 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run_job(_with_rounds(tmp_path, waits, waits), output=CollectedOutput())
    stop.join()
    assert (outcome.code, outcome.message) == (75, "Stopped by SIGTERM before there were ranks: nothing is lost.")


def test_a_host_with_a_slow_login_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_watch, "LOST_AFTER_S", 0.8)
    _add_login_script(monkeypatch, f"mkdir {tmp_path / 'first'} 2>/dev/null || sleep 2")
    assert run_job(_with_rounds(tmp_path, LAUNCHER, LAUNCHER), output=CollectedOutput()) == JobOutcome(0, "")

"""Jobs of several parts on this machine, without ssh: how they end together, and what may not disturb them."""

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

from dtrain.cluster import run_job as run
from dtrain.cluster.job_outcome import Outcome
from dtrain.cluster.run_job import Job, Part, run_job
from tests.support.jobs import ROOT, until

pytestmark = pytest.mark.launchers

HOSTS = ("localhost", "127.0.0.1", "127.0.0.2")
LONG = "import time; time.sleep(600)"


class Kept:
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.text = ""

    def show(self, place: int, frame: Mapping[str, str]) -> None:
        self.text += "".join(frame.values())

    def finish(self) -> None:
        """Nothing is open."""


def _job(folder: Path, *sources: str, **more: Any) -> Job:
    parts = [Part(host, [sys.executable, "-u", "-c", source], {}) for host, source in zip(HOSTS, sources, strict=False)]
    return Job("a launcher", parts, folder, **more)


def _behind_a_login_script(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """What every host prints, or does, before the command begins."""
    real = run.start_on

    def start(host: str, argv: Sequence[str]) -> Any:
        return real(host, ["sh", "-c", f'{script}; exec "$@"', "sh", *argv])

    monkeypatch.setattr(run, "start_on", start)


def _later(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Acts once the condition holds, while the job runs in this thread."""

    def wait() -> None:
        assert until(condition, 20)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("said", ["echo 3", "echo null", "printf welcome", 'echo "[1]"'])
def test_what_a_login_script_prints_is_shown_and_harms_nothing(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _behind_a_login_script(monkeypatch, said)
    kept = Kept()
    found = run_job(_job(tmp_path, "print('done')", "import sys; sys.exit(3)"), screen=kept)
    assert (found.code, found.message) == (3, "127.0.0.1: a launcher ended with 3; above it said why.")
    assert "done\n" in kept.text
    assert said.split()[1].strip('"') in kept.text


def test_a_connection_that_ends_well_without_the_end_of_the_command_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _behind_a_login_script(monkeypatch, "exit 0")
    assert run_job(_job(tmp_path, "pass"), screen=Kept()).code == 4


def test_a_process_with_a_name_that_is_no_text_disturbs_nothing(tmp_path: Path) -> None:
    name = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xe8\\xae\\xad\\xe7', 0, 0, 0)"
    assert run_job(_job(tmp_path, f"{name}; print('done')"), screen=Kept()) == Outcome(0, "")


def test_an_end_before_the_run_has_a_folder_has_its_own_code_and_cause(tmp_path: Path) -> None:
    note = {"code": 3, "cause": "DataError", "rank": 0, "host": "here", "message": "here: no such file"}
    write = f"import os, sys; open(os.environ['DTRAIN_EXIT_FILE'], 'w').write({json.dumps(note)!r}); sys.exit"
    failed = run_job(_job(tmp_path, f"{write}(1)", LONG), screen=Kept())
    assert (failed.code, failed.message) == (3, "here: no such file")
    assert run_job(_job(tmp_path, f"{write}(0)"), screen=Kept()).code == 0  # a later start of it has mended that


def test_a_launcher_that_stays_after_its_ranks_have_ended_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mpirun does, whose daemon on a host that is cut off never says good-bye."""
    note = {"code": 4, "cause": "TopologyError", "rank": 1, "host": "node2", "message": "node2 hangs"}
    source = f"open('exit.json', 'w').write({json.dumps(note)!r}); {LONG}"
    job = _job(tmp_path, source, note=tmp_path / "exit.json", note_is_end=True)
    begin = time.monotonic()
    assert run_job(job, screen=Kept()) == Outcome(4, "node2 hangs")
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("least", "sources", "code"),
    [
        (None, ("import sys; sys.exit(1)", LONG), 1),
        (2, ("print('done')", "import sys; sys.exit(1)", "print('done')"), 0),
        (2, (LONG, "import sys; sys.exit(1)"), 1),
        (1, ("import sys; sys.exit(1)", LONG), 1),  # the first, where the others meet
    ],
    ids=["fixed", "enough are left", "too few are left", "the first is lost"],
)
def test_a_job_ends_when_too_few_parts_are_left(
    least: int | None, sources: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SETTLE_S", 0.5)
    begin = time.monotonic()
    assert run_job(_job(tmp_path, *sources, least=least), screen=Kept()).code == code
    assert time.monotonic() - begin < 15


def test_a_signal_reaches_a_launcher_that_has_no_ranks_yet(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    source = f"open({str(begun)!r}, 'w'); {LONG}"
    _later(begun.exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    found = run_job(_job(tmp_path, source), screen=Kept())
    assert (found.code, found.asked) == (128 + signal.SIGTERM, signal.SIGTERM)
    assert "was ended by SIGTERM, as you asked" in found.message


def test_a_job_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    begun, told = tmp_path / "begun", tmp_path / "told"
    wait = "import os, time\nwhile not os.path.exists({!r}): time.sleep(0.01)"
    source = f"open({str(begun)!r}, 'w')\n" + wait.format(str(told))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _later(begun.exists, lambda: (os.kill(os.getpid(), signal.SIGHUP), told.touch()))
        assert run_job(_job(tmp_path, source), screen=Kept()) == Outcome(0, "")
    finally:
        signal.signal(signal.SIGHUP, before)


class _Stream:
    """A standard stream: `write` does what it is told."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write

    def flush(self) -> None:
        """Nothing is kept."""

    def fileno(self) -> int:
        raise OSError("none")


def test_a_job_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", _Stream(fail))
    found = run_job(_job(tmp_path, "for _ in range(3): print('a line')"))
    monkeypatch.undo()
    assert found == Outcome(0, "")


def test_a_terminal_that_is_held_up_holds_nothing_else_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stopped, released = tmp_path / "begun", tmp_path / "stopped", threading.Event()
    stop = f"lambda *_: (open({str(stopped)!r}, 'w'), sys.exit(75))"
    source = f"import signal, sys; signal.signal(15, {stop}); print('begun'); open({str(begun)!r}, 'w'); {LONG}"
    monkeypatch.setattr("sys.stdout", _Stream(lambda text: released.wait(20)))
    _later(begun.exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    _later(stopped.exists, released.set)
    found = run_job(_job(tmp_path, source))
    monkeypatch.undo()
    assert released.is_set()
    assert found.code == 75


def test_lines_of_several_parts_do_not_run_into_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    screen = run._Printed(["node1", "node2"])
    for place, frame in [
        (0, {"out": "step 1"}),
        (1, {"out": "one\ntw"}),
        (1, {"out": "o\n"}),
        (0, {"err": "50 %"}),
        (0, {"err": " 60 %"}),
    ]:
        screen.show(place, frame)
    screen.finish()
    said = capsys.readouterr()
    assert said.out == "step 1\nnode2: one\nnode2: two\n"
    assert said.err == "50 % 60 %\n"


@pytest.mark.parametrize("script", ["torchrun", "deepspeed", "mpirun"])
def test_what_lies_in_the_users_folder_hides_nothing(script: str, tmp_path: Path) -> None:
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

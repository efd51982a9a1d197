"""One writer per run folder: the owner, refused starts, and stale locks."""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.config.load import load_config
from dtrain.config.schema import Config
from dtrain.distributed.heartbeat import HEARTBEAT_BYTES, Heartbeat, read_heartbeat
from dtrain.distributed.process_info import ProcessIdentity, is_alive, process_start, read_stat, this_process
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.runs import lock as run_lock
from dtrain.runs.folder import RunFolder, folder_state
from dtrain.runs.lock import LOCK, LockOwner, is_held_by_another_job, locked, read_lock
from dtrain.training.run_claim import claimed

HEARTBEAT_PERIOD_S = 0.02
ROOT = Path(__file__).parents[2]
NOBODY = 2**22 + 1
"""No process has this number: it is above Linux's maximum."""


def owner(**changes: Any) -> LockOwner:
    """Returns the owner of another job, which ran in the same place as this test unless `changes` differ."""
    return LockOwner(this_process()._replace(**changes), "train", "2026-01-02 03:04:05 UTC", "0123")


def leave_lock(folder: Path, whose: LockOwner | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(whose if isinstance(whose, str) else whose.as_text())
    return folder


@contextmanager
def touched(file: Path) -> Iterator[None]:
    """Sends heartbeats for a job that runs elsewhere."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_PERIOD_S / 4):
            os.utime(file)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()


def at_once(work: Callable[[int], Any], times: int) -> list[Any]:
    """Runs `work` in several threads that start together. Returns each one's result or error."""
    ready, over, found = threading.Barrier(times), threading.Barrier(times), [None] * times

    def run(number: int) -> None:
        ready.wait(timeout=20)
        try:
            with work(number) as found[number]:
                over.wait(timeout=20)
        except ConfigError as error:
            found[number] = error  # type: ignore[call-overload]
            over.wait(timeout=20)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Returns the log's lines so far."""
    monkeypatch.setattr(logging.getLogger("dtrain"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    return lambda: "\n".join(caplog.messages)


# ---------------------------------------------------------------- one job


def test_the_lock_names_its_owner_and_is_removed_when_the_job_ends(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()

    with locked(folder, command="train"):
        record = json.loads((folder / LOCK).read_text())
        assert [entry.name for entry in folder.iterdir()] == [LOCK]

    own = this_process()
    assert {name: record[name] for name in ProcessIdentity._fields} == own._asdict()
    assert record["command"] == "train"
    assert abs(time.mktime(time.strptime(record["since"], "%Y-%m-%d %H:%M:%S UTC")) - time.mktime(time.gmtime())) < 60
    assert list(folder.iterdir()) == []


def test_the_lock_is_removed_when_the_job_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path, command="train"):
        raise KeyboardInterrupt

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_created_only_for_the_lock_is_removed_with_it(tmp_path: Path) -> None:
    with locked(tmp_path / "deep" / "one", command="train"):
        pass
    with locked(tmp_path / "two", command="train"):
        (tmp_path / "two" / "metrics.jsonl").write_text("")

    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == []
    assert [entry.name for entry in (tmp_path / "two").iterdir()] == ["metrics.jsonl"]


def test_a_start_succeeds_while_another_one_that_fails_removes_its_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text, removed = Path.write_text, []

    def write_after_removal(path: Path, *args: Any, **kwargs: Any) -> int:
        if len(removed) < 3:
            removed.append(path.parent)
            path.parent.rmdir()  # what another start does between our mkdir and our first file
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_after_removal)

    with locked(tmp_path / "run", command="train") as held:
        current = read_lock(tmp_path / "run")

    assert len(removed) == 3
    assert current is not None
    assert current.owner == held


def test_the_heartbeat_updates_the_lock_while_the_job_runs(tmp_path: Path) -> None:
    with locked(tmp_path, command="train", period_s=HEARTBEAT_PERIOD_S):
        os.utime(tmp_path / LOCK, ns=(0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime_ns == 0 and time.monotonic() < deadline:
            time.sleep(HEARTBEAT_PERIOD_S)
        assert (tmp_path / LOCK).stat().st_mtime_ns > 0


def test_the_heartbeat_changes_the_lock_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utime = os.utime

    def stands_still(file: Path, ns: tuple[int, int] | None = None) -> None:
        utime(file, ns=ns or (10**18, 10**18))

    monkeypatch.setattr(os, "utime", stands_still)
    with locked(tmp_path, command="train", period_s=HEARTBEAT_PERIOD_S):
        seen: set[int] = set()
        deadline = time.monotonic() + 10
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add((tmp_path / LOCK).stat().st_mtime_ns)

    assert len(seen) >= 3


def test_a_stalled_job_whose_folder_was_taken_over_ends_and_leaves_the_others_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, other = threading.Event(), owner(host="node7")
    monkeypatch.setattr(run_lock, "_exit_after_loss", lambda _folder, who, _tell: ended.set() if who == other else None)

    with locked(tmp_path, command="train", period_s=HEARTBEAT_PERIOD_S):
        leave_lock(tmp_path, other)
        assert ended.wait(10)

    assert read_lock(tmp_path).owner == other  # type: ignore[union-attr]


def test_a_job_that_has_lost_its_folder_disowns_it_and_reports_why_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    ended, over = threading.Event(), threading.Event()
    other, memory = owner(host="node7"), mmap.mmap(-1, HEARTBEAT_BYTES)
    heartbeat = Heartbeat(memory)

    def end(code: int) -> None:
        told.append(code)
        ended.set()
        over.wait(10)

    monkeypatch.setattr(os, "_exit", end)
    heartbeat.on_run_dir_lost = told.append
    with locked(tmp_path, command="train", period_s=HEARTBEAT_PERIOD_S, on_loss=heartbeat.lose_run_dir) as own:
        heartbeat.claim_run_dir(own.id)
        before = read_heartbeat(memory).owns_run_dir
        leave_lock(tmp_path, other)
        assert ended.wait(10)
    over.set()

    assert (before, read_heartbeat(memory).owns_run_dir) == (True, False)
    words, code = told
    assert (
        words
        == f"{tmp_path} was taken over by {other} while this job was stalled. It ends: only one of them may write."
    )
    assert code == 4
    assert is_held_by_another_job(tmp_path, own.id)


# ---------------------------------------------------------------- two jobs


def test_a_second_job_is_refused_naming_the_owner_its_start_and_the_fix(tmp_path: Path) -> None:
    with locked(tmp_path, command="evaluate"):
        since = json.loads((tmp_path / LOCK).read_text())["since"]
        with pytest.raises(ConfigError) as refused, locked(tmp_path, command="train"):
            pass
        assert (tmp_path / LOCK).exists()

    own = this_process()
    assert f"in use by process {own.pid} on {own.host} (evaluate, since {since})" in str(refused.value)
    assert "Wait until that job ends, or stop it; or choose another run.name" in str(refused.value)


@pytest.mark.parametrize("lies_there", ["nothing", "a stale lock"])
@pytest.mark.parametrize("links", [True, False])
def test_exactly_one_of_simultaneous_starts_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies_there: str, links: bool
) -> None:
    def no_links(*_args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for turn in range(10):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if lies_there == "a stale lock":
            leave_lock(folder, owner(pid=NOBODY))

        found = at_once(lambda _, folder=folder: locked(folder, command="train", period_s=10 * HEARTBEAT_PERIOD_S), 6)

        assert sorted(type(each).__name__ for each in found) == ["ConfigError"] * 5 + ["LockOwner"]
        assert list(folder.iterdir()) == []


def successor_of(folder: Path, name: str = LOCK) -> str:
    current = read_lock(folder, name)
    assert current is not None
    return current.successor


def leave_successors(folder: Path, *owners: LockOwner) -> Path:
    """Leaves a stale lock and what processes leave that are killed while they take it over, one after another."""
    leave_lock(folder, owner(pid=NOBODY))
    name = LOCK
    for each in owners:
        name = successor_of(folder, name)
        (folder / name).write_text(each.as_text())
    return folder


def test_the_slower_of_two_starts_that_replace_a_stale_lock_is_refused(tmp_path: Path) -> None:
    living = owner()
    leave_successors(tmp_path, living)  # the other start is replacing it

    with pytest.raises(ConfigError) as refused, locked(tmp_path, command="train"):
        pass

    assert f"is in use by {living}" in str(refused.value)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("killed", [1, 2])
def test_a_start_that_was_killed_while_it_took_over_a_lock_is_succeeded(tmp_path: Path, killed: int) -> None:
    dead = [owner(pid=NOBODY + number) for number in range(1, killed + 1)]
    leave_successors(tmp_path, *dead)

    with locked(tmp_path, command="train") as own:
        assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]
        assert read_lock(tmp_path).owner == own  # type: ignore[union-attr]

    assert list(tmp_path.iterdir()) == []


def test_a_start_that_saw_the_lock_before_it_was_replaced_takes_nothing_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, living, link = owner(pid=NOBODY), owner(), os.link

    def replaced(source: Path, target: Path) -> None:
        if "next" in Path(target).name:  # another host was faster, and its successor file is gone again
            monkeypatch.setattr(os, "link", link)
            leave_lock(tmp_path, living)
        link(source, target)

    leave_lock(tmp_path, stale)
    monkeypatch.setattr(os, "link", replaced)

    with pytest.raises(ConfigError, match="is in use by process"), locked(tmp_path, command="train"):
        pass

    assert read_lock(tmp_path).owner == living  # type: ignore[union-attr]
    assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]


def test_an_owner_that_ends_leaves_the_lock_to_a_start_that_is_taking_it_over(tmp_path: Path) -> None:
    with locked(tmp_path, command="train") as own:
        other = owner(host="node7")
        (tmp_path / successor_of(tmp_path)).write_text(other.as_text())

    assert read_lock(tmp_path).owner == own  # type: ignore[union-attr]
    assert len(list(tmp_path.iterdir())) == 2


def errors_once(monkeypatch: pytest.MonkeyPatch, function: str, number: int, *, does_it: bool) -> list[str]:
    """Lets a function of `os` fail once, after it has done its work or before. Returns a list of its failures."""
    real, failed = getattr(os, function), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        if failed:
            return real(*args, **kwargs)
        failed.append(function)
        if does_it:
            real(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    return failed


@pytest.mark.parametrize("lies_there", ["nothing", "a stale lock"])
def test_a_link_that_a_file_server_made_but_answered_with_an_error_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies_there: str
) -> None:
    if lies_there == "a stale lock":
        leave_lock(tmp_path, owner(pid=NOBODY))
    real, calls = os.link, []

    def link(source: Path, target: Path) -> None:
        calls.append(Path(target).name)
        real(source, target)
        raise FileExistsError(errno.EEXIST, "the client has sent it twice")

    monkeypatch.setattr(os, "link", link)
    with locked(tmp_path, command="train") as own:
        assert read_lock(tmp_path).owner == own  # type: ignore[union-attr]
        assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]

    assert len(calls) >= 2


def test_a_rename_that_a_file_server_made_but_answered_with_an_error_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lock(tmp_path, owner(pid=NOBODY))
    failed = errors_once(monkeypatch, "replace", errno.ENOENT, does_it=True)

    with locked(tmp_path, command="train") as own:
        assert read_lock(tmp_path).owner == own  # type: ignore[union-attr]

    assert failed
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_another_host_has_just_replaced_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = owner()
    leave_lock(tmp_path, living)
    failed = errors_once(monkeypatch, "fstat", errno.ESTALE, does_it=True)

    with pytest.raises(ConfigError, match="is in use by process"), locked(tmp_path, command="train"):
        pass

    assert failed == ["fstat"]


STRESS = """
import os, random, sys, time
from pathlib import Path
from dtrain.distributed.process_info import ProcessIdentity, is_alive, this_process
from dtrain.errors import ConfigError
from dtrain.runs.lock import locked
folder, marker, seconds, links = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "True"
until = time.monotonic() + seconds

def no_links(*_):
    raise PermissionError(1, "Operation not permitted")

def own(number):
    random.seed(number)
    while time.monotonic() < until:
        try:
            with locked(folder, command="train", period_s=0.05):
                text = ":".join(map(str, this_process()))
                draft = marker.with_name(f"{os.getpid()}")
                draft.write_text(text)
                draft.replace(marker)
                print("won", flush=True)
                for _ in range(random.randrange(4)):
                    time.sleep(0)
                    if marker.read_text() != text:
                        print("two owners", flush=True)
                if random.random() < 0.5 and links:
                    os.kill(os.getpid(), 9)
        except ConfigError:
            pass

os.makedirs(folder, exist_ok=True)
if not links:
    os.link = no_links
children = {}
number = 0
while time.monotonic() < until:
    while len(children) < 8:
        number += 1
        pid = os.fork()
        if pid == 0:
            own(number)
            os._exit(0)
        children[pid] = number
    # Without links a killed start may leave an empty lock, which is watched for a while.
    if random.random() < (0.3 if links else 0.01):
        os.kill(random.choice(list(children)), 9)
    pid, _ = os.waitpid(-1, os.WNOHANG)
    if pid:
        del children[pid]
    time.sleep(0.002)
for pid in children:
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("links", [True, False])
def test_there_are_never_two_owners_while_processes_are_killed_at_any_moment(tmp_path: Path, links: bool) -> None:
    command = [sys.executable, "-c", STRESS, str(tmp_path / "run"), str(tmp_path / "marker"), "2.5", str(links)]

    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)

    assert said.returncode == 0, said.stderr
    assert "two owners" not in said.stdout
    assert said.stdout.count("won") > 20, said.stderr[-500:]


# ---------------------------------------------------------------- stale or not


@pytest.mark.parametrize("changes", [{"pid": NOBODY}, {"started": "1"}], ids=["gone", "its number is another's"])
def test_the_lock_of_a_dead_process_is_taken_over_immediately_and_logged(
    tmp_path: Path, changes: dict[str, Any], said: Callable[[], str]
) -> None:
    dead = owner(**changes)
    leave_lock(tmp_path, dead)
    begin = time.monotonic()

    with locked(tmp_path, command="train"):
        taken_after_s = time.monotonic() - begin
        assert read_lock(tmp_path).owner.process == this_process()  # type: ignore[union-attr]

    assert taken_after_s < 30  # waiting for a heartbeat would take 60 s
    assert said() == f"{tmp_path}: took over the lock of {dead}, whose process is gone"
    assert "2026-01-02 03:04:05 UTC" in said()


ELSEWHERE = [
    pytest.param({"host": "node7"}, id="another host"),
    pytest.param({"pid_namespace": 4}, id="a container"),
    pytest.param({"boot": "0000"}, id="another machine of that name"),
]


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_heartbeat_of_an_invisible_process_keeps_the_folder(tmp_path: Path, where: dict[str, Any]) -> None:
    leave_lock(tmp_path, owner(pid=NOBODY, **where))

    with (
        touched(tmp_path / LOCK),
        pytest.raises(ConfigError, match="is in use by process"),
        locked(tmp_path, command="train", period_s=10 * HEARTBEAT_PERIOD_S),
    ):
        pass

    assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("where", ELSEWHERE)
def test_an_invisible_process_is_considered_dead_after_12_periods_without_a_heartbeat(
    tmp_path: Path, where: dict[str, Any], said: Callable[[], str]
) -> None:
    leave_lock(tmp_path, owner(**where))  # the number of a running process, but not of the owner
    os.utime(tmp_path / LOCK, ns=(2**62, 2**62))  # the clock of its host is far ahead
    begin = time.monotonic()

    with locked(tmp_path, command="train", period_s=HEARTBEAT_PERIOD_S):
        waited_s = time.monotonic() - begin

    assert waited_s >= 12 * HEARTBEAT_PERIOD_S
    assert "waiting 0.24 s for a heartbeat" in said()
    assert "had no heartbeat for 0.24 s" in said()


def test_a_start_that_was_stopped_itself_does_not_count_that_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lock(tmp_path, owner(host="node7"))
    now, sleeps = [0.0], []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        now[0] += 3600.0 if len(sleeps) == 1 else seconds  # the file server does not answer for an hour
        if len(sleeps) == 4:
            os.utime(tmp_path / LOCK)  # the owner's heartbeats, too, waited for it

    # Not the functions of `time` itself: a thread of another test may sleep meanwhile.
    monkeypatch.setattr(
        run_lock, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0], "sleep": sleep})
    )
    with pytest.raises(ConfigError, match="is in use by process"), locked(tmp_path, command="train"):
        pass

    assert len(sleeps) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '"train"', '{"host": "a", "pid": "x"}', "\udcff"])
def test_an_invalid_lock_is_watched_like_that_of_an_invisible_process(tmp_path: Path, text: str) -> None:
    tmp_path.joinpath(LOCK).write_bytes(text.encode(errors="surrogateescape"))

    with (
        touched(tmp_path / LOCK),
        pytest.raises(ConfigError, match=r"in use by a job that its run\.lock does not name"),
        locked(tmp_path, command="train", period_s=10 * HEARTBEAT_PERIOD_S),
    ):
        pass
    with locked(tmp_path, command="train", period_s=HEARTBEAT_PERIOD_S):
        assert read_lock(tmp_path).owner is not None  # type: ignore[union-attr]


def test_a_lock_that_changes_its_owner_while_it_is_watched_keeps_the_folder(tmp_path: Path) -> None:
    leave_lock(tmp_path, owner(host="node7"))
    watched = threading.Timer(HEARTBEAT_PERIOD_S, leave_lock, args=(tmp_path, owner()))
    watched.start()
    try:
        with pytest.raises(ConfigError, match="in use by"), locked(tmp_path, command="train", period_s=1.0):
            pass
    finally:
        watched.join()


def test_is_alive_is_unknown_for_invisible_processes() -> None:
    own = this_process()

    assert is_alive(own) is True
    assert is_alive(own._replace(started="1")) is False
    assert is_alive(own._replace(pid=NOBODY)) is False
    assert [is_alive(own._replace(**where)) for where in ({"host": "x"}, {"boot": "x"}, {"pid_namespace": 1})] == [
        None
    ] * 3
    assert is_alive(own._replace(pid=1, started="x")) in (False, None)


def test_the_age_of_this_process_is_known() -> None:
    now = time.monotonic()

    assert 0 < now - process_start() < 24 * 3600
    assert process_start() == pytest.approx(process_start(), abs=1.0)


def test_a_folder_is_held_by_another_job_that_is_or_may_be_alive(tmp_path: Path) -> None:
    own, parent = owner(), os.getppid()
    fields = read_stat(parent)
    assert fields is not None
    living = owner(pid=parent, started=fields[19])

    def held_by_another(whose: LockOwner | str, lock: str) -> bool:
        return is_held_by_another_job(leave_lock(tmp_path, whose), lock)

    assert not is_held_by_another_job(tmp_path / "none", "")
    assert not is_held_by_another_job(tmp_path, own.id)
    assert held_by_another(living, "")
    assert held_by_another(living, "another id")
    assert not held_by_another(living, living.id)  # rank 1 reads the lock of its rank 0
    assert not held_by_another(own, "")  # this process has just taken it
    assert not held_by_another(owner(pid=NOBODY), "another id")
    assert held_by_another(owner(host="node7"), "another id")
    assert held_by_another("{", "another id")


# ---------------------------------------------------------------- with the run folder


def config_for(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, [f"run.output_dir={tmp_path}", "run.name=one", *overrides])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_lock_does_not_count_as_content(tmp_path: Path) -> None:
    leave_lock(tmp_path / "one", owner())
    assert folder_state(tmp_path / "one") == "absent"

    (tmp_path / "one" / "thesis.tex").write_text("")
    assert folder_state(tmp_path / "one") == "foreign"

    (tmp_path / "one" / "metrics.jsonl").write_text("")
    assert folder_state(tmp_path / "one") == "unfinished"


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "inspect"])
def test_a_second_start_of_any_command_changes_nothing_in_a_folder_in_use(tmp_path: Path, command: str) -> None:
    config = config_for(tmp_path, "run.overwrite=true")
    with claimed(config, ONE_PROCESS, command="train"):
        folder = RunFolder(config.run_dir)
        folder.metrics.write_text('{"event": "start"}\n')
        before = bytes_of(folder.path)

        with (
            pytest.raises(ConfigError, match="is in use by process") as refused,
            claimed(config, ONE_PROCESS, command=command),
        ):
            pass

        assert refused.value.exit_code == 2
        assert refused.value.is_recorded is False
        assert bytes_of(folder.path) == before

    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]
    assert not (folder.path / LOCK).exists()


def test_overwriting_moves_the_old_run_and_keeps_the_lock(tmp_path: Path) -> None:
    config = config_for(tmp_path, "run.overwrite=true")
    RunFolder(config.run_dir).path.mkdir()
    RunFolder(config.run_dir).metrics.write_text('{"event": "start"}\n')

    with claimed(config, ONE_PROCESS, command="train") as start:
        old = next(tmp_path.glob("one.old-*"))
        assert start.action == "start"
        assert sorted(entry.name for entry in config.run_dir.iterdir()) == [".run-id", "config.yaml", LOCK]
        assert [entry.name for entry in old.iterdir()] == ["metrics.jsonl"]
        with pytest.raises(ConfigError, match="is in use"), claimed(config, ONE_PROCESS, command="train"):
            pass

    assert sorted(entry.name for entry in config.run_dir.iterdir()) == [".run-id", "config.yaml"]


def test_a_start_while_the_old_run_is_moved_gets_the_new_folder(tmp_path: Path) -> None:
    moved = leave_lock(tmp_path / "one.old", owner())
    leave_lock(tmp_path / "one", owner(pid=77))

    with pytest.raises(ConfigError, match="was just taken by process 77"):
        run_lock.move_lock(moved, tmp_path / "one")


def test_all_ranks_know_the_lock_that_rank_0_holds(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    config = config_for(tmp_path)

    with claimed(config, replace(ONE_PROCESS, heartbeat=heartbeat), command="train"):
        held = read_lock(config.run_dir)

    assert held is not None
    assert held.owner is not None
    assert heartbeat.lock_id == held.owner.id


def test_the_exit_cause_of_an_earlier_start_is_removed_if_the_run_is_finished(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    with claimed(config, ONE_PROCESS, command="train"):
        folder = RunFolder(config.run_dir)
        folder.metrics.write_text('{"event": "start"}\n')
        folder.model.mkdir()
        (folder.model / "config.json").write_text("{}")
        table = json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
        (folder.model / "model.safetensors").write_bytes(len(table).to_bytes(8, "little") + table)
        folder.summary.write_text('{"eval": {}}')
    folder.exit.write_text('{"code": 1, "cause": "Interrupted"}')

    with claimed(config, ONE_PROCESS, command="train") as start:
        assert start.action == "already_finished"
        assert not folder.exit.exists()


def test_a_refused_folder_is_not_changed(tmp_path: Path) -> None:
    foreign = config_for(tmp_path, "run.name=foreign")
    foreign.run_dir.mkdir()
    (foreign.run_dir / "thesis.tex").write_text("years of work")
    before = foreign.run_dir.stat().st_mtime_ns

    with (
        pytest.raises(ConfigError, match=r"thesis\.tex, which dtrain did not write"),
        claimed(foreign, ONE_PROCESS, command="train"),
    ):
        pass

    assert bytes_of(foreign.run_dir) == {"thesis.tex": b"years of work"}
    assert foreign.run_dir.stat().st_mtime_ns == before


def test_a_read_only_folder_raises_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path)
    config.run_dir.mkdir()

    def read_only(path: Path, *_args: Any, **_more: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", read_only)  # permissions do not apply to root, who may run this test

    said = r"the run folder .*one cannot be written: .*Read-only.*Set run\.output_dir"
    with pytest.raises(ConfigError, match=said), claimed(config, ONE_PROCESS, command="train"):
        pass


def test_a_run_name_outside_the_output_folder_is_refused(tmp_path: Path) -> None:
    for name in ("../one", "..", "a/b", "/etc", ".hidden", "a\\b", ""):
        with pytest.raises(ConfigError, match="a run name is one folder"):
            load_config(None, [f"run.output_dir={tmp_path}", f"run.name={json.dumps(name)}"])


def test_the_lock_of_a_host_that_the_job_has_lost_is_taken_over_at_once(tmp_path: Path) -> None:
    leave_lock(tmp_path, owner(host="node7"))
    with locked(tmp_path, command="train", period_s=1000.0, lost_hosts=["node6", "node7"]) as own:
        state = read_lock(tmp_path)
        assert state is not None
        assert state.owner == own

"""How a rank ends: whom it blames, where it writes that down, and who prints it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dtrain import main
from dtrain.config.load import load_config
from dtrain.config.schema import Config
from dtrain.distributed.process_info import this_process
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.distributed.topology import Topology
from dtrain.errors import DtrainError, Interrupted, TopologyError
from dtrain.job import failure, session
from dtrain.job.failure import Job, _is_told_for_another, end_of, hand_over, own_peer, report, write_down
from dtrain.job.watchdog.client import News
from dtrain.runs.lock import LOCK, LockOwner


@dataclass
class Heard:
    """A watch that has heard of something, or of nothing. told: what its rank has said."""

    heard: News | None
    told: list[str] = field(default_factory=list)

    def news(self, _within_s: float) -> News | None:
        return self.heard

    def failing(self, words: str, _code: int, *, by_signal: bool) -> None:
        self.told.append(words)

    def stay_quiet(self) -> None:
        pass


class Board:
    """A store in memory."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.lock = threading.Lock()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)

    def get(self, key: str) -> bytes:
        return self.held[key].encode()

    def set(self, key: str, value: str) -> None:
        self.held[key] = value

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            self.held[key] = str(int(self.held.get(key, "0")) + amount)
            return int(self.held[key])

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        with self.lock:
            if self.held.get(key, "") == expected_value:
                self.held[key] = desired_value
            return self.held[key].encode()


def two(rank: int) -> RankContext:
    return RankContext(Topology(rank, 2, rank, 2, 0, 1, "none", "127.0.0.1", 1))


def config_in(tmp_path: Path) -> Config:
    config = load_config(None, [f"run.output_dir={tmp_path}", "run.name=one"])
    config.run_dir.mkdir()
    return config


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The log's lines so far. Signals stay as they are."""
    monkeypatch.setattr(logging.getLogger("dtrain"), "propagate", True)
    monkeypatch.setattr(failure, "ignore_further", lambda: None)
    caplog.set_level(logging.INFO, logger="dtrain")
    return lambda: caplog.messages


DIED = News(1, "node1", "Rank 1 died.", 4, by_signal=False)


@pytest.mark.parametrize(
    ("error", "heard", "follows"),
    [
        (Interrupted("Stopped by SIGTERM."), DIED, True),
        (Interrupted("Stopped by SIGTERM."), DIED._replace(by_signal=True), False),
        (Interrupted("Stopped by SIGTERM."), None, False),
        (DtrainError("its own"), DIED, False),
    ],
)
def test_a_rank_told_to_end_after_another_has_died_ends_because_of_that(
    error: BaseException, heard: News | None, follows: bool
) -> None:
    watch: Any = Heard(heard)

    assert _is_told_for_another(error, Job(ONE_PROCESS, None, [], watch)) is follows


@pytest.mark.parametrize(("lock", "written"), [("0123", True), ("", False), ("4567", False)])
def test_the_end_of_a_start_is_not_written_into_a_folder_in_which_another_job_works(
    tmp_path: Path, lock: str, written: bool
) -> None:
    config, context = config_in(tmp_path), two(1)
    other = LockOwner(this_process()._replace(host="node7"), "train", "2026-01-02 03:04:05 UTC", "0123")
    (config.run_dir / LOCK).write_text(other.as_text())
    context.heartbeat.own_folder(lock)

    write_down(end_of(Interrupted("Stopped by SIGINT."), context), config, context.heartbeat)

    assert (config.run_dir / "exit.json").exists() is written


LOST = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"


@pytest.mark.usefixtures("said")
def test_python_code_that_started_a_run_hears_which_rank_is_gone(tmp_path: Path) -> None:
    config, watch = config_in(tmp_path), Heard(DIED)
    job = Job(two(0), Board(), [own_peer(), own_peer()], watch)  # type: ignore[arg-type]

    lost = hand_over(RuntimeError(LOST), config, job)

    assert isinstance(lost, TopologyError)
    assert str(lost) == "Rank 1 died."
    assert watch.told == [], "a rank that follows is no cause"
    end = json.loads((config.run_dir / "exit.json").read_text())
    assert (end["code"], end["cause"], end["rank"], end["message"]) == (4, "TopologyError", 1, "Rank 1 died.")


@pytest.mark.usefixtures("said")
def test_python_code_that_started_a_run_hears_its_own_error_and_the_others_are_told(tmp_path: Path) -> None:
    config, watch = config_in(tmp_path), Heard(None)
    job = Job(two(0), Board(), [own_peer(), own_peer()], watch)  # type: ignore[arg-type]

    assert hand_over(ValueError("made"), config, job) is None
    assert watch.told == ["ValueError: made"]
    assert json.loads((config.run_dir / "exit.json").read_text())["message"] == "ValueError: made"


def test_a_traceback_that_is_the_same_on_all_ranks_is_printed_once(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    config, board, peers = config_in(tmp_path), Board(), [own_peer(), own_peer()]

    def fail(rank: int) -> None:
        job = Job(two(rank), board, peers, Heard(None))  # type: ignore[arg-type]
        try:
            raise ValueError("made on all ranks")
        except ValueError as error:
            report(error, config, job, is_noted=True, launcher_lives=lambda: True)

    ranks = [threading.Thread(target=fail, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=20)

    (line,) = said()
    assert line.startswith(f"Rank 0 on {peers[0].host} failed:\nTraceback (most recent call last):")
    assert line.endswith("ValueError: made on all ranks")


@contextmanager
def failing_session(*_args: Any, **_more: Any) -> Iterator[None]:
    raise OSError(28, "No space left on device")
    yield


def test_an_error_before_the_ranks_meet_is_written_down_and_printed_and_gives_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    monkeypatch.setattr(failure, "ignore_further", lambda: None)

    monkeypatch.setattr(session, "session", failing_session)

    code = main.main(["train", f"run.output_dir={tmp_path}", "run.name=one"])

    assert code == 1
    end = json.loads((config.run_dir / "exit.json").read_text())
    assert (end["code"], end["cause"], end["message"]) == (1, "OSError", "OSError: [Errno 28] No space left on device")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "error: Traceback (most recent call last):"
    assert printed[-1] == "OSError: [Errno 28] No space left on device"


def test_python_code_that_started_a_run_hears_an_error_before_the_ranks_meet_and_it_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    monkeypatch.setattr(session, "session", failing_session)

    with pytest.raises(OSError, match="No space left on device"):
        main.fit(config)

    assert json.loads((config.run_dir / "exit.json").read_text())["cause"] == "OSError"

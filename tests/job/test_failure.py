"""How a rank ends: which rank it names, where it writes that, and which rank prints it."""

from __future__ import annotations

import json
import logging
import socket
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
from dtrain.distributed.topology import SINGLE, Topology
from dtrain.errors import DeviceError, DtrainError, Interrupted, TopologyError
from dtrain.job import failure as failure_module
from dtrain.job import session
from dtrain.job.failure import (
    JobSession,
    _is_signal_after_failure,
    error_record,
    record_failure,
    report_failure,
    write_exit_json,
)
from dtrain.job.watchdog.client import PeerFailure
from dtrain.runs.lock import LOCK, LockOwner


@dataclass
class FakeWatchdog:
    """A watchdog client.

    Attributes:
        failure: the peer that has failed; None for none.
        reported: messages that its rank has reported.
    """

    failure: PeerFailure | None
    reported: list[str] = field(default_factory=list)

    def peer_failure(self, _timeout_s: float) -> PeerFailure | None:
        return self.failure

    def report_failure(self, message: str, _code: int, *, by_signal: bool) -> None:
        self.reported.append(message)

    def wait_if_silenced(self) -> None:
        pass


class MemoryStore:
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
    monkeypatch.setattr(failure_module, "ignore_further", lambda: None)
    caplog.set_level(logging.INFO, logger="dtrain")
    return lambda: caplog.messages


DIED = PeerFailure(1, "node1", "Rank 1 died.", 4, by_signal=False)


@pytest.mark.parametrize(
    ("error", "failure", "follows"),
    [
        (Interrupted("Stopped by SIGTERM."), DIED, True),
        (Interrupted("Stopped by SIGTERM."), DIED._replace(by_signal=True), False),
        (Interrupted("Stopped by SIGTERM."), None, False),
        (DtrainError("its own"), DIED, False),
    ],
)
def test_a_rank_told_to_end_after_another_has_died_ends_because_of_that(
    error: BaseException, failure: PeerFailure | None, follows: bool
) -> None:
    watchdog: Any = FakeWatchdog(failure)

    assert _is_signal_after_failure(error, JobSession(ONE_PROCESS, None, [], watchdog)) is follows


@pytest.mark.parametrize(("lock", "written"), [("0123", True), ("", False), ("4567", False)])
def test_the_end_of_a_start_is_not_written_into_a_folder_in_which_another_job_works(
    tmp_path: Path, lock: str, written: bool
) -> None:
    config, context = config_in(tmp_path), two(1)
    other = LockOwner(this_process()._replace(host="node7"), "train", "2026-01-02 03:04:05 UTC", "0123")
    (config.run_dir / LOCK).write_text(other.as_text())
    context.heartbeat.claim_run_dir(lock)

    write_exit_json(error_record(Interrupted("Stopped by SIGINT."), context), config, context.heartbeat)

    assert (config.run_dir / "exit.json").exists() is written


LOST = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"


@pytest.mark.usefixtures("said")
def test_python_code_that_started_a_run_hears_which_rank_is_gone(tmp_path: Path) -> None:
    config, watchdog = config_in(tmp_path), FakeWatchdog(DIED)
    job = JobSession(two(0), MemoryStore(), [this_process(), this_process()], watchdog)  # type: ignore[arg-type]

    lost = record_failure(RuntimeError(LOST), config, job)

    assert isinstance(lost, TopologyError)
    assert str(lost) == "Rank 1 died."
    assert watchdog.reported == [], "a rank that follows is no cause"
    end = json.loads((config.run_dir / "exit.json").read_text())
    assert (end["code"], end["cause"], end["rank"], end["message"]) == (4, "TopologyError", 1, "Rank 1 died.")


@pytest.mark.usefixtures("said")
def test_python_code_that_started_a_run_hears_its_own_error_and_the_others_are_told(tmp_path: Path) -> None:
    config, watchdog = config_in(tmp_path), FakeWatchdog(None)
    job = JobSession(two(0), MemoryStore(), [this_process(), this_process()], watchdog)  # type: ignore[arg-type]

    assert record_failure(ValueError("made"), config, job) is None
    assert watchdog.reported == ["ValueError: made"]
    assert json.loads((config.run_dir / "exit.json").read_text())["message"] == "ValueError: made"


def test_a_traceback_that_is_the_same_on_all_ranks_is_printed_once(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    config, store, processes = config_in(tmp_path), MemoryStore(), [this_process(), this_process()]

    def fail(rank: int) -> None:
        job = JobSession(two(rank), store, processes, FakeWatchdog(None))  # type: ignore[arg-type]
        try:
            raise ValueError("made on all ranks")
        except ValueError as error:
            report_failure(error, config, job, has_exit_json=True, is_launcher_alive=lambda: True)

    ranks = [threading.Thread(target=fail, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=20)

    (line,) = said()
    assert line.startswith(f"Rank 0 on {processes[0].host} failed:\nTraceback (most recent call last):")
    assert line.endswith("ValueError: made on all ranks")


@contextmanager
def failing_session(*_args: Any, **_more: Any) -> Iterator[None]:
    raise OSError(28, "No space left on device")
    yield


def test_an_error_before_the_ranks_meet_is_written_down_and_printed_and_gives_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    monkeypatch.setattr(failure_module, "ignore_further", lambda: None)

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


ECC = "CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`"


def test_a_fault_of_the_gpu_is_one_line_that_names_its_rank_and_host_on_every_rank(
    tmp_path: Path, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_module, "FINAL_MESSAGE_S", 0.0)  # there is no rank 0 to wait for
    config, store, processes = config_in(tmp_path), MemoryStore(), [this_process(), this_process()]
    faulty = JobSession(two(1), store, processes, FakeWatchdog(None))  # type: ignore[arg-type]
    host = socket.gethostname()

    report_failure(RuntimeError(ECC), config, faulty, has_exit_json=True, is_launcher_alive=lambda: True)

    end = json.loads((config.run_dir / "exit.json").read_text())
    line = end["message"].splitlines()[0]
    assert (end["rank"], end["cause"]) == (1, "DeviceError")
    assert line.startswith("The GPU's hardware failed")
    assert "hostfile" in line
    (printed,) = said()
    assert printed.splitlines() == [
        f"Rank 1 on {host} failed: {line}",
        "CUDA error: uncorrectable ECC error encountered",
    ]
    # Rank 0 sees only that NCCL lost a rank.
    failure = PeerFailure(1, host, line, 1, by_signal=False)
    follower = JobSession(two(0), store, processes, FakeWatchdog(failure))  # type: ignore[arg-type]
    lost = record_failure(
        RuntimeError("NCCL error: remote process exited or there was a network error"), config, follower
    )
    assert str(lost) == f"Rank 1 on {host} ended: {line}"


def test_one_process_needs_no_rank_in_the_message() -> None:
    record = error_record(RuntimeError(ECC), SINGLE)

    assert record.message.startswith("The GPU's hardware failed")
    assert record.code == 1


@pytest.mark.parametrize(
    ("text", "said_first"),
    [
        (
            "NCCL communicator was aborted on rank 1. WorkNCCL(...) timed out in call to wait().",
            "did not finish in time",
        ),
        (
            "ncclSystemError\nLast error:\nConnect to 10.0.0.2<45763> failed : Connection refused",
            "cannot reach another host",
        ),
        (
            "ncclRemoteError: Call to recv from 10.200.84.247<58355> failed : Connection reset by peer",
            "at 10.200.84.247:",
        ),
    ],
)
def test_a_lost_connection_of_nccl_whose_peer_lives_is_named_with_what_nccl_says(
    text: str, said_first: str, tmp_path: Path
) -> None:
    job = JobSession(two(0), MemoryStore(), [this_process(), this_process()], FakeWatchdog(None))  # type: ignore[arg-type]

    lost = record_failure(RuntimeError(text), config_in(tmp_path), job)

    assert lost is not None
    assert str(lost).startswith(f"Rank 0 on {socket.gethostname()}")
    assert said_first in str(lost).splitlines()[0]


def test_an_assert_on_the_device_keeps_its_traceback(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    error = RuntimeError("CUDA error: device-side assert triggered")
    job = JobSession(two(0), MemoryStore(), [this_process()], FakeWatchdog(None))  # type: ignore[arg-type]

    report_failure(error, config_in(tmp_path), job, has_exit_json=True, is_launcher_alive=lambda: True)

    (printed,) = said()
    lines = printed.splitlines()
    assert "RuntimeError: CUDA error: device-side assert triggered" in lines
    assert "a label, a token id or a position" in lines[-2]


def test_all_ranks_without_memory_print_one_message(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    config, store, processes = config_in(tmp_path), MemoryStore(), [this_process(), this_process()]
    store.compare_set("end/message", "", "The memory of the GPU is full.\nCUDA out of memory.")
    job = JobSession(two(1), store, processes, FakeWatchdog(None))  # type: ignore[arg-type]

    report_failure(
        DeviceError("The memory of the GPU is full.\nCUDA out of memory."),
        config,
        job,
        has_exit_json=True,
        is_launcher_alive=lambda: True,
    )

    assert said() == []

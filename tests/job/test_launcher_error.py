"""torchrun's own report, the last thing on the screen, names the cause."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dtrain.distributed.topology import SINGLE, Topology
from dtrain.errors import ConfigError
from dtrain.job.failure import error_record, write_exit_file
from dtrain.job.launcher_error import write_launcher_error
from tests.support import jobs


def test_torchrun_reads_the_file_and_takes_its_rank_for_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    write_launcher_error(file, "data.path=x does not exist.\nSecond line with $money and \u732b.")
    # torchrun ended rank 0 in the same second; that rank has no file, and torchrun lists it first.
    failures = {0: ProcessFailure(0, 10, -15, str(tmp_path / "none")), 1: ProcessFailure(1, 11, 3, str(file))}

    rank, failure = ChildFailedError("dtrain/main.py", failures).get_first_failure()
    report = ChildFailedError("dtrain/main.py", failures).format_msg()

    assert rank == 1
    assert abs(failure.timestamp - time.time()) < 60
    assert [line.strip() for line in report.splitlines()[-3:-1]] == [
        "traceback : data.path=x does not exist.",
        "Second line with $money and \u732b.",
    ]


def test_the_first_cause_stays_and_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "error.json"

    write_launcher_error(file, "first")
    write_launcher_error(file, "second")
    write_launcher_error(tmp_path / "no folder" / "error.json", "third")
    write_launcher_error(None, "fourth")

    assert json.loads(file.read_text())["message"]["message"] == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_only_torchruns_file_is_written_and_only_where_it_names_one(tmp_path: Path) -> None:
    torchrun = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
    }
    file = tmp_path / "error.json"
    named = Topology.from_env({**torchrun, "TORCHELASTIC_ERROR_FILE": str(file)})

    assert named.launcher_error_file == file
    assert Topology.from_env({**torchrun, "TORCHELASTIC_ERROR_FILE": ""}).launcher_error_file is None
    assert Topology.from_env(torchrun).launcher_error_file is None
    assert Topology.from_env({"TORCHELASTIC_ERROR_FILE": str(file)}).launcher_error_file is None
    write_exit_file(error_record(ConfigError("the cause"), SINGLE), replace(SINGLE, launcher_error_file=file))
    assert "the cause" in file.read_text()


@pytest.mark.launchers
def test_the_last_screen_under_torchrun_names_the_cause() -> None:
    job = jobs.run([*jobs.torchrun(), "train.max_steps=0"])

    last = job.text.rstrip().splitlines()[-9:]
    assert job.process.returncode == 1
    assert last[0].startswith("Root Cause"), job.text
    assert last[-2] == "  traceback : command line: train.max_steps=0: it must be a whole number, at least 1, or null."
    assert last[-1] == "=" * 60

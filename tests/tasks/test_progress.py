"""What a long preparation shows: a bar on a terminal, lines in the log without one, nothing if it is fast."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import datasets
import pytest

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.sources import Source
from dtrain.data.tables import BadRows
from dtrain.errors import DataError
from dtrain.tasks.prepare import map_rows
from dtrain.tasks.progress import progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_says_every_ten_seconds_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with (
        caplog.at_level(logging.INFO, logger="dtrain"),
        progress("train: rows tokenized", 5500, clock=clock) as advance,
    ):
        for seconds in (4, 10, 12, 19, 20, 29):
            clock.now = float(seconds)
            advance(1000)

    assert caplog.messages == [
        "data: train: rows tokenized: 2000 of 5500 (36 %)",
        "data: train: rows tokenized: 5000 of 5500 (91 %)",
    ]


def test_a_rank_that_does_not_report_shows_nothing_and_the_others_say_of_what(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.tasks.progress.LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, logger="dtrain"):
        for is_shown in (True, False):
            with progress("validation: rows", 4, of="evaluation", is_shown=is_shown) as advance:
                advance(2)
                advance(2)

    assert caplog.messages == ["evaluation: validation: rows: 2 of 4 (50 %)"]


def test_fast_data_shows_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    for stream in (io.StringIO(), terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        with caplog.at_level(logging.INFO, logger="dtrain"), progress("train: rows tokenized", 3000) as advance:
            for _ in range(3):
                advance(1000)

        assert (stream.getvalue().strip(), caplog.messages) == ("", [])


def test_a_terminal_gets_a_bar_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("dtrain.tasks.progress.QUIET_S", 0.0)
    with progress("train: rows tokenized", 3000) as advance:
        advance(1000)
        advance(1000)

    assert "train: rows tokenized:   0%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the bar is removed at the end"


@pytest.mark.parametrize("processes", [1, 2])
def test_encoding_counts_its_rows_and_leaves_the_librarys_bars_off(
    processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr("dtrain.tasks.progress.QUIET_S", 0.0)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"] * 2500}).save_to_disk(str(tmp_path))
    rows = datasets.load_from_disk(str(tmp_path))
    source = Source("train", rows, "a.csv", None, BadRows(0))
    config = Config.model_validate(
        {"run": {"name": "test"}, "task": {"name": "classification"}, "data": {"num_proc": processes}}
    )

    encoded = map_rows(source, lambda columns: {"length": [len(text) for text in columns["text"]]}, config)

    assert encoded["length"][:] == [1] * 2500
    assert ("train: rows tokenized" in terminal.getvalue()) == (processes == 1)
    assert datasets.are_progress_bars_disabled()


def count_and_wait(rows: Mapping[str, list[str]], lines: str) -> dict[str, list[int]]:
    """Encodes rows in another process. The last batches wait until a line was logged."""
    deadline = time.monotonic() + 30.0
    while rows["text"][0] == "late" and not Path(lines).exists() and time.monotonic() < deadline:
        Path(lines).parent.stat()
    return {"length": [len(text) for text in rows["text"]]}


def test_several_processes_log_how_far_they_are_all_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dtrain.tasks.progress.LOG_EVERY_S", 0.01)
    lines = tmp_path / "logged"
    monkeypatch.setattr(log, "info", lambda text, *values: lines.write_text(text % values))
    rows = datasets.Dataset.from_dict({"text": [*["a"] * 1000, *["late"] * 1000] * 2})
    rows.save_to_disk(str(tmp_path / "rows"))
    source = Source("train", datasets.load_from_disk(str(tmp_path / "rows")), "a.csv", None, BadRows(0))
    config = Config.model_validate(
        {"run": {"name": "test"}, "task": {"name": "classification"}, "data": {"num_proc": 2}}
    )

    map_rows(source, partial(count_and_wait, lines=str(lines)), config)

    assert lines.read_text().startswith("data: train: rows tokenized: ")
    assert lines.read_text().endswith(("000 of 4000 (25 %)", "000 of 4000 (50 %)", "000 of 4000 (75 %)"))


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(DataError), progress("train: rows tokenized", 3000):
        raise DataError("line 3")

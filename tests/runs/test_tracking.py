"""metrics.jsonl, TensorBoard, log lines and the progress bar."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from dtrain import console
from dtrain.console import log
from dtrain.runs.jsonl import read_metrics
from dtrain.runs.tracking import Tracker

VALUES: dict[str, Any] = {
    "step": 3,
    "epoch": 0.75,
    "loss": 0.5,
    "grad_norm": 2.0,
    "learning_rate": 1e-4,
    "examples": 8,
    "targets": 20,
    "applied": True,
}


def tracker(folder: Path, **changes: Any) -> Tracker:
    return Tracker(folder, **{"is_main": True, "total_steps": 9, "first_step": 0, "tensorboard": False, **changes})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger=log.name)
    return caplog


def test_a_train_event_has_the_documented_keys_and_a_speed(tmp_path: Path) -> None:
    with tracker(tmp_path) as open_tracker:
        open_tracker.step(8)
        open_tracker.train(**VALUES)

    (line,) = lines(tmp_path)
    assert line["event"] == "train"
    assert {key: line[key] for key in VALUES} == VALUES
    assert line["examples_per_second"] > 0
    assert line["time_s"] > 0


def test_the_speed_counts_the_steps_since_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dtrain.runs.tracking.time.monotonic", lambda: now[0])
    with tracker(tmp_path) as open_tracker:
        for _ in range(4):
            open_tracker.step(8)
        now[0] += 2.0
        open_tracker.train(**VALUES)
        open_tracker.step(8)
        now[0] += 1.0
        open_tracker.train(**{**VALUES, "step": 4})

    assert [line["examples_per_second"] for line in lines(tmp_path)] == pytest.approx([16.0, 8.0])


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_non_finite_number_is_written_as_text(tmp_path: Path, value: float, text: str) -> None:
    with tracker(tmp_path, tensorboard=True) as open_tracker:
        open_tracker.train(**{**VALUES, "loss": value, "grad_norm": value})
        open_tracker.evaluation(3, {"loss": value, "perplexity": value}, 0.5)

    train, evaluation = lines(tmp_path)
    assert (train["loss"], train["grad_norm"]) == (text, text)
    assert (evaluation["loss"], evaluation["perplexity"]) == (text, text)


def test_an_eval_line_holds_the_metrics_flat(tmp_path: Path) -> None:
    with tracker(tmp_path) as open_tracker:
        open_tracker.evaluation(6, {"loss": 0.25, "mismatched_accuracy": 0.5}, 1.5)

    (line,) = lines(tmp_path)
    assert {key: line[key] for key in ("event", "step", "loss", "mismatched_accuracy", "seconds")} == {
        "event": "eval",
        "step": 6,
        "loss": 0.25,
        "mismatched_accuracy": 0.5,
        "seconds": 1.5,
    }


def test_lines_are_on_disk_immediately_and_appended(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        first.event("start")
        assert len(lines(tmp_path)) == 1
    with tracker(tmp_path) as second:
        second.event("resume", step=3)

    assert [line["event"] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["start", "resume"]


def test_only_rank_0_writes(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    with tracker(tmp_path, is_main=False, tensorboard=True) as other:
        other.event("start")
        other.step(8)
        other.train(**VALUES)

    assert list(tmp_path.iterdir()) == []
    assert said.text == ""


def test_without_a_terminal_there_is_a_log_line_for_each_interval(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("dtrain.runs.tracking.time.monotonic", lambda: now[0])
    with tracker(tmp_path, first_step=1) as open_tracker:
        now[0] = 20.0  # two steps in 20 s; six are left
        open_tracker.train(**VALUES)
        open_tracker.train(**{**VALUES, "loss": math.nan})

    assert "step 3/9  epoch 0.75  loss 0.5000  grad_norm 2.000  lr 1.00e-04" in said.text
    assert "1:00 left" in said.text
    assert "loss nan" in said.text


def test_on_a_terminal_there_is_a_bar_and_the_log_handlers_are_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(log.handlers)
    console.configure_logging(rank=0, world_size=1)
    ours = list(log.handlers)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    try:
        with tracker(tmp_path) as open_tracker:
            assert log.handlers != ours
            open_tracker.step(8)
            open_tracker.train(**VALUES)
            log.info("a word in between")
        assert log.handlers == ours
    finally:
        log.handlers[:] = before

    shown = capsys.readouterr()
    assert "loss 0.5000" in shown.err
    assert "1/9" in shown.err
    assert "a word in between" in shown.out
    assert lines(tmp_path)[0]["step"] == 3


def test_a_failure_closes_the_files_and_restores_the_log(tmp_path: Path) -> None:
    handlers = list(log.handlers)

    open_tracker = tracker(tmp_path, tensorboard=True)

    def fails() -> None:
        with open_tracker:
            open_tracker.event("start")
            raise KeyError("made up")

    with pytest.raises(KeyError):
        fails()

    assert log.handlers == handlers
    with pytest.raises(ValueError, match="closed file"):
        open_tracker.event("late")


def test_tensorboard_gets_the_finite_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracker(tmp_path, tensorboard=True) as open_tracker:
        open_tracker.train(**VALUES)
        open_tracker.train(**{**VALUES, "step": 4, "loss": math.nan})
        open_tracker.evaluation(4, {"accuracy": 0.5}, 0.1)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/grad_norm", "train/learning_rate", "eval/accuracy"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/accuracy")] == [(4, 0.5)]

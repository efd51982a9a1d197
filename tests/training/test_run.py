"""What a run leaves running, and when."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.training import run
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import resuming


class StopIn:
    """Stops the run at a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, record: StepRecord) -> Decision:
        return Decision.STOP if record.step == self._step else Decision.CONTINUE


def test_data_workers_of_a_run_that_stops_early_end_with_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, workers = run.TrainingRun._finish, []

    def counting(self: run.TrainingRun) -> Any:
        workers.append(len(multiprocessing.active_children()))
        return finish(self)

    monkeypatch.setattr(run.TrainingRun, "_finish", counting)
    settings = resuming.settings(resuming.material(tmp_path), "run", {"data.workers": 1, "checkpoint.every": "null"})

    run_train(load_config(None, settings), ONE_PROCESS, monitors=[StopIn(2)])

    assert workers == [0]

"""train.time_every: what a run writes with it, and that nothing is measured without it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_config
from dtrain.data.batches import StepBatches
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import SINGLE
from dtrain.errors import ConfigError
from dtrain.training.step_account import StepAccount
from tests.support import jobs, training
from tests.support.command_line import dtrain
from tests.support.training import Setting


def account(every: int | None) -> tuple[StepAccount, RankContext]:
    setting, context = Setting(), RankContext(SINGLE)
    config = setting.config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"time_every": every})})
    tracker: Any = None
    prepared: Any = None
    return StepAccount(
        config, context, training.task(setting), prepared, tracker, lambda: pytest.fail("no engine yet")
    ), context


def no_steps() -> Generator[StepBatches, None, None]:
    yield from ()


def test_nothing_is_measured_or_counted_where_it_is_off() -> None:
    off, context = account(None)
    steps, before = no_steps(), context.heartbeat.on_phase

    assert off.watch(steps) is steps
    assert not off.monitors
    with off.measured():
        assert context.heartbeat.on_phase is before


def test_the_heartbeat_drives_the_clock_where_it_is_on() -> None:
    on, context = account(50)
    before = context.heartbeat.on_phase

    assert len(on.monitors) == 1
    with on.measured():
        assert context.heartbeat.on_phase is not before
    assert context.heartbeat.on_phase is before


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "always"])
def test_a_number_of_steps_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.time_every"):
        load_config(None, [f"train.time_every={value}"])


@pytest.mark.commands
def test_a_run_accounts_for_the_time_between_its_lines(tmp_path: Path) -> None:
    settings = jobs.settings(tmp_path, "timed", train__max_steps=7, train__eval_every=3, train__time_every=2)

    timed, plain = dtrain(*settings), dtrain(*settings, "run.name=plain", "train.time_every=null")

    assert (timed.code, plain.code) == (0, 0), timed.text + plain.text
    lines = jobs.read_events(tmp_path / "timed", "step_time")
    assert [(line["step"], line["steps"]) for line in lines] == [(2, 2), (4, 2), (6, 2), (7, 1)]
    assert [line["evaluation_s"][0] > 0 for line in lines] == [False, True, False, True], "in the line after it"
    (start,) = jobs.read_events(tmp_path / "timed", "start")
    assert 0 < sum(line["wall_s"] for line in lines) <= lines[-1]["monotonic_s"] - start["monotonic_s"]
    assert not jobs.read_events(tmp_path / "plain", "step_time")
    losses = [[event["loss"] for event in jobs.read_events(tmp_path / name)] for name in ("timed", "plain")]
    assert losses[0] == losses[1], "to look changes nothing"

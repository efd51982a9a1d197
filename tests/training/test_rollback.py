"""Where a run goes back to after a spike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint import select
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.training.rollback import Rollback


def test_a_spike_soon_after_a_rollback_takes_the_checkpoint_before_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [4, 8, 12, 16]

    def newest(_folder: Path, _context: Any, *, below: int | None) -> tuple[SelectedCheckpoint | None, frozenset[int]]:
        steps = [step for step in there if below is None or step < below]
        return (SelectedCheckpoint(steps[-1], [0], {}, "", None) if steps else None), frozenset()

    monkeypatch.setattr(select, "newest", newest)
    spike = "train.spike={factor: 3, window: 10, action: rollback}"
    config = load_config(None, [f"run.output_dir={tmp_path}", spike, "checkpoint.every=4"])
    rollback = Rollback(config, ONE_PROCESS)

    chosen = [rollback.choose(step) for step in (17, 18, 28, 38, 39, 60)]

    assert [None if each is None else each.step for each in chosen] == [16, 12, 8, 4, None, 16]

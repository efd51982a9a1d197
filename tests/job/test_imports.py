"""What a start imports, and that Python's garbage collector is off meanwhile."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.job.imports import without_collections
from tests.support import jobs

NOT_NEEDED = {
    "accelerate.test_utils",
    "deepspeed",
    "mpi4py",
    "peft",
    "rouge_score",
    "sacrebleu",
    "scipy.stats",
    "seqeval",
    "sklearn",
    "tensorboard",
    "torch._dynamo.backends.inductor",
    "torch.utils.tensorboard",
    "torchvision",
    "transformers.optimization",
    "transformers.trainer",
}
"""What the first step of a classification run does not need."""

MOST_MODULES = 4000
"""3,720 were there; 3,440 of them in a plain loop of transformers, datasets and torch."""

MOST_FULL_COLLECTIONS = 2
"""None was seen; with the collector on, 7."""

FIRST_STEP = """
import gc, json, pathlib, sys
from dtrain import main
from dtrain.runs.tracking import Tracker

def first_step(self, **values):
    found = {"modules": sorted(sys.modules), "is_on": gc.isenabled(), "kept": gc.get_freeze_count()}
    found["full_collections"] = gc.get_stats()[-1]["collections"]
    pathlib.Path(sys.argv[1]).write_text(json.dumps(found))

Tracker.train = first_step
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.fixture
def _kept_nothing() -> Any:
    yield
    gc.unfreeze()
    gc.enable()


def import_in_vain(*, keep: bool) -> None:
    with without_collections(keep=keep):
        assert not gc.isenabled()
        raise ImportError("no module")


@pytest.mark.usefixtures("_kept_nothing")
@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_the_collector_is_off_in_the_block_and_afterwards_as_before(was_on: bool, keep: bool) -> None:
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()

    with pytest.raises(ImportError):
        import_in_vain(keep=keep)

    assert gc.isenabled() == was_on
    assert (gc.get_freeze_count() > 0) == keep


@pytest.mark.commands
def test_the_first_step_has_imported_only_what_it_needs_and_without_collections(tmp_path: Path) -> None:
    found_at = tmp_path / "found.json"
    settings = jobs.settings(tmp_path / "runs", "start", train__max_steps=1, checkpoint__every="null")
    command = [sys.executable, "-c", FIRST_STEP, str(found_at), *settings]

    done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, timeout=jobs.LIMIT_S)

    assert done.returncode == 0, done.stderr
    found = json.loads(found_at.read_text(encoding="utf-8"))
    assert NOT_NEEDED & set(found["modules"]) == set()
    assert len(found["modules"]) < MOST_MODULES
    assert found["full_collections"] <= MOST_FULL_COLLECTIONS
    assert found["is_on"]
    assert found["kept"] > 100_000  # 714,000; 38,000 of them before torch

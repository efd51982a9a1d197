"""A signal at a given moment of a run: it saves, and the run that goes on is the one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.saver import Saver
from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import interruptible
from dtrain.errors import Preempted
from dtrain.tasks.classification import ClassificationTask
from dtrain.training import export, loop
from dtrain.training.checkpoints import CheckpointMonitor
from tests.support import resuming
from tests.support.multirank import run_ranks
from tests.support.resuming import STEPS, settings, weights_and_moments

pytestmark = pytest.mark.ranks

POINTS: dict[str, tuple[Any, str]] = {
    "a step": (loop, "take_step"),
    "the scores": (ClassificationTask, "score"),
    "the records": (ClassificationTask, "records"),
    "the metrics": (ClassificationTask, "metrics"),
    "a checkpoint": (CheckpointMonitor, "save"),
    "the wait for the writer": (Saver, "wait"),
    "an export": (export, "save"),
}
"""What is interrupted, and the function that a signal arrives in."""

BASE = {
    "evaluation.best": "{metric: accuracy}",
    "evaluation.micro_batch_size": 2,  # four of them: two for each of two ranks
    "train.eval_every": 3,
    "checkpoint.asynchronous": True,
}
EVERY = {"with the evaluation": 3, "elsewhere": 5, "never": "null"}


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("stopping"))


def start(
    context: RankContext, folder: str, name: str, changes: Mapping[str, Any], point: str, call: int, on_rank: int
) -> str:
    """Collective. One start, in which a signal arrives in the n-th call of a function, on one rank; tells how it ended."""
    calls = 0
    if point:
        owner, function = POINTS[point]
        real = getattr(owner, function)

        def interrupted(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += not more.get("config_only", False)  # what the start tries out is no export
            if calls == call and context.rank == on_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments, **more)

        setattr(owner, function, interrupted)
    config = load_config(None, settings(Path(folder), name, changes))
    with interruptible(grace_s=60.0, before_exit=print):
        try:
            run_train(config, context)
        except Preempted as stop:
            return str(stop).partition(" after step")[0]
    return "done"


def evaluations(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    timed = ("time_s", "monotonic_s", "seconds")
    return [{k: v for k, v in e.items() if k not in timed} for e in events if e["event"] == "eval"]


def result(folder: Path, name: str, *, has_checkpoints: bool = True) -> dict[str, Any]:
    """What a run leaves: weights, moments, the exported model, its evaluations and its best step."""
    run = folder / "runs" / name
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "moments": weights_and_moments(folder, name, STEPS) if has_checkpoints else {},
        "model": (run / "model" / "model.safetensors").read_bytes(),
        "losses": resuming.losses(folder, name),
        "evaluations": {event["step"]: event for event in evaluations(folder, name)},
        "summary": [summary[key] for key in ("eval", "step", "best_step", "updates")],
    }


def lives(
    folder: Path, name: str, world: int, changes: Mapping[str, Any], point: str = "", call: int = 1, on_rank: int = 0
) -> str:
    """A start with a signal, and one more that goes on if that stopped; returns how the first ended."""
    (ended, *_) = run_ranks(start, world, str(folder), name, dict(changes), point, call, on_rank)
    if ended == "Stopped":
        assert run_ranks(start, world, str(folder), name, dict(changes), "", 0, 0) == ["done"] * world
    return str(ended)


def steady(folder: Path, world: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    name = f"steady-{world}-{abs(hash(json.dumps(changes)))}"
    if not (folder / "runs" / name).exists():
        lives(folder, name, world, changes)
    return result(folder, name, has_checkpoints=changes["checkpoint.every"] != "null")


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("a step", 4),
        ("a step", STEPS),
        ("the scores", 1),
        ("the scores", 4),
        ("the records", 1),
        ("the metrics", 2),
        ("a checkpoint", 1),
        ("the wait for the writer", 2),
        ("an export", 1),
    ],
)
def test_a_run_that_goes_on_after_a_signal_ends_like_one_without(
    folder: Path, point: str, call: int, every: str
) -> None:
    changes = {**BASE, "checkpoint.every": EVERY[every]}
    if every == "never":  # then only checkpoint.every keeps the best step, as a warning says
        changes["evaluation.best"] = "null"
    name = f"{point}-{call}-{every}".replace(" ", "-")
    ended = lives(folder, name, 1, changes, point, call)

    assert result(folder, name, has_checkpoints=every != "never") == steady(folder, 1, changes)
    # A signal in the last step, or in the last checkpoint, may find nothing more to do than the end.
    assert ended == "Stopped" or (point, every) in (("a checkpoint", "never"), ("the wait for the writer", "never"))


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero 3": {"engine.zero_stage": 3},
    "local steps": {"train.local_steps": 3},
    "sharded": {"checkpoint.format": "sharded"},
}


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in list(ENGINES)[1:])])
@pytest.mark.parametrize(("point", "call"), [("the scores", 2), ("a step", 5), ("the records", 2), ("an export", 1)])
def test_a_signal_to_one_of_two_ranks_stops_both(folder: Path, point: str, call: int, engine: str) -> None:
    changes = {**BASE, "checkpoint.every": 3, **ENGINES[engine]}
    name = f"{engine}-{point}-{call}".replace(" ", "-")

    on_rank = 0 if point in ("an export", "the records") else 1  # rank 0 alone makes them
    assert lives(folder, name, 2, changes, point, call, on_rank=on_rank) == "Stopped"
    assert result(folder, name) == steady(folder, 2, changes)


def test_an_early_stop_that_a_signal_delays_still_comes(folder: Path) -> None:
    changes = {**BASE, "evaluation.best": "{metric: accuracy}", "train.early_stopping": 1, "checkpoint.every": 3}

    ended = lives(folder, "early", 1, changes, "the scores", 2)

    reference = steady(folder, 1, changes)
    assert ended == "Stopped"
    assert result(folder, "early") == reference
    assert reference["summary"][1] < STEPS


def test_a_stop_while_the_best_step_is_restored_does_not_save_it_as_the_last(folder: Path) -> None:
    changes = {**BASE, "checkpoint.every": 3}
    reference = steady(folder, 1, changes)
    assert reference["summary"][2] == 3, "the first evaluation is the best, and its model is of an earlier start"

    first = run_ranks(start, 1, str(folder), "best", changes, "a step", 4, 0)
    scores = 4 * (STEPS // 3 - 1)  # of the evaluations that are left; then comes that of the best step
    ended = lives(folder, "best", 1, changes, "the scores", scores + 1)

    assert (first, ended) == (["Stopped"], "Stopped")
    assert result(folder, "best") == reference

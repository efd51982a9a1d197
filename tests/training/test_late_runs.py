"""Whole runs whose values are read one step late: their lines, checkpoints and models are those of runs that read at once.

On CUDA the loop reads late. Here it is made to do so on the CPU. The steps themselves are in test_late_values.py.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import interruptible
from dtrain.engine import single
from dtrain.errors import NonFiniteError, Preempted
from dtrain.training import loop
from tests.support import resuming
from tests.support.multirank import run_ranks
from tests.support.resuming import Died

pytestmark = pytest.mark.ranks

CHANGES: dict[str, Any] = {
    "train.global_batch_size": 16,  # ten steps an epoch
    "train.max_steps": 24,
    "train.log_every": 100,
    "checkpoint.every": 7,
    "train.eval_every": 12,
    "schedule.warmup_steps": 15,
    "train.non_finite": "skip",
}
LATE = {2, 3, 4, 5, 6, 8, 9, 11, 13, 15, 16, 17, 18, 19, 22, 23}
"""All but the first, the checkpoints', the evaluations' and the last of each epoch."""

BAD = (4, 6, 9, 16, 21, 24)
"""In the middle, before a checkpoint, before an epoch's end, in the middle, at a checkpoint, at the end."""

OTHERWISE = ("seconds", "examples_per_second", "tokens_per_second", "bytes")
"""Times; and the size of a checkpoint, which holds the name of the run."""
TRAFFIC = ("collectives", "payload_bytes", "collectives_per_step", "payload_bytes_per_step")
"""Two small all-reduces instead of one where a step is read late."""


def start(
    context: RankContext,
    folder: str,
    name: str,
    changes: Mapping[str, Any],
    bad: tuple[int, ...] = (),
    factor: float = math.nan,
    end: str = "",
) -> Any:
    """Collective. One start; gives how it ended, and the steps whose values were read late.

    Args:
        bad: steps in which the last rank's first loss is multiplied by `factor`; its gradient is fine.
        end: "signal N" or "death N", in step N.
    """
    real_batches, real_finish, read_late = loop.run_micro_batches, loop.finish_late, []
    kind, _, step = end.partition(" ")

    def spoiled(engine: Any, task: Any, batches: Any, **more: Any) -> Any:
        losses = real_batches(engine, task, batches, **more)
        here = context.rank == context.world_size - 1
        if here and losses and batches.step + 1 in bad:
            losses[0] = losses[0] * factor
        if kind and batches.step + 1 == int(step):
            if kind == "death":
                raise Died
            if here:
                os.kill(os.getpid(), signal.SIGTERM)
        return losses

    def finished(run: Any, late: Any, monitors: Any) -> None:
        read_late.append(late.end.step)
        real_finish(run, late, monitors)

    loop.run_micro_batches, loop.finish_late = spoiled, finished
    config = load_config(None, resuming.settings(Path(folder), name, {**CHANGES, **changes}))
    try:
        with interruptible(grace_s=60.0, before_exit=print):
            run_train(config, context)
        ended = "done"
    except Preempted as stop:
        ended = str(stop).partition(":")[0]
    except Died:
        ended = "died"
    except NonFiniteError as error:
        ended = str(error)
    finally:
        loop.run_micro_batches, loop.finish_late = real_batches, real_finish
    return [ended, read_late]


def lives(context: RankContext, folder: str, name: str, devices: tuple[str, ...], *starts: dict[str, Any]) -> Any:
    """Collective. Starts of one run, one after the other."""
    single.DECIDING_DEVICES = devices
    return [
        start(context, folder, f"{name}-{'late' if devices else 'today'}-{context.world_size}", **one) for one in starts
    ]


SCENARIOS: dict[str, list[dict[str, Any]]] = {
    "bad-steps": [{"changes": {}, "bad": BAD}],
    "signal": [{"changes": {}, "bad": BAD, "end": "signal 16"}, {"changes": {}, "bad": BAD}],
    "death": [{"changes": {}, "bad": BAD, "end": "death 10"}, {"changes": {}, "bad": BAD}],
    "abort": [{"changes": {"train.non_finite": "stop"}, "bad": (4,)}],
    "rollback": [
        {"changes": {"train.spike": "{factor: 3, window: 10, action: rollback}"}, "bad": (16,), "factor": 100.0}
    ],
    "settings": [
        {
            "changes": {
                "engine.precision": "bf16",
                "evaluation.best": "{metric: accuracy}",
                "train.log_gradients": 8,
                "train.spike": "{factor: 3, window: 10, action: warn}",
            },
            "bad": (16, 18),
            "factor": 100.0,
        }
    ],
}
ON_RANKS = ("bad-steps", "signal", "death", "abort")
CASES = [(1, name) for name in SCENARIOS] + [(2, name) for name in ON_RANKS]


def all_lives(context: RankContext, folder: str) -> Any:
    """Collective. Each scenario, with values read at once and late."""
    return {
        name: [lives(context, folder, name, devices, *starts) for devices in ((), ("cpu",))]
        for name, starts in SCENARIOS.items()
        if (context.world_size, name) in CASES
    }


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("late"))


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, Any]:
    """What the starts say of themselves, by the number of ranks."""
    by_world = {}
    for world in (1, 2):
        ranks = run_ranks(all_lives, world, str(folder), timeout_s=240)
        assert all(rank == ranks[0] for rank in ranks)
        by_world[world] = ranks[0]
    return by_world


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    return [
        {key: value for key, value in event.items() if key not in (*OTHERWISE, *TRAFFIC) and not key.endswith("_s")}
        for event in events
    ]


def left(folder: Path, name: str) -> dict[str, Any]:
    """What a run leaves behind."""
    run = folder / "runs" / name
    states = {}
    for checkpoint in sorted((run / "checkpoints").iterdir()):
        files = {file.name: file.read_bytes() for file in sorted(checkpoint.glob("*.safetensors"))}
        states[checkpoint.name] = files
    model = run / "model" / "model.safetensors"
    return {
        "lines": lines(folder, name),
        "checkpoints": states,
        "model": model.read_bytes() if model.is_file() else None,
    }


@pytest.mark.parametrize(("world", "scenario"), CASES)
def test_a_run_leaves_what_one_that_reads_at_once_leaves(
    folder: Path, found: dict[int, Any], world: int, scenario: str
) -> None:
    today, late = found[world][scenario]

    assert [ended for ended, _ in late] == [ended for ended, _ in today]
    assert all(not steps for _, steps in today)
    expected, actual = (left(folder, f"{scenario}-{way}-{world}") for way in ("today", "late"))
    if (
        scenario == "death"
    ):  # it lost the line of the step before the one in which it died; the next start wrote that again
        expected["lines"], actual["lines"] = (last_start(each["lines"]) for each in (expected, actual))
    assert actual["lines"] == expected["lines"]
    assert actual == expected


def last_start(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return events[max(index for index, event in enumerate(events) if event["event"] == "start") :]


@pytest.mark.parametrize("world", [1, 2])
def test_the_steps_in_between_are_read_late(found: dict[int, Any], world: int) -> None:
    late = {name: ways[1] for name, ways in found[world].items()}

    assert late["bad-steps"] == [["done", sorted(LATE)]]
    # The request rides on the step in which it comes. That step ends the start, and is read at once.
    assert late["signal"] == [
        ["Stopped after step 16", sorted(LATE - {16, 17, 18, 19, 22, 23})],
        ["done", [17, 18, 19, 22, 23]],
    ]
    assert late["death"] == [["died", [2, 3, 4, 5, 6, 8]], ["done", sorted(LATE - {2, 3, 4, 5, 6})]]
    [[message, steps]] = late["abort"]
    assert message.startswith("Step 4: the loss is nan")
    assert steps == [2, 3, 4]
    if world == 1:
        assert late["rollback"] == [["done", []]]
        assert late["settings"] == [["done", sorted(LATE - {8, 16})]]


def test_bad_steps_are_reported_and_left_out(folder: Path, found: dict[int, Any]) -> None:
    assert found
    events = lines(folder, "bad-steps-late-2")

    assert [event["step"] for event in events if event["event"] == "fault"] == [*BAD]
    assert [event["step"] for event in events if event["event"] == "train" and not event["applied"]] == [*BAD]
    summary = json.loads((folder / "runs" / "bad-steps-late-2" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["step"], summary["updates"]) == (24, 24 - len(BAD))


@pytest.mark.parametrize("world", [1, 2])
def test_a_start_after_another_one_ends_with_the_bits_of_a_single_start(
    folder: Path, found: dict[int, Any], world: int
) -> None:
    assert found
    whole, *others = (left(folder, f"{name}-late-{world}") for name in ("bad-steps", "signal", "death"))

    for other in others:
        assert other["model"] == whole["model"]
        assert other["checkpoints"]["step-000024"] == whole["checkpoints"]["step-000024"]

"""A run that dies and goes on is the run that never died: bit for bit on the same ranks, step for step on others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import resuming
from tests.support.multirank import run_ranks
from tests.support.resuming import PER_EPOCH, STEPS, life, losses, weights_and_moments

pytestmark = pytest.mark.ranks

FP16 = {"engine.precision": "fp16", "optim.name": "sgd", "optim.learning_rate": 1e-2}
THAW = {"freeze.modules": "[embeddings,'encoder.layer[0]']", "freeze.thaw": "[{epoch: 1, modules: [embeddings]}]"}


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("resume"))


def start(folder: Path, name: str, world: int, changes: Mapping[str, Any], **death: Any) -> list[Any]:
    return run_ranks(dying, world, str(folder), name, dict(changes), death)


def dying(context: Any, folder: str, name: str, changes: dict[str, Any], death: dict[str, Any]) -> Any:
    return life(context, folder, name, changes, **death)


def steady(folder: Path, world: int, changes: Mapping[str, Any]) -> str:
    """The name of the run that never died, made once."""
    name = "-".join(["steady", str(world), *(re.sub(r"\W+", "", str(value)) for value in changes.values())])
    if not (folder / "runs" / name).exists():
        start(folder, name, world, changes)
    return name


DEATHS = {
    "in mid-epoch": {"die_in": 3},
    "at an epoch's end": {"die_after": PER_EPOCH},
    "at the first step": {"die_after": 1},
    "before the first checkpoint": {"die_in": 1},
    "at the last step": {"die_after": STEPS},
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("when", DEATHS)
def test_a_run_that_died_ends_with_every_bit_of_one_that_did_not(folder: Path, when: str, world: int) -> None:
    name = f"{when.replace(' ', '-').replace(chr(39), '')}-{world}"

    died = start(folder, name, world, {}, **DEATHS[when])
    went_on = start(folder, name, world, {})

    assert [rank["ended"] for rank in died + went_on] == ["died"] * world + ["done"] * world
    reference = steady(folder, world, {})
    assert weights_and_moments(folder, name, STEPS) == weights_and_moments(folder, reference, STEPS)
    assert losses(folder, name) == losses(folder, reference)


@pytest.mark.parametrize("broken", ["moments", "place"])
def test_a_start_that_forgets_something_is_caught(folder: Path, broken: str) -> None:
    start(folder, broken, 1, {}, die_in=7)

    start(folder, broken, 1, {}, broken=broken)

    reference = steady(folder, 1, {})
    assert weights_and_moments(folder, broken, STEPS) != weights_and_moments(folder, reference, STEPS)


@pytest.mark.parametrize("changes", [FP16, THAW], ids=["fp16", "thaw"])
@pytest.mark.parametrize(
    "step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (PER_EPOCH, PER_EPOCH + 2))]
)
def test_the_loss_scale_and_thawed_parts_are_gone_on_with(folder: Path, changes: dict[str, Any], step: int) -> None:
    name = f"{'thaw' if 'freeze.thaw' in changes else 'fp16'}-{step}"

    start(folder, name, 2, changes, die_after=step)
    start(folder, name, 2, changes)

    reference = steady(folder, 2, changes)
    assert weights_and_moments(folder, name, STEPS) == weights_and_moments(folder, reference, STEPS)


SHARDED = {"checkpoint.format": "sharded"}

STAGES: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (1, {}),
    (3, {}),
    (2, {"engine.zero_stage": 2}),
    (2, {"engine.zero_stage": 3}),
    (3, {"engine.name": "fsdp"}),
    (2, {"engine.zero_stage": 1}),
    (2, {"engine.name": "fsdp"}),
    (1, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, SHARDED], ids=["portable", "sharded"])
def test_a_run_that_moves_over_ranks_and_engines_takes_the_same_steps(folder: Path, form: dict[str, Any]) -> None:
    taken: dict[int, list[int]] = {}
    name, form = f"elastic-{len(form)}", {**form, "train.max_steps": 2 * len(STAGES)}
    for number, (world, changes) in enumerate(STAGES):
        end = {} if number == len(STAGES) - 1 else {"die_in": 2 * number + 2}
        ranks = start(folder, name, world, {**changes, **form}, **end)
        for step in {step for rank in ranks for step, _ in rank["taken"]}:
            taken[step] = sorted(
                index
                for rank in ranks
                for number, parts in rank["taken"]
                if number == step
                for part in parts
                for index in part
            )

    alone = run_ranks(dying, 1, str(folder), f"alone-{len(form)}", {"train.max_steps": 2 * len(STAGES)}, {})[0]
    assert taken == {step: sorted(index for part in parts for index in part) for step, parts in alone["taken"]}
    expected, found = losses(folder, f"alone-{len(form)}"), losses(folder, name)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] / loss - 1) for step, loss in expected.items()) < 1e-5


def test_a_rolled_back_run_is_one_that_begins_at_the_checkpoint_with_the_data_that_come_next(folder: Path) -> None:
    steps, window = 20, 12
    changes = {
        "train.max_steps": steps,
        "optim.learning_rate": 1e-2,
        "checkpoint.every": 4,
        "checkpoint.keep": 10,
        "train.sort_by_length": "false",  # with these draws of dropout there is one rollback
        "model.unpad": "off",
        "train.spike": f"{{factor: 1.02, window: {window}, action: rollback}}",  # the noise of the batches is a spike here
    }
    start(folder, "rolled", 2, changes)
    lines = (folder / "runs" / "rolled" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    back = next(event for event in map(json.loads, lines) if event["event"] == "rollback")
    seen = losses(folder, "rolled")
    state = {"step": back["step"], "recent_losses": [seen[step] for step in range(1, back["step"] + 1)][-window:]}
    path = folder / "runs" / "rolled" / "checkpoints" / f"step-{back['to_step']:06d}"

    start(folder, "from-there", 2, {**changes, "checkpoint.resume": path}, state=state)

    rollbacks = [(e["step"], e["to_step"]) for e in map(json.loads, lines) if e["event"] == "rollback"]
    assert len(rollbacks) == 1, rollbacks  # a second one would go back to a checkpoint that only one of the runs has
    assert back["to_step"] % 4 == 0
    assert 10 < back["step"] < steps
    assert weights_and_moments(folder, "from-there", steps) == weights_and_moments(folder, "rolled", steps)
    after = range(back["step"] + 1, steps + 1)
    assert [losses(folder, "from-there")[step] for step in after] == [seen[step] for step in after]

"""The gradient that train.log_gradients measures is that of the whole step, on every engine and world size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import training
from tests.support.multirank import run_ranks
from tests.support.training import Setting

pytestmark = pytest.mark.ranks

PLAIN = Setting(steps=4, log_gradients=2, freeze=("embeddings",), max_grad_norm=0.1)
DEEPSPEED = [replace(PLAIN, engine="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)]
FSDP = replace(PLAIN, engine="fsdp")


class Norms:
    """Keeps what each step measured, beside the norm that clipping used."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def after_step(self, record: StepRecord) -> Decision:
        norms = None if record.gradient_norms is None else dict(record.gradient_norms)
        self.steps.append({"norms": norms, "grad_norm": record.grad_norm})
        return Decision.CONTINUE


def measured(context: RankContext, settings: list[Setting]) -> list[list[dict[str, Any]]]:
    """Collective. The norms of each setting's run."""
    found = []
    for setting in settings:
        norms = Norms()
        training.build(context, setting).go(norms).release()
        found.append(norms.steps)
    return found


@pytest.fixture(scope="module")
def single() -> list[dict[str, Any]]:
    return measured(ONE_PROCESS, [PLAIN])[0]


def assert_same(reference: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for one, two in zip(reference, other, strict=True):
        assert (one["norms"] is None) == (two["norms"] is None)
        if one["norms"] is not None:
            assert one["norms"].keys() == two["norms"].keys()
            assert two["norms"] == pytest.approx(one["norms"], rel=1e-4, abs=1e-6)


def test_every_second_step_is_measured_and_the_parts_make_up_the_whole(single: list[dict[str, Any]]) -> None:
    assert [step["norms"] is None for step in single] == [True, False, True, False]
    for step in single[1::2]:
        assert "classifier.weight" in step["norms"]
        assert not any("embeddings" in name for name in step["norms"]), "what is frozen has no gradient"
        assert math.hypot(*step["norms"].values()) == pytest.approx(step["grad_norm"], rel=1e-5)
        assert step["grad_norm"] > 0.1, "before clipping, or this could not tell"


def test_two_ranks_measure_what_one_process_does_on_every_engine(single: list[dict[str, Any]]) -> None:
    offloaded = replace(DEEPSPEED[2], deepspeed="offload")

    half = replace(DEEPSPEED[2], precision="fp16", max_grad_norm=None, steps=2)

    ranks = run_ranks(measured, 2, [PLAIN, *DEEPSPEED, FSDP, offloaded, half], timeout_s=150)

    assert ranks[0] == ranks[1]
    *exact, rounded = ranks[0]
    for found in exact:
        assert_same(single, found)
    assert math.hypot(*rounded[1]["norms"].values()) == pytest.approx(rounded[1]["grad_norm"], rel=1e-3)


def test_three_ranks_of_which_one_has_nothing_to_do_measure_the_same(single: list[dict[str, Any]]) -> None:
    small = [replace(setting, micro_batch_size=4, steps=2) for setting in (PLAIN, DEEPSPEED[1], DEEPSPEED[3], FSDP)]

    ranks = run_ranks(measured, 3, small, timeout_s=150)

    assert ranks[0] == ranks[2]
    (alone,) = measured(ONE_PROCESS, small[:1])
    for found in ranks[0]:
        assert_same(alone, found)


def test_a_gradient_of_another_size_is_rejected(single: list[dict[str, Any]]) -> None:
    (other,) = measured(ONE_PROCESS, [replace(PLAIN, broken="scaled_gradient")])

    with pytest.raises(AssertionError):
        assert_same(single, other)


def test_the_loss_scale_of_fp16_is_taken_out() -> None:
    (found,) = measured(ONE_PROCESS, [replace(PLAIN, precision="fp16")])

    for step in found[1::2]:
        assert math.hypot(*step["norms"].values()) == pytest.approx(step["grad_norm"], rel=1e-4)

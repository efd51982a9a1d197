"""A weight that differs on one rank is found and named; a loss that is a spike is dropped alike on every engine."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from dtrain.config.schema import Spike
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.errors import TopologyError
from dtrain.training.monitors.non_finite import NonFinite
from dtrain.training.monitors.protocol import Decision, StepRecord
from dtrain.training.monitors.replicas import Replicas
from dtrain.training.monitors.spikes import Spikes
from tests.support import faults, training
from tests.support.faults import Journal
from tests.support.multirank import run_ranks
from tests.support.training import Setting

pytestmark = pytest.mark.ranks


class FlipsABit:
    """A monitor that is a fault: after a step, one bit of one weight turns round on one rank."""

    def __init__(self, run: training.Run, step: int, *, here: bool, parameter: int) -> None:
        self._run, self._step, self._here, self._parameter = run, step, here, parameter

    def after_step(self, record: StepRecord) -> Decision:
        if self._here and record.step == self._step:
            weight = list(self._run.engine.module.parameters())[self._parameter]
            with torch.no_grad():
                # Not the mantissa's last bit: the next update may round it away, and then nothing is wrong any more.
                weight.view(torch.int32).view(-1)[1] ^= 1 << 20
        return Decision.CONTINUE


def checked(context: RankContext, setting: Setting, odd: int | None, parameter: int) -> dict[str, Any]:
    """Collective. Six steps, compared after every second; `odd`: the rank whose weight changes after step 3."""
    run, journal = training.build(context, setting), Journal()
    names = [name for name, _ in run.engine.module.named_parameters()]
    error = None
    try:
        run.go(
            journal,
            FlipsABit(run, 3, here=context.rank == odd, parameter=parameter),
            Replicas(2, lambda: run.engine.module, context, journal),
        )
    except TopologyError as raised:
        error = str(raised)
    return {
        "error": error,
        "steps": len(journal.records),
        "faults": [event for event in journal.events if event["event"] == "fault"],
        "name": names[parameter],
    }


SHORT = replace(faults.SETTING, steps=6, optimizer="sgd", learning_rate=0.1)


@pytest.mark.parametrize(("world_size", "odd", "parameter"), [(3, 1, 5), (3, 0, 0), (2, 1, -1)])
def test_a_rank_with_a_flipped_bit_is_named_at_the_next_comparison(world_size: int, odd: int, parameter: int) -> None:
    found = run_ranks(checked, world_size, SHORT, odd, parameter)

    assert len({rank["error"] for rank in found}) == 1, "all ranks say the same, so that rank 0 alone prints it"
    error, name = found[0]["error"], found[0]["name"]
    assert f"the first parameter that differs is {name}" in error
    assert error.startswith("After step 4 the weights of rank ")
    if world_size == 2:
        assert "rank 0 (process" in error
        assert "differ, and there is no majority" in error
    else:
        assert f"weights of rank {odd} (process" in error
        assert "are not those of the other 2 ranks" in error
    fault = found[0]["faults"][0]
    assert (fault["kind"], fault["step"], fault["parameter"]) == ("replicas", 4, name)
    assert fault["ranks"] == ([odd] if world_size > 2 else [0, 1])
    assert [rank["steps"] for rank in found] == [4] * world_size


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw"},
        {"engine": "deepspeed", "zero_stage": 0},
        {"engine": "deepspeed", "zero_stage": 1, "optimizer": "adamw"},
        {"engine": "deepspeed", "zero_stage": 2},
    ],
    ids=["ddp", "ddp-adamw", "zero0", "zero1", "zero2"],
)
def test_ranks_that_nothing_disturbs_hold_the_same_bits_on_every_engine_that_keeps_replicas(
    changes: dict[str, Any],
) -> None:
    for rank in run_ranks(checked, 3, replace(SHORT, **changes), None, 0, timeout_s=120):
        assert (rank["error"], rank["steps"], rank["faults"]) == (None, 6, [])


# ---------------------------------------------------------------- spikes


class Keeps:
    """Weights after each step, on rank 0."""

    def __init__(self, run: training.Run) -> None:
        self._run, self.weights = run, [training.weights_of(run.engine)]

    def after_step(self, _record: StepRecord) -> Decision:
        self.weights.append(training.weights_of(self._run.engine))
        return Decision.CONTINUE


def spiked(context: RankContext, setting: Setting) -> dict[str, Any]:
    """Collective. Twelve steps, of which each third has a loss of about 50 times the usual; the first ten only teach."""
    learns = faults.task(setting)
    usual = learns.loss

    def loss(model: Any, batch: Any) -> torch.Tensor:
        is_bad = bool((batch["input_ids"] == faults.BAD_TOKEN).any())
        return usual(model, batch) * (100.0 if is_bad else 1.0)

    learns.loss = loss  # type: ignore[method-assign]
    run, journal = training.build(context, setting, learns=learns), Journal()
    spikes = Spikes(Spike(action="skip", window=10), run.state, journal)
    run.settings = replace(run.settings, drops=spikes.drops)
    keeps = Keeps(run)
    run.go(journal, NonFinite("stop", journal), spikes, keeps)
    return {
        "steps": journal.as_json(),
        "faults": [event["step"] for event in journal.events if event["event"] == "fault"],
        "kept": [before == after for before, after in zip(keeps.weights, keeps.weights[1:], strict=False)],
        "weights": training.weights_of(run.engine),
        "state": asdict(run.state),
    }


def test_the_update_of_a_spike_is_left_out_on_every_engine_and_the_run_goes_on_as_on_one_process() -> None:
    setting = replace(faults.SETTING, steps=13, optimizer="sgd", learning_rate=0.01, dropout=0.0, warmup=0)
    one = spiked(ONE_PROCESS, setting)
    assert one["faults"] == [11]
    assert one["kept"] == [step == 11 for step in range(1, 14)]
    assert [step["applied"] for step in one["steps"]] == [step != 11 for step in range(1, 14)]
    assert all(step["finite"] for step in one["steps"])
    assert (one["state"]["step"], one["state"]["updates"]) == (13, 12)

    for engine in (
        {},
        {"engine": "deepspeed", "zero_stage": 0},
        {"engine": "deepspeed", "zero_stage": 2},
        {"engine": "deepspeed", "zero_stage": 3},
    ):
        found = run_ranks(spiked, 2, replace(setting, **engine), timeout_s=120)[0]

        assert found["faults"] == [11], engine
        assert found["kept"] == one["kept"], engine
        assert training.worst(one, found) <= 1e-5, engine
        assert training.worst(one, found, "grad_norm") <= 1e-5, engine
        assert training.apart(one, found) <= 2e-6, engine
        assert (found["state"]["step"], found["state"]["updates"]) == (13, 12), engine

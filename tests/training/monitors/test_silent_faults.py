"""When a loss is a spike and what follows; what a hash of the weights sees, and whom a difference is laid to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config.load import load_config
from dtrain.config.schema import Spike
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, TopologyError
from dtrain.training.monitors import replicas
from dtrain.training.monitors.protocol import Decision, RunState
from dtrain.training.monitors.replicas import Replicas, hashes_of
from dtrain.training.monitors.spikes import Spikes
from tests.support.faults import Journal
from tests.support.steps import record


def watch(losses: list[float], **settings: Any) -> tuple[list[int], RunState, Journal, list[Decision]]:
    """Steps that were found to be spikes, the state afterwards, what was logged, and what was answered."""
    state, journal = RunState(), Journal()
    monitor = Spikes(Spike(**settings), state, journal)
    answers = [monitor.after_step(record(step, loss=loss)) for step, loss in enumerate(losses, start=1)]
    return [event["step"] for event in journal.events], state, journal, answers


FLAT = [1.0] * 10


@pytest.mark.parametrize(
    ("losses", "spikes"),
    [
        ([*FLAT, 3.01], [11]),
        ([*FLAT, 3.0], []),  # not above
        ([*FLAT[1:], 100.0], []),  # nine are not enough to tell
        ([*FLAT, 5.0, 1.0, 5.0], [11, 13]),  # a median does not mind the first
        ([0.0] * 20 + [5.0], []),  # nothing to be a multiple of
        ([1.0] * 5 + [2.0] * 5 + [4.5], []),  # above 3 x 1.0, 1.5 is the median of an even number
        ([*FLAT, math.nan, math.inf, 3.5], [13]),  # what is not finite is another monitor's
    ],
)
def test_a_spike_is_a_loss_above_the_factor_times_the_median_of_at_least_ten(
    losses: list[float], spikes: list[int]
) -> None:
    assert watch(losses)[0] == spikes


def test_the_median_is_of_the_last_window_and_a_loss_that_stays_high_becomes_the_usual_one() -> None:
    found, state, _, _ = watch([1.0] * 30 + [4.0] * 20, window=10)

    assert found == [31, 32, 33, 34, 35]  # at the sixth the median is (1 + 4) / 2
    assert state.recent_losses == [4.0] * 10


def test_a_window_that_was_made_smaller_counts_from_then_on() -> None:
    state = RunState(recent_losses=[100.0] * 40 + [1.0] * 10)

    assert Spikes(Spike(action="skip", window=10), state, Journal()).drops(3.5)
    assert not Spikes(Spike(action="skip", window=50), state, Journal()).drops(3.5)


def test_a_step_without_a_target_has_no_loss_to_count() -> None:
    state = RunState()

    Spikes(Spike(), state, Journal()).after_step(record(1, loss=0.0, targets=0))

    assert state.recent_losses == []


@pytest.mark.parametrize(
    ("action", "answer"), [("warn", Decision.CONTINUE), ("skip", Decision.CONTINUE), ("rollback", Decision.ROLLBACK)]
)
def test_a_spike_is_written_down_and_answered_as_asked(action: str, answer: Decision) -> None:
    _, _, journal, answers = watch([*FLAT, 8.0, 1.0], factor=4, action=action)

    expected = {
        "event": "fault",
        "kind": "spike",
        "step": 11,
        "loss": 8.0,
        "median": 1.0,
        "factor": 4,
        "action": action,
    }
    assert journal.events == [expected]
    assert answers == [*[Decision.CONTINUE] * 10, answer, Decision.CONTINUE]


def test_only_skip_drops_an_update_and_asks_nothing_but_the_loss() -> None:
    asked = {
        action: Spikes(Spike(action=action), RunState(recent_losses=FLAT), Journal())  # type: ignore[arg-type]
        for action in ("warn", "skip", "rollback")
    }

    assert {action: [monitor.drops(3.5), monitor.drops(2.5)] for action, monitor in asked.items()} == {
        "warn": [False, False],
        "skip": [True, False],
        "rollback": [False, False],
    }


def test_the_last_losses_are_part_of_the_runs_state_as_json() -> None:
    losses = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.0, 0.7, 1.3, 1.0, 9.0, 1.1, 3.2, 9.9]
    uninterrupted, whole, _, _ = watch(losses, window=10)
    state = watch(losses[:7], window=10)[1]
    restored = RunState(**json.loads(json.dumps(asdict(state))))

    journal = Journal()
    monitor = Spikes(Spike(window=10), restored, journal)
    for step, loss in enumerate(losses[7:], start=8):
        monitor.after_step(record(step, loss=loss))

    assert uninterrupted == [12, 14, 15]
    assert [event["step"] for event in journal.events] == uninterrupted
    assert restored == whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.spike={factor: 1}"], "train.spike.factor=1"),
        (["train.spike={window: 9}"], "train.spike.window=9"),
        (["train.spike={action: pray}"], "train.spike.action=pray"),
        (["train.spike.factro=2"], "train.spike.factro is not a setting"),
        (
            ["train.spike.action=rollback", "checkpoint.every=null"],
            "train.spike.action=rollback needs checkpoints to return to",
        ),
        (["train.check_replicas=0"], "train.check_replicas=0"),
        (["train.check_replicas=5", "engine.zero_stage=3"], "with engine.zero_stage=3 each rank holds only a shard"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, settings)

    assert said in str(refused.value)


def test_settings_that_can_be_are_taken() -> None:
    for stage in (0, 1, 2):
        load_config(None, ["train.check_replicas=5", f"engine.zero_stage={stage}"])
    assert load_config(None, ["train.spike={}"]).train.spike == Spike(factor=3.0, action="warn", window=50)
    assert load_config(None, []).train.spike is None


# ---------------------------------------------------------------- replicas


def weights(dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Module()
    for name, shape in (("a", (3, 5)), ("b", ()), ("empty", (0,)), ("c", (7,))):
        values = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype)
        module.register_parameter(name, nn.Parameter(values, requires_grad=name != "c"))
    module.register_parameter("turned", nn.Parameter(torch.linspace(0, 1, 6).reshape(2, 3).to(dtype).t()))
    return module


def flip(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Turns one bit of one element round, in place."""
    size = tensor.element_size()
    data = tensor.data.reshape(-1).clone()
    raw = data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    mask = 1 << bit
    raw[element] ^= mask - (1 << 8 * size) if bit == 8 * size - 1 else mask
    tensor.data = data.reshape(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_one_bit_of_any_parameter_changes_its_hash_and_no_other(dtype: torch.dtype) -> None:
    names, before = hashes_of(weights(dtype))
    assert names == ["a", "b", "empty", "c", "turned"]

    for index, name in enumerate(names):
        size = weights(dtype).get_parameter(name).numel()
        for element in {0, size // 2, size - 1} if size else ():
            for bit in (0, 1, 7, 8 * before.new_tensor([], dtype=dtype).element_size() - 1):
                module = weights(dtype)
                flip(module.get_parameter(name), element, bit)
                after = hashes_of(module)[1]
                assert (after != before).nonzero().flatten().tolist() == [index], (name, element, bit)


def test_equal_weights_have_equal_hashes_wherever_they_lie_in_memory() -> None:
    module = weights()
    module.get_parameter("turned").data = module.get_parameter("turned").data.contiguous()

    assert torch.equal(hashes_of(module)[1], hashes_of(weights())[1])


@pytest.mark.parametrize(
    ("everyones", "odd"),
    [
        ([(1, 2), (1, 2), (1, 3)], [2]),
        ([(0, 2), (1, 2), (1, 2)], [0]),
        ([(1, 2), (1, 3)], []),
        ([(1, 2), (1, 3), (1, 4)], []),
        ([(1, 2), (1, 2), (1, 3), (1, 3)], []),
        ([(1, 2), (1, 3), (1, 2), (1, 4), (1, 2)], [1, 3]),
    ],
)
def test_the_minority_is_suspected_where_there_is_a_majority(everyones: list[tuple[int, ...]], odd: list[int]) -> None:
    assert replicas._minority(everyones) == odd


def test_the_message_names_the_suspects_if_there_is_a_majority() -> None:
    places = [["node1", 10], ["node2", 20], ["node3", 30]]

    clear, unclear = (replicas._message(12, odd, places[:n], "encoder.weight") for odd, n in (([2], 3), ([], 2)))

    assert "After step 12 the weights of rank 2 (process 30 on node3) are not those of the other 2 ranks" in clear
    assert "the first parameter that differs is encoder.weight" in clear
    assert (
        "of rank 0 (process 10 on node1) and rank 1 (process 20 on node2) differ, and there is no majority" in unclear
    )
    assert TopologyError.exit_code == 4


def test_weights_are_compared_every_so_many_steps_and_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monitor = Replicas(5, weights, ONE_PROCESS, Journal())
    monkeypatch.setattr(monitor, "_check", looked.append)

    for step in range(1, 15):
        assert monitor.after_step(record(step)) == Decision.CONTINUE

    assert looked == [5, 10, 14]


def test_one_process_agrees_with_itself() -> None:
    journal = Journal()

    assert Replicas(1, weights, ONE_PROCESS, journal).after_step(record(1)) == Decision.CONTINUE
    assert journal.events == []

"""engine.bitwise: every bit of weights, moments, losses and norms is the same at any number of ranks."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.console import log
from dtrain.data.order import assign_micro_batches, contiguous_shares
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine import bitwise, gradient_messages
from dtrain.engine.bitwise import (
    inner_nodes,
    require_equal_arithmetic,
    tree_of,
)
from dtrain.engine.build import build_engine, engine_traits
from dtrain.errors import ConfigError
from dtrain.training import plan
from tests.support import resuming, tiny, training
from tests.support.contexts import placed
from tests.support.multirank import run_ranks
from tests.support.resuming import STEPS, losses, weights_and_moments
from tests.support.training import Setting

PLAIN = Setting(bitwise=True, optimizer="adamw", learning_rate=1e-2)
"""21 rows in steps of 8 and micro-batches of 3: three micro-batches, and two in the last step of an epoch."""

SETTINGS = {
    "plain": PLAIN,
    # Thirteen micro-batches, and eleven: with weights that no float holds exactly, and many messages.
    "many": replace(
        PLAIN,
        rows=37,
        global_batch_size=13,
        micro_batch_size=1,
        class_weights=True,
        optimizer="sgd",
        momentum=0.9,
        bucket_mb=0.02,
    ),
    "tokens": replace(PLAIN, table=True, micro_batch_tokens=24, unpad="on", global_batch_size=11),
    "thaw": replace(
        PLAIN, freeze=("embeddings", "encoder.layer[:1]"), thaw=((1, "encoder.layer[0]"),), checkpointing=True
    ),
    "bf16": replace(PLAIN, precision="bf16", log_gradients=1),
    "fp16": replace(PLAIN, precision="fp16"),
    "varying": replace(PLAIN, find_unused=True, micro_batch_size=1),
    "double": replace(PLAIN, double=True),
}


def varying() -> nn.Module:
    """Returns a BERT whose second layer is skipped at random, with a transposed weight and a part that some rows use."""
    module = tiny.bert(dropout=0.1, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module.extra = nn.Linear(2, 2)
        module.extra.weight = nn.Parameter(torch.randn(2, 2).t())
    module.bert.encoder.layer[1].register_forward_hook(_drop)
    module.register_forward_hook(_sometimes, with_kwargs=True)
    return module


def _drop(layer: nn.Module, args: Any, output: Any) -> Any:
    if layer.training and torch.rand(()) < 0.5:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    return output


def _sometimes(module: Any, _args: Any, inputs: dict[str, Any], output: Any) -> Any:
    if bool((inputs["input_ids"][:, 1] == 5).any()):
        output.logits = output.logits + module.extra(output.logits)
    return output


def digest(context: RankContext, setting: Setting, module: nn.Module | None = None) -> dict[str, Any]:
    """Collective. Trains; returns hashes of the numbers of all steps, and of all weights and moments on this rank."""
    run = training.build(context, setting, module)
    recorder = training.Recorder()
    before = context.traffic.copy()
    engine = run.go(recorder)
    sent = context.traffic.since(before)
    state = hashlib.sha256()
    for entry in engine.named_state(here=True):
        assert entry.value is not None
        for name, tensor in ((entry.name, entry.value), *sorted(entry.slots.items())):
            state.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    engine.release()
    return {
        "steps": json.dumps(recorder.steps),
        "state": state.hexdigest(),
        "sent": [sent.collectives, sent.payload_bytes],
        "learns": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
    }


def digests(context: RankContext, broken: str | None = None) -> dict[str, Any]:
    """Collective. All settings, or the one with most micro-batches, with a `broken` order of additions."""
    if broken == "swapped":
        bitwise.add_shared = _swapped
    if broken == "by rank":
        bitwise.inner_nodes = _mirrored if context.world_size > 1 else inner_nodes
    names = SETTINGS if broken is None else ("many",)
    return {name: digest(context, SETTINGS[name], varying() if name == "varying" else None) for name in names}


def _swapped(sums: Any, shares: Any, message: Any, messenger: Any, real: Any = bitwise.add_shared) -> None:
    """Rank 1 takes each of its two partial sums for the other."""
    if messenger.rank == 1:
        first, second = sums
        sums[first], sums[second] = sums[second], sums[first]
    real(sums, shares, message, messenger)


def _mirrored(start: int, stop: int) -> Iterator[bitwise.Node]:
    """The tree of another shape."""
    size = stop - start
    for node in inner_nodes(0, size):
        yield bitwise.Node(stop - node.stop, stop - node.middle, stop - node.start)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return digests(ONE_PROCESS)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_bit_is_that_of_one_process(alone: dict[str, Any], world_size: int) -> None:
    """On five ranks two or three have no micro-batch in most settings."""
    for found in run_ranks(digests, world_size):
        for name, one in alone.items():
            assert found[name]["steps"] == one["steps"], name
            assert found[name]["state"] == one["state"], name


@pytest.mark.ranks
@pytest.mark.parametrize("broken", ["swapped", "by rank"])
def test_an_order_that_depends_on_the_rank_is_rejected(alone: dict[str, Any], broken: str) -> None:
    found = run_ranks(digests, 2, broken)[0]["many"]

    assert found["state"] != alone["many"]["state"]
    assert found["steps"] != alone["many"]["steps"]


@pytest.mark.ranks
def test_plain_ddp_does_not_give_the_bits_of_one_process() -> None:
    """So the runs above are such that the order of additions shows."""
    plain = replace(SETTINGS["many"], bitwise=False)

    assert run_ranks(digest, 2, plain)[0]["state"] != digest(ONE_PROCESS, plain)["state"]


@pytest.mark.ranks
def test_a_step_sends_one_partial_sum_to_each_node_that_two_ranks_share_and_the_root_once() -> None:
    setting = replace(PLAIN, rows=64, global_batch_size=16, micro_batch_size=4, steps=4)
    two, four = (run_ranks(digest, world_size, setting) for world_size in (2, 4))

    # Rank 0 receives one sum (of four ranks: two), and sends the root. The loop sums, and reads the first step.
    assert [rank["sent"][0] for rank in two] == [4 * 3 + 1] * 2
    assert [rank["sent"][0] for rank in four] == [4 * 4 + 1, 4 * 3 + 1, 4 * 4 + 1, 4 * 3 + 1]
    sums = 5 * 8 * 8 + 2 * 4 * 4 * 8
    for rank in two:
        gradients = (rank["sent"][1] - sums) / 4 / 2
        assert 4 * rank["learns"] <= gradients <= 4 * rank["learns"] + 8192, "counts, and gaps between gradients"
    assert digest(ONE_PROCESS, setting)["sent"] == [0, 0]


# A run that dies


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("bitwise"))


CHANGES = {
    "engine.bitwise": True,
    "model.lora": "{r: 2, alpha: 4, dropout: 0.1, targets: [query, value]}",
    "optim.max_grad_norm": 0.1,
    "train.micro_batch_size": 3,
    "checkpoint.every": 4,
}


def live(context: RankContext, folder: str, name: str, death: dict[str, Any]) -> Any:
    return resuming.life(context, folder, name, CHANGES, **death)["ended"]


@pytest.mark.ranks
def test_a_run_that_dies_and_goes_on_at_other_numbers_of_ranks_has_every_bit_of_one_that_did_not(folder: Path) -> None:
    died = [run_ranks(live, 2, str(folder), "moved", {"die_in": 6})[0]]
    died += [run_ranks(live, 3, str(folder), "moved", {"die_after": 8})[0]]
    ended = run_ranks(live, 1, str(folder), "moved", {})[0]
    steady = run_ranks(live, 1, str(folder), "steady", {})[0]

    assert [*died, ended, steady] == ["died", "died", "done", "done"]
    found = weights_and_moments(folder, "moved", STEPS)
    assert found == weights_and_moments(folder, "steady", STEPS)
    assert found
    assert losses(folder, "moved") == losses(folder, "steady")


# The tree


def value(shares: tuple[int, ...]) -> str:
    """Returns the formula that all ranks together compute, by the rules of the engine."""
    sums = {(index, index + 1): str(index) for index in range(len(shares))}
    tree = tree_of(shares)
    for start, middle, stop in [
        *itertools.chain(*(tree.local.get(index, ()) for index in range(len(shares)))),
        *tree.shared,
    ]:
        sums[start, stop] = f"({sums.pop((start, middle))}+{sums.pop((middle, stop))})"
    (formula,) = sums.values()
    return formula


def test_the_tree_depends_on_the_number_of_micro_batches_alone() -> None:
    assert value((0,) * 5) == "(((0+1)+(2+3))+4)"
    assert value((0,) * 7) == "(((0+1)+(2+3))+((4+5)+6))"
    for count in range(1, 20):
        for world_size in range(1, 22):
            shares = tuple(contiguous_shares(count, world_size=world_size))
            assert value(shares) == value((0,) * count)


def test_a_rank_sends_only_to_lower_ranks_and_knows_a_node_before_its_parent() -> None:
    for count, world_size in itertools.product(range(1, 20), range(1, 9)):
        shares = tuple(contiguous_shares(count, world_size=world_size))
        known = {(node.start, node.stop) for nodes in tree_of(shares).local.values() for node in nodes}
        known |= {(index, index + 1) for index in range(count)}
        for node in tree_of(shares).shared:
            assert shares[node.start] <= shares[node.middle]
            assert {(node.start, node.middle), (node.middle, node.stop)} <= known
            known.add((node.start, node.stop))


def test_contiguous_shares_have_the_least_possible_largest_cost() -> None:
    for costs in ([1] * 7, [3, 1, 4, 1, 5, 9, 2, 6], [10, 14, 18, 30], [5], [1, 1, 100, 1]):
        for world_size in (1, 2, 3, 5):
            shares = contiguous_shares(len(costs), world_size=world_size, costs=costs)
            cuts = itertools.combinations_with_replacement(range(len(costs) + 1), world_size - 1)
            edges = [(0, *cut, len(costs)) for cut in cuts]
            best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(edge)) for edge in edges)

            assert shares == sorted(shares)
            assert max(shares) < world_size
            assert max(sum(c for c, r in zip(costs, shares, strict=True) if r == rank) for rank in set(shares)) == best


def test_each_micro_batch_of_contiguous_shares_runs_once_and_a_rank_without_one_runs_one_that_does_not_count() -> None:
    shares = contiguous_shares(3, world_size=5)
    parts = [assign_micro_batches(3, rank=rank, world_size=5, lock_step=False, shares=shares) for rank in range(5)]

    assert [[part.micro_batch for part in parts[rank] if part.counted] for rank in range(5)] == [[0], [1], [2], [], []]
    assert [(part.micro_batch, part.counted) for part in parts[4]] == [(0, False)]


def test_one_process_keeps_few_gradients() -> None:
    setting = replace(PLAIN, rows=32, global_batch_size=32, micro_batch_size=1, steps=1)
    run = training.build(ONE_PROCESS, setting)
    kept, real = [], run.engine._take_gradients  # type: ignore[attr-defined]

    def counted() -> Any:
        kept.append(len(run.engine._sums) + 1)  # type: ignore[attr-defined]
        return real()

    run.engine._take_gradients = counted  # type: ignore[attr-defined]
    run.go()

    assert len(kept) == 32
    assert max(kept) == 6, "one for each level of the tree of 32"
    assert engine_traits(setting.config(), ONE_PROCESS).memory.gradients == 4 * 6


def test_a_missing_gradient_counts_as_zeros_and_none_if_both_lack_it() -> None:
    zero = torch.tensor([-0.0, 1.0])

    first, second, third = bitwise.add([zero.clone(), None, None], [None, zero.clone(), None])

    assert third is None
    for found in (first, second):
        assert found is not None
        assert torch.equal(torch.signbit(found), torch.tensor([False, False]))


# What it needs


def test_ranks_with_other_arithmetic_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(own: Any, _context: RankContext) -> list[Any]:
        return [own, own, [own[0] + 1, own[1]]]

    monkeypatch.setattr(bitwise, "all_gather_object", gathered)

    with pytest.raises(ConfigError, match=r"rank 0 has 1 thread.* and rank 2 has 2 .*OMP_NUM_THREADS=1"):
        require_equal_arithmetic(placed(ONE_PROCESS, world_size=3))


def test_a_run_that_goes_on_with_another_number_of_threads_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    engine = training.build(ONE_PROCESS, PLAIN).engine
    saved = engine.scalars()

    with caplog.at_level(logging.WARNING, logger="dtrain"):
        engine.load_scalars(saved)
        engine.load_scalars({})  # a run that began without engine.bitwise
        assert not caplog.messages
        engine.load_scalars({"threads": 7.0})

    (message,) = caplog.messages
    assert "has used 7 thread(s)" in message
    assert "OMP_NUM_THREADS=7" in message


def test_a_store_of_an_earlier_run_is_not_read() -> None:
    setting = replace(PLAIN, freeze=("embeddings",), cache="on")

    with pytest.raises(ConfigError, match=r"freeze\.cache=on: .* engine\.bitwise does not read"):
        training.build(ONE_PROCESS, setting)


def test_a_sparse_gradient_is_refused() -> None:
    engine = build_engine(nn.Embedding(3, 2, sparse=True), PLAIN.config(), ONE_PROCESS)
    engine.begin_step([0])

    with pytest.raises(ConfigError, match="sparse=True"), engine.micro_batch(last=True):
        engine.backward(engine.module(torch.tensor([1])).sum())


def test_a_message_between_two_ranks_has_the_time_limit_of_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself gloo would take that of the start-up, and a rank that computes for longer would end the job."""
    limits = []

    class Work:
        def wait(self, limit: timedelta | None = None) -> None:
            limits.append(limit)

    for kind in ("isend", "irecv", "broadcast"):
        monkeypatch.setattr(gradient_messages.dist, kind, lambda *_args, **_more: Work())
    messenger = gradient_messages.Messenger(RankContext(ONE_PROCESS.topology))
    messenger.send(torch.zeros(2), dst=1)
    messenger.receive(torch.zeros(2), src=1)
    messenger.broadcast(torch.zeros(2), src=0)
    messenger.finish()

    assert limits == [timedelta(minutes=30)] * 3


def test_the_plan_says_that_it_is_on_and_what_it_promises() -> None:
    config = PLAIN.config()
    traits = engine_traits(config, ONE_PROCESS, total_steps=6)

    assert traits.detail == "the same bits at any number of ranks"
    assert "every bit of weights, moments, losses and gradient norms" in plan.exactness(config, traits)
    assert any("OMP_NUM_THREADS=1" in note for note in traits.notes)

"""What ranks decide together: stopping, the best step, steps that cannot be taken; and ranks without an example.

The one bad example is rank 1's; see tests/support/faults.py. Each engine goes through everything in one start of its ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dtrain.config.schema import Best
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.training.monitors.evaluations import EarlyStopping, Evaluate, KeepBest
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import faults, tiny, training
from tests.support.faults import Journal
from tests.support.multirank import run_ranks
from tests.support.training import Setting

pytestmark = pytest.mark.ranks

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")


def setting_of(engine: str) -> Setting:
    if engine == "ddp":
        return faults.SETTING
    return replace(faults.SETTING, engine="deepspeed", zero_stage=int(engine[-1]))


@cache
def faulty(engine: str) -> list[dict[str, Any]]:
    return run_ranks(faults.everything, 2, setting_of(engine), timeout_s=120)


@cache
def alone() -> dict[str, Any]:
    return faults.everything(ONE_PROCESS, faults.SETTING)


# Steps that cannot be taken


@pytest.mark.parametrize("kind", ["loss", "loss_alone"])
@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_stop_at_a_loss_that_is_not_a_number_and_name_the_rank_that_had_it(engine: str, kind: str) -> None:
    for found in (rank["stopped"][kind] for rank in faulty(engine)):
        assert "Step 2: the loss is nan (rank 1, micro-batch 1, examples 11, 12, 13)." in found["error"]
        assert found["untouched"]
        assert (found["step"], found["updates"]) == (2, 1)
        assert found["records"][1]["faults"] == [{"rank": 1, "micro_batch": 1, "loss": "nan", "examples": [11, 12, 13]}]
        assert found["events"][-1]["ranks"] == [1]


@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_stop_at_a_gradient_that_is_not_a_number(engine: str) -> None:
    for found in (rank["stopped"]["gradient"] for rank in faulty(engine)):
        assert "Step 2: the loss is 0." in found["error"]
        assert "but the gradient norm is" in found["error"]
        assert found["records"][1]["grad_norm"] in ("nan", "inf")
        assert found["untouched"]
        assert (found["step"], found["updates"]) == (2, 1)


@pytest.mark.parametrize("kind", faults.FAILING)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_step_is_skipped_by_all_and_the_next_ones_are_those_of_one_process(engine: str, kind: str) -> None:
    ranks, one = [rank["skipped"][kind] for rank in faulty(engine)], alone()["skipped"][kind]

    assert [record["applied"] for record in ranks[0]["records"]] == [True, False, True, True]
    assert (ranks[0]["step"], ranks[0]["updates"]) == (4, 3)
    for step, record in enumerate(one["records"]):
        assert all(rank["records"][step] == ranks[0]["records"][step] for rank in ranks)
        found = ranks[0]["records"][step]
        assert found["learning_rate"] == record["learning_rate"]
        assert (found["finite"], found["examples"]) == (record["finite"], record["examples"])
        assert float(found["loss"]) == pytest.approx(float(record["loss"]), rel=1e-5, nan_ok=True)
    assert training.apart(one, ranks[0]) <= 2e-5
    assert all(math.isfinite(x) for w in ranks[0]["weights"].values() for x in torch.tensor(w).flatten().tolist())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_discarded_step_is_as_if_it_had_not_been_on_every_engine(engine: str, optimizer: str) -> None:
    for rank, found in enumerate(faulty(engine)):
        assert found["discarded"][optimizer] == {
            "applied": [True, False, True],
            "kept": True,
            "moved": rank == 0,  # values are rank 0's alone
            "as_if_it_had_not_been": True,
            "has_moments": rank == 0,
        }


def test_a_stand_in_for_a_bad_micro_batch_is_not_reported() -> None:
    # Micro-batch 0 of step 1 is bad; rank 3 of 4 has no micro-batch and runs that one as its stand-in.
    found = run_ranks(bad_from_the_start, 4)

    for rank in found:
        assert rank["faults"] == [{"rank": 0, "micro_batch": 0, "loss": "nan", "examples": [0, 1, 2]}]
        assert rank["applied"] is False


def bad_from_the_start(context: RankContext) -> Any:
    setting = replace(faults.SETTING, steps=2)
    learns = faults.task(setting)
    rows = learns.splits["train"][[*range(21)]]
    rows["input_ids"][1][1] = faults.BAD_TOKEN
    learns.splits = {**learns.splits, "train": tiny.Table(rows)}
    return faults.skipped(context, setting, "loss", learns)["records"][0]


# Stopping


class StopAt:
    """Wants to stop at a step, on one rank or on all."""

    def __init__(self, step: int, *, here: bool) -> None:
        self._step, self._here = step, here

    def after_step(self, record: StepRecord) -> Decision:
        return Decision.STOP if self._here and record.step == self._step else Decision.CONTINUE


def stops(context: RankContext) -> dict[str, list[int]]:
    """The steps that were taken, by who wanted to stop after the third, with and without an evaluation there."""
    setting, found = replace(faults.SETTING, steps=8), {}
    for who in (0, 1, None):
        for evaluates in (False, True):
            run = training.build(context, setting)
            journal = Journal()
            monitors: list[Any] = [journal, StopAt(3, here=who in (None, context.rank))]
            if evaluates:
                monitors.insert(0, Evaluate(3, lambda _step: {"loss": 1.0}))
            run.go(*monitors)
            found[f"{who} {evaluates}"] = [record.step for record in journal.records]
            run.engine.release()
    return found


def test_one_rank_that_wants_to_stop_stops_all_at_the_same_step() -> None:
    first, second = run_ranks(stops, 2)

    assert first == second
    for who in (0, 1, None):
        assert first[f"{who} False"] == [1, 2, 3, 4]  # the wish rides with the next step
        assert first[f"{who} True"] == [1, 2, 3]


def early(context: RankContext) -> dict[str, Any]:
    """Patience 2 over made-up values that are the same on all ranks, as those of an evaluation are."""
    values = {1: 3.0, 2: 1.0, 3: math.nan, 4: 1.0, 5: 0.0}
    run = training.build(context, replace(faults.SETTING, steps=5))
    exported: list[Any] = []
    keep = KeepBest(Best(metric="loss"), run.state, lambda: exported.append(training.weights_of(run.engine)))
    journal = Journal()
    run.go(journal, Evaluate(1, lambda step: {"loss": values[step]}), keep, EarlyStopping(2, run.state))
    return {
        "steps": len(journal.records),
        "best": [run.state.best, run.state.best_step, run.state.patience],
        "exports": len(exported),
        "kept_another": exported[-1] != training.weights_of(run.engine) or context.rank > 0,
    }


def test_early_stopping_is_decided_together_and_the_best_step_is_kept() -> None:
    for found in run_ranks(early, 2):
        assert found == {"steps": 4, "best": [1.0, 2, 2], "exports": 2, "kept_another": True}


# Ranks without an example, steps without a target


def few(context: RankContext, setting: Setting) -> dict[str, Any]:
    """Two examples, one example, and a middle step whose labels are all missing."""
    found = {}
    for name, rows, without in (("two", 2, ()), ("one", 1, ()), ("unlabelled", 21, range(8, 16))):
        learns = faults.task(setting, rows=rows, without_labels=frozenset(without))
        run = training.build(context, setting, learns=learns)
        journal = Journal()
        run.go(journal)
        found[name] = {
            "steps": journal.as_json(),
            "weights": training.weights_of(run.engine),
            "updates": run.state.updates,
        }
        run.engine.release()
    return found


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 3), ("zero2", 2), ("zero3", 3)])
def test_fewer_examples_than_ranks_and_steps_without_targets_are_as_on_one_process(
    engine: str, world_size: int
) -> None:
    plain = replace(setting_of(engine), optimizer="sgd", learning_rate=0.1, max_grad_norm=None)
    setting = replace(plain, micro_batch_size=1, global_batch_size=8)
    one = few(ONE_PROCESS, replace(setting, engine="auto", zero_stage=None))

    found = run_ranks(few, world_size, setting, timeout_s=120)[0]

    for name in ("two", "one", "unlabelled"):
        assert [s["targets"] for s in found[name]["steps"]] == [s["targets"] for s in one[name]["steps"]]
        assert training.worst(one[name], found[name]) <= 1e-6
        assert training.worst(one[name], found[name], "grad_norm") <= 1e-5
        assert training.apart(one[name], found[name]) <= 2e-6
    assert [step["targets"] for step in one["unlabelled"]["steps"]] == [8, 0, 5, 8]
    assert [step["applied"] for step in found["unlabelled"]["steps"]] == [True, False, True, True]
    assert [step["finite"] for step in found["unlabelled"]["steps"]] == [True] * 4
    assert found["unlabelled"]["steps"][1]["grad_norm"] == 0.0
    assert found["unlabelled"]["updates"] == 3


# Causal language models: uneven targets, a short last block


def language(context: RankContext, engine: str = "auto", stage: int | None = None) -> dict[str, Any]:
    """Six steps over 13 blocks, the last of them of 2 targets instead of 6."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=26, n_layer=1, n_head=2, n_embd=16, n_positions=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config)
    ids = [int(number) for number in torch.randint(5, 26, (75,), generator=torch.Generator().manual_seed(1))]
    blocks = [ids[start : start + 7] for start in range(0, 74, 6)]
    assert [len(block) - 1 for block in blocks] == [6] * 12 + [2]
    learns = CausalLmTask({"train": tiny.Table({"input_ids": blocks})}, tiny.tokenizer(), max_length=6, is_char=False)
    shape = Setting(steps=6, global_batch_size=5, micro_batch_size=2, max_grad_norm=None)  # a clip would hide a scale
    setting = replace(shape, engine=engine, zero_stage=stage)
    run = training.build(context, setting, module, learns)
    journal = Journal()
    run.go(journal)
    return {"steps": journal.as_json(), "weights": training.weights_of(run.engine)}


@pytest.mark.parametrize(("engine", "stage"), [("auto", None), ("deepspeed", 3)])
def test_a_language_model_learns_the_same_on_two_ranks_short_last_block_included(
    engine: str, stage: int | None
) -> None:
    one = language(ONE_PROCESS)

    two = run_ranks(language, 2, engine, stage, timeout_s=120)[0]

    assert sorted(step["targets"] for step in one["steps"][:3]) == [18, 26, 30]
    assert [step["targets"] for step in two["steps"]] == [step["targets"] for step in one["steps"]]
    assert training.worst(one, two) <= 1e-6
    assert training.worst(one, two, "grad_norm") <= 1e-5
    assert training.apart(one, two) <= 2e-6


# Parts of the model that only some batches use


def partly_used(context: RankContext, setting: Setting) -> dict[str, Any]:
    """An extra layer that only the micro-batch with the bad token goes through: micro-batch 1 of 3 in step 2."""
    module = tiny.bert(dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module.extra = torch.nn.Linear(2, 2)

    def sometimes(owner: Any, _args: Any, inputs: dict[str, Any], output: Any) -> Any:
        if bool((inputs["input_ids"] == faults.BAD_TOKEN).any()):
            output.logits = output.logits + owner.extra(output.logits)
        return output

    module.register_forward_hook(sometimes, with_kwargs=True)
    before = module.extra.weight.detach().clone()
    run = training.build(context, setting, module, faults.task(setting))
    journal = Journal()
    run.go(journal)
    moved = not torch.equal(before, run.engine.module.extra.weight.detach())
    return {"steps": journal.as_json(), "weights": training.weights_of(run.engine), "moved": moved}


def test_a_part_that_some_batches_use_learns_where_find_unused_says_so() -> None:
    setting = replace(faults.SETTING, optimizer="sgd", learning_rate=0.5, find_unused=True)
    one = partly_used(ONE_PROCESS, setting)

    ranks = run_ranks(partly_used, 2, setting)

    assert one["moved"]
    assert all(rank["moved"] for rank in ranks)
    assert training.worst(one, ranks[0]) <= 1e-6
    assert training.apart(one, ranks[0]) <= 2e-6

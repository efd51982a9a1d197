"""The same loss, norm and weights at every step, on every engine and world size, with the hard cases first.

21 rows, global batch 8, micro-batches of 3: the last step of an epoch holds 5 rows in 2 micro-batches, so that at W = 3
a rank has none. Dropout on, clipping active. SGD: AdamW would hide a wrong gradient scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.training.evaluation import evaluate
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import training
from tests.support.multirank import RanksFailed, run_ranks
from tests.support.training import Setting, apart, worst

pytestmark = pytest.mark.ranks

PLAIN = Setting()


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return training.run(ONE_PROCESS, PLAIN)


def assert_same(reference: dict[str, Any], other: dict[str, Any]) -> None:
    """The promise for fp32: loss 1e-5 relative at every step (here 1e-6), norms and weights to match."""
    assert len(other["steps"]) == len(reference["steps"])
    assert worst(reference, other) <= 1e-6
    assert worst(reference, other, "grad_norm") <= 1e-5
    assert apart(reference, other) <= 2e-6


def test_the_clip_bites_or_this_file_could_not_fail(single: dict[str, Any]) -> None:
    assert max(step["grad_norm"] for step in single["steps"]) > 0.4


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ddp_takes_the_same_steps_as_one_process(single: dict[str, Any], world_size: int) -> None:
    results = run_ranks(training.run, world_size, PLAIN)

    assert_same(single, results[0])
    assert all(result["steps"] == results[0]["steps"] for result in results)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_the_same_steps_as_one_process(single: dict[str, Any], stage: int, world_size: int) -> None:
    results = run_ranks(training.run, world_size, replace(PLAIN, engine="deepspeed", zero_stage=stage), timeout_s=120)

    assert_same(single, results[0])
    assert results[0]["lock_step"] == (stage >= 2)


@pytest.mark.parametrize("broken", training.BREAKS)
def test_a_broken_run_is_rejected(single: dict[str, Any], broken: str) -> None:
    results = run_ranks(training.run, 2, replace(PLAIN, broken=broken))

    with pytest.raises(AssertionError):
        assert_same(single, results[0])


def test_in_float64_two_ranks_end_with_the_weights_of_one_process() -> None:
    setting = replace(PLAIN, double=True, steps=9)

    one, two = training.run(ONE_PROCESS, setting), run_ranks(training.run, 2, setting)[0]

    assert apart(one, two) <= 1e-12
    with pytest.raises(AssertionError):
        assert apart(one, run_ranks(training.run, 2, replace(setting, broken="scaled_gradient"))[0]) <= 1e-12


@pytest.mark.parametrize(
    ("engine", "stage", "world_size"),
    [
        ("auto", None, 2),
        *(("deepspeed", stage, 2) for stage in (0, 1, 2)),
        ("deepspeed", 3, 3),
        ("fsdp", None, 2),
    ],
)
def test_adamw_with_frozen_and_thawed_parts_and_rates_by_layer_is_the_same_on_every_engine(
    engine: str, stage: int | None, world_size: int
) -> None:
    setting = replace(
        PLAIN,
        optimizer="adamw",
        learning_rate=1e-2,
        layer_decay=0.8,
        groups=({"modules": ["pooler"], "learning_rate": 3e-2, "weight_decay": 0.2},),
        steps=8,
        freeze=("embeddings", "encoder.layer[:1]"),
        thaw=((1, "encoder.layer[0]"),),
    )

    one = training.run(ONE_PROCESS, setting)
    other = run_ranks(training.run, world_size, replace(setting, engine=engine, zero_stage=stage), timeout_s=120)[0]
    equal_rates = training.run(ONE_PROCESS, replace(setting, layer_decay=None, groups=()))

    assert worst(one, other) <= 1e-5
    assert worst(one, equal_rates) > 1e-3
    assert worst(one, other, "grad_norm") <= 1e-4
    assert one["slots"] == other["slots"]
    assert one["slots"]["bert.embeddings.word_embeddings.weight"] == []
    assert one["slots"]["bert.encoder.layer.0.output.dense.weight"] == ["exp_avg", "exp_avg_sq", "step"]


class EvaluatesEachStep:
    """Evaluates after every step, as `train.eval_every: 1` does."""

    def __init__(self, run: training.Run) -> None:
        self._run = run

    def after_step(self, record: StepRecord) -> Decision:
        evaluate(self._run.engine, self._run.task, micro_batch_size=4)
        return Decision.CONTINUE


def evaluated(context: RankContext, setting: Setting) -> list[dict[str, Any]]:
    """Collective. Trains with an evaluation after every step; returns each step's numbers."""
    run, recorder = training.build(context, setting), training.Recorder()
    run.go(recorder, EvaluatesEachStep(run)).release()
    return recorder.steps


def test_a_thaw_right_after_an_evaluation_works_under_zero_3() -> None:
    setting = replace(PLAIN, freeze=("embeddings", "encoder.layer[:1]"), thaw=((1, "encoder.layer[0]"),))

    one = evaluated(ONE_PROCESS, setting)
    sharded = run_ranks(evaluated, 2, replace(setting, engine="deepspeed", zero_stage=3), timeout_s=120)[0]

    assert worst({"steps": one}, {"steps": sharded}) <= 1e-6


def test_what_no_grad_cut_off_learns_once_the_frozen_part_above_it_is_thawed() -> None:
    # The embeddings are not frozen themselves, but get no gradient while the encoder above them runs under no_grad.
    setting = replace(PLAIN, optimizer="adamw", steps=8, freeze=("encoder",), freeze_method="no_grad")
    below = "bert.embeddings.word_embeddings.weight"

    never = training.run(ONE_PROCESS, setting)
    one = training.run(ONE_PROCESS, replace(setting, thaw=((1, "encoder"),)))
    two = run_ranks(training.run, 2, replace(setting, thaw=((1, "encoder"),)))[0]

    assert never["slots"][below] == []
    assert one["slots"][below] == ["exp_avg", "exp_avg_sq", "step"]
    assert worst(one, two) <= 1e-5


def test_adafactor_takes_the_same_steps_on_two_ranks() -> None:
    setting = replace(PLAIN, optimizer="adafactor", learning_rate=1e-2)

    assert_same(training.run(ONE_PROCESS, setting), run_ranks(training.run, 2, setting)[0])


def test_class_weights_and_activation_checkpointing_change_no_promise() -> None:
    setting = replace(PLAIN, class_weights=True)

    one = training.run(ONE_PROCESS, setting)
    two = run_ranks(training.run, 2, replace(setting, checkpointing=True))[0]

    assert worst(one, two) <= 1e-6
    assert apart(one, two) <= 2e-6


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3, "fsdp"])
def test_bf16_is_the_same_method_with_other_rounding(single: dict[str, Any], stage: int | str | None) -> None:
    if isinstance(stage, int):
        setting = replace(PLAIN, precision="bf16", engine="deepspeed", zero_stage=stage)
    else:
        setting = replace(PLAIN, precision="bf16", engine=stage or "auto")

    result = run_ranks(training.run, 2, setting, timeout_s=120)[0]

    assert 0 < worst(single, result) <= 0.02


@pytest.mark.parametrize("stage", [None, 0])
def test_fp16_scales_its_loss_and_reports_the_plain_norm(single: dict[str, Any], stage: int | None) -> None:
    setting = replace(PLAIN, precision="fp16", engine="auto" if stage is None else "deepspeed", zero_stage=stage)

    result = run_ranks(training.run, 2, setting, timeout_s=120)[0]

    assert worst(single, result) <= 0.02
    assert worst(single, result, "grad_norm") <= 0.05
    assert all(step["applied"] for step in result["steps"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_fp16_without_clipping_reports_the_plain_norm(stage: int) -> None:
    plain = replace(PLAIN, max_grad_norm=None, learning_rate=0.1)
    setting = replace(plain, precision="fp16", engine="deepspeed", zero_stage=stage)

    result = run_ranks(training.run, 2, setting, timeout_s=120)[0]
    one = training.run(ONE_PROCESS, plain)

    assert worst(one, result) <= 0.02
    assert worst(one, result, "grad_norm") <= 0.05


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_fp16_comes_down_from_a_loss_scale_that_overflows(stage: int | None) -> None:
    # One example per step on three ranks: the first scale, 65536, times W / weight = 3 and a probability of about 0.5 is
    # above fp16's largest number, 65504, in the gradient of the logits.
    engine = "auto" if stage is None else "deepspeed"
    setting = replace(
        PLAIN,
        global_batch_size=1,
        max_grad_norm=None,
        learning_rate=1e-3,
        precision="fp16",
        engine=engine,
        zero_stage=stage,
    )

    result = run_ranks(training.run, 3, setting, timeout_s=120)[0]

    applied = [step["applied"] for step in result["steps"]]
    assert not applied[0]
    assert applied[-1]
    assert result["updates"] == sum(applied)  # a skipped step does not advance the schedule


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_moments_change_nothing(single: dict[str, Any], stage: int) -> None:
    setting = replace(PLAIN, engine="deepspeed", zero_stage=stage, deepspeed="offload")

    assert_same(single, run_ranks(training.run, 2, setting, timeout_s=120)[0])


def test_a_failing_rank_is_reported_by_the_test_helper() -> None:
    with pytest.raises(RanksFailed):
        run_ranks(training.run, 2, replace(PLAIN, global_batch_size=0))

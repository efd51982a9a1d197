"""The plan of a run as text: the banner of every run, and what `--dry-run` prints."""

from __future__ import annotations

from dtrain.config.schema import Config
from dtrain.data.order import StepPlan, assign_micro_batches, contiguous_shares
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.build import engine_name, engine_traits
from dtrain.engine.protocol import EngineTraits
from dtrain.models import freezing
from dtrain.tasks.protocol import Task
from dtrain.training.build import PreparedModel, count, describe_device, gigabytes, total_steps
from dtrain.training.computed_tokens import describe_padding
from dtrain.training.understood import describe_data

PADDING_STEPS = 20
"""Steps by which --dry-run measures the padding."""


def describe(
    config: Config, context: RankContext, task: Task, prepared: PreparedModel, steps: StepPlan, *, in_full: bool
) -> str:
    """Returns the plan, one line for each of: ranks, engine, data, steps, parameters, memory, exactness, padding, warnings."""
    engine, why = engine_name(config, context)
    total = total_steps(config, steps)
    traits = engine_traits(config, context, total_steps=total)
    parameters = list(prepared.module.parameters())
    trainable = count([p for p in parameters if p.requires_grad])
    frozen = freezing.frozen_parameters(prepared.module)
    kept = prepared.frozen_cache.describe(traits)
    rows = ", ".join(f"{split} {len(split_rows)}" for split, split_rows in task.splits.items())
    lines = [
        f"run        {config.run_dir} (seed {config.run.seed})",
        f"topology   {context.topology.describe()}, {describe_device(prepared.module)}",
        f"engine     {engine} ({why}), {config.engine.precision}" + (f", {traits.detail}" if traits.detail else ""),
        f"data       {rows} examples",
        *describe_data(task, has_decoder=task.head.has_decoder),
        f"steps      {total}: {steps.steps_per_epoch} per epoch, global batch {config.train.global_batch_size}",
        f"per step   {_shares(config, context, steps, lock_step=traits.lock_step, contiguous=traits.contiguous)}",
        *(_padding(task, prepared, steps) if in_full else []),
        f"parameters {trainable:,} trainable, {count(parameters) - trainable:,} frozen",
        f"memory     {_memory(traits, context, count(parameters), trainable)} per rank, without activations",
        f"exactness  {exactness(config, traits)}",
    ]
    if task.tokenizer is not None:
        lines.append(f"unpad      {prepared.unpadding}")
    if set(task.splits) <= {"train"}:
        lines.append(
            "warning: nothing will be evaluated, because there is only a train split (data.validation_fraction=0.1 makes one)"
        )
    if frozen:
        lines.append(f"frozen     {len(frozen)} tensors: {freezing.summary(frozen)}")
    if kept is not None:
        lines.append(f"cache      {kept}")
    if in_full:
        lines += [f"  frozen   {name}" for name in frozen]
    return "\n".join([*lines, *_warnings(config, context, steps), *traits.notes])


def _shares(config: Config, context: RankContext, steps: StepPlan, *, lock_step: bool, contiguous: bool = False) -> str:
    micro_batches, ranks = steps.micro_batches(0), context.world_size
    number, costs = len(micro_batches), steps.costs(micro_batches)
    neighbors = contiguous_shares(number, world_size=ranks, costs=costs) if contiguous else None
    assigned = [
        assign_micro_batches(number, rank=rank, world_size=ranks, lock_step=lock_step, costs=costs, shares=neighbors)
        for rank in range(ranks)
    ]
    shares = [sum(assignment.counted for assignment in assignments) for assignments in assigned]
    spread = str(shares[0]) if min(shares) == max(shares) else f"{min(shares)} to {max(shares)}"
    line = f"{number} micro-batches of {_size(config)}, {spread} per rank, {shares.count(0)} rank(s) idle"
    return line if config.train.micro_batch_tokens is None else f"{line} (in the first step)"


def _size(config: Config) -> str:
    tokens = config.train.micro_batch_tokens
    return str(config.train.micro_batch_size) if tokens is None else f"at most {tokens} tokens"


def _padding(task: Task, prepared: PreparedModel, steps: StepPlan) -> list[str]:
    """Returns a line about the padding in the first steps; none for a task without tokens."""
    found = describe_padding(prepared, task, steps, range(min(steps.steps_per_epoch, PADDING_STEPS)))
    return [] if found is None else [f"padding    {found}"]


def _memory(traits: EngineTraits, context: RankContext, parameters: int, trainable: int) -> str:
    """Returns the bytes of weights, gradients and optimizer slots of one rank, all in fp32."""
    cost = traits.memory
    parts = {
        "weights": cost.weights * parameters,
        "gradients": cost.gradients * trainable,
        "optimizer": cost.optimizer * trainable,
    }
    if context.world_size > 1 and cost.exchange:
        parts["exchange"] = cost.exchange * trainable
    details = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    return f"{gigabytes(sum(parts.values()))} ({details})"


def _warnings(config: Config, context: RankContext, steps: StepPlan) -> list[str]:
    """Returns warnings about settings that are allowed but may not be intended."""
    most, train = len(steps.micro_batches(0)), config.train
    warnings = _length_warnings(config, steps)
    if context.world_size > most:
        warnings.append(
            f"warning: {context.world_size - most} of {context.world_size} ranks are idle in "
            f"{'every' if train.micro_batch_tokens is None else 'the first'} step: a global batch of "
            f"{train.global_batch_size} has {most} micro-batch(es) of {_size(config)}"
        )
    return warnings


def _length_warnings(config: Config, steps: StepPlan) -> list[str]:
    """Returns warnings about a batch that is larger than the data, and about the limit that ends a run with two limits."""
    train, warnings = config.train, []
    if train.global_batch_size > steps.num_examples:
        warnings.append(
            f"warning: train.global_batch_size={train.global_batch_size} is larger than the training data: each epoch is one step "
            f"with all {steps.num_examples} examples"
        )
    if train.epochs is not None and train.max_steps is not None:
        whole = train.epochs * steps.steps_per_epoch
        if whole != train.max_steps:
            names = [f"train.epochs={train.epochs} ({whole} steps)", f"train.max_steps={train.max_steps}"]
            first, later = names if whole < train.max_steps else reversed(names)
            warnings.append(f"warning: {first} ends the run before {later}")
    return warnings


def warn_without_update(config: Config, *, step: int, updates: int) -> str | None:
    """Returns a warning for the end of a run that changed no weight; None if it did."""
    if step == 0 or updates > 0:
        return None
    why = "no gradient could be used"
    if config.engine.precision == "fp16":
        why = (
            "in fp16 the gradients overflowed in each, and each halved the loss scale. Train for more steps, or use "
            "engine.precision=bf16"
        )
    return f"All {step} steps were skipped, so the model did not learn anything: {why}."


def exactness(config: Config, traits: EngineTraits) -> str:
    """Returns the row of docs/exactness.md that this run is in."""
    row = _exactness_row(config, traits)
    return f"{row}; {traits.stronger_promise}" if traits.stronger_promise else row


def _exactness_row(config: Config, traits: EngineTraits) -> str:
    if config.model.batch_norm == "train":
        return "inexact: model.batch_norm=train updates running statistics separately on each rank"
    if traits.other_algorithm:
        return f"another algorithm: {traits.other_algorithm}; the loss stays close to plain ddp's, without a guaranteed bound"
    other_rounding = [
        *([config.engine.precision] if config.engine.precision != "fp32" else []),
        *traits.other_rounding,
        *(["compile"] if config.model.compile else []),
    ]
    if other_rounding:
        return f"same method, other rounding ({', '.join(other_rounding)}): loss within 2 % of fp32 over 50 steps"
    return (
        "same loss at every step on any engine and world size: 1e-5 relative over 50 steps in fp32; evaluation to the digit"
        + (f" ({traits.evaluation_note})" if traits.evaluation_note else "")
    )

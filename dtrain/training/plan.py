"""What a run is about to do, in words: the banner of every run, and all that `--dry-run` prints."""

from __future__ import annotations

from dtrain.config.schema import Config
from dtrain.data.order import StepPlan, assign_micro_batches
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.build import engine_name
from dtrain.models import freezing
from dtrain.tasks.protocol import Task
from dtrain.training.build import Construction, count, describe_device, gigabytes, total_steps

SLOTS = {"adamw": 2, "sgd": 0, "adafactor": 0}
"""Numbers that an optimizer keeps per trainable number; Adafactor keeps rows and columns only, SGD one with momentum."""


HARMLESS = (
    *("zero_optimization", "zero_allow", "zero_force", "steps_per_print", "wall_clock", "dump_state", "memory_break"),
    *("overlap_comm", "contiguous_gradients", "reduce_bucket", "allgather_bucket", "reduce_scatter", "sub_group_size"),
    *("stage3_", "round_robin_gradients", "flops_profiler", "comms_logger", "tensorboard", "csv_monitor"),
)
"""Beginnings of the DeepSpeed keys that change no number; any other that is passed through puts a run in a looser row."""


def describe(
    config: Config, context: RankContext, task: Task, prepared: Construction, steps: StepPlan, *, in_full: bool
) -> str:
    """RankContext, steps, micro-batches, parameters, memory and exactness, a line each."""
    engine, why = engine_name(config, context)
    parameters = list(prepared.module.parameters())
    trainable = count([p for p in parameters if p.requires_grad])
    frozen = freezing.frozen_parameters(prepared.module)
    total = total_steps(config, steps)
    rows = ", ".join(f"{split} {len(split_rows)}" for split, split_rows in task.splits.items())
    lines = [
        f"run        {config.run_dir} (seed {config.run.seed})",
        f"context   {context.topology.describe()}, {describe_device()}",
        f"engine     {engine} ({why}), {config.engine.precision}" + _stage(config, engine),
        f"data       {rows} examples",
        f"steps      {total}: {steps.steps_per_epoch} per epoch, global batch {config.train.global_batch_size}",
        f"per step   {_shares(config, context, steps, engine)}",
        f"parameters {trainable:,} trainable, {count(parameters) - trainable:,} frozen",
        f"memory     {_memory(config, context, engine, count(parameters), trainable)} per rank, without activations",
        f"exactness  {exactness(config, engine, context.world_size)}",
    ]
    if set(task.splits) <= {"train"}:
        lines.append(
            "warning: nothing will be evaluated, for there is only a train split (data.validation_fraction=0.1 makes one)"
        )
    if frozen:
        lines.append(f"frozen     {len(frozen)} tensors: {freezing.summary(frozen)}")
    if in_full:
        lines += [f"  frozen   {name}" for name in frozen]
    return "\n".join([*lines, *_warnings(config, context, steps)])


def _stage(config: Config, engine: str) -> str:
    return f", ZeRO {config.engine.zero_stage or 0}" if engine == "deepspeed" else ""


def _shares(config: Config, context: RankContext, steps: StepPlan, engine: str) -> str:
    number = len(steps.micro_batches(0))
    lock_step = engine == "deepspeed" and (config.engine.zero_stage or 0) >= 2
    own = [
        sum(
            turn.counted
            for turn in assign_micro_batches(number, rank=rank, world_size=context.world_size, lock_step=lock_step)
        )
        for rank in range(context.world_size)
    ]
    spread = str(own[0]) if min(own) == max(own) else f"{min(own)} to {max(own)}"
    return f"{number} micro-batches of {config.train.micro_batch_size}, {spread} per rank, {own.count(0)} rank(s) idle"


def _memory(config: Config, context: RankContext, engine: str, parameters: int, trainable: int) -> str:
    """Bytes of weights, gradients and optimizer slots of one rank, all in fp32."""
    stage = config.engine.zero_stage or 0 if engine == "deepspeed" else 0
    ranks = context.world_size
    slots = 1 if config.optim.name == "sgd" and config.optim.momentum else SLOTS[config.optim.name]
    weights = 4 * parameters / (ranks if stage == 3 else 1)
    gradients = 4 * trainable / (ranks if stage >= 2 else 1)
    # ZeRO keeps a flat fp32 master of its shard beside the module's own copy.
    optimizer = 4 * (slots + (stage >= 1)) * trainable / (ranks if stage >= 1 else 1)
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    if ranks > 1 and (exchange := _exchange_bytes(config, engine)):
        parts["exchange"] = exchange * trainable
    each = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    return f"{gigabytes(sum(parts.values()))} ({each})"


def _exchange_bytes(config: Config, engine: str) -> int:
    """For each trainable number, at most, while gradients cross."""
    if config.engine.powersgd is not None:
        return 3 * 4  # what was left out before and what is now, and a copy of the gradient
    return 2 if config.engine.gradient_wire == "bf16" and engine == "ddp" else 0


def _warnings(config: Config, context: RankContext, steps: StepPlan) -> list[str]:
    """What is allowed, and may not be what is wanted."""
    found, most, powersgd = [], len(steps.micro_batches(0)), config.engine.powersgd
    if context.world_size > most:
        found.append(
            f"warning: {context.world_size - most} of {context.world_size} ranks are idle in every step: a global batch of "
            f"{config.train.global_batch_size} has {most} micro-batch(es) of {config.train.micro_batch_size}"
        )
    if context.world_size > 1 and powersgd is not None and powersgd.start_step >= total_steps(config, steps):
        found.append(
            f"warning: no gradient will cross as factors, for engine.powersgd.start_step={powersgd.start_step} is not below "
            f"the {total_steps(config, steps)} steps of this run"
        )
    if context.world_size > 1 and config.train.local_steps > 1:
        found.append(
            f"note: a wish to stop (a signal, train.max_minutes) waits for the next average of the weights, up to "
            f"{config.train.local_steps} steps"
        )
    return found


def _other_algorithm(config: Config) -> str | None:
    """What changes more than rounding on several ranks."""
    if config.train.local_steps > 1:
        return f"weights averaged every {config.train.local_steps} steps (train.local_steps)"
    powersgd = config.engine.powersgd
    if powersgd is not None:
        return f"gradients of rank {powersgd.rank} from step {powersgd.start_step} on (engine.powersgd)"
    return None


def exactness(config: Config, engine: str, world_size: int) -> str:
    """The row of the README's table that this run is in."""
    passed = {**config.engine.deepspeed, **config.engine.deepspeed.get("zero_optimization", {})}
    inexact = sorted(key for key in passed if not key.startswith(HARMLESS))
    loose = [
        name
        for name, active in {
            config.engine.precision: config.engine.precision != "fp32",
            "bf16 on the wire": config.engine.gradient_wire == "bf16" and world_size > 1,
            ", ".join(inexact): engine == "deepspeed" and bool(inexact),
            "compile": config.model.compile,
        }.items()
        if active
    ]
    if config.model.batch_norm == "train":
        return "inexact: model.batch_norm=train updates running statistics on each rank apart"
    other = _other_algorithm(config) if world_size > 1 else None
    if other is not None:
        return f"another algorithm: {other}; the loss follows plain ddp's nearly, with no bound"
    if loose:
        return f"same method, other rounding ({', '.join(loose)}): loss within 2 % of fp32 over 50 steps"
    return (
        "same loss at every step on any engine and world size: 1e-5 relative over 50 steps in fp32; evaluation to the digit"
        + (" (ZeRO 3: 1e-6)" if engine == "deepspeed" and config.engine.zero_stage == 3 else "")
    )

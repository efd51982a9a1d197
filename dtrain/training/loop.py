"""The training step and the loop around it.

A step: micro-batches forward and backward, one small all-reduce (loss, faults, wishes to stop, and the next step's
summed weight), clip and update, monitors. Everything in a StepRecord is equal on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from dtrain.data.batches import MicroBatch, StepBatches, step_batches
from dtrain.data.order import StepPlan
from dtrain.data.seeding import seed_all
from dtrain.distributed.collectives import agree, all_gather_object, all_reduce_sum
from dtrain.distributed.heartbeat import Phase
from dtrain.engine.protocol import Engine, StepResult
from dtrain.models.freezing import frozen_statistics
from dtrain.tasks.protocol import Task
from dtrain.training.evaluation import to_device
from dtrain.training.monitors.protocol import Decision, Fault, Monitor, RunState, StepRecord
from dtrain.training.out_of_memory import explain_in_step, explain_in_training


@dataclass(frozen=True)
class Loop:
    """What a run does, apart from its state.

    learning_rate: by number of updates applied. train_mode: puts the module in training mode, frozen parts apart.
    before_epoch: called with the epoch at its first step; gives the engine to go on with (thawing builds a new one).
    roll_back: puts the engine back to the newest checkpoint, when a monitor asks for it.
    log_gradients: steps between those that measure the gradient of each parameter; None: never.
    loss_is_scaled: fp16, where an overflow of the gradient is answered by the loss scale and is no fault.
    drops: told a step's loss per target before its update, whether to leave that out; the same on every rank.
    """

    plan: StepPlan
    total_steps: int
    seed: int
    workers: int
    loss_is_scaled: bool
    learning_rate: Callable[[int], float]
    train_mode: Callable[[nn.Module], None]
    before_epoch: Callable[[Engine, int], Engine]
    log_gradients: int | None = None
    roll_back: Callable[[Engine], Engine] | None = None
    drops: Callable[[float], bool] | None = None


@dataclass(frozen=True)
class Sums:
    """Over all micro-batches and ranks: this step's losses, who found a fault or has a wish, the next step's targets.

    square: where ranks step apart, each one's weight times the square of its gradient's norm.
    own_next_weight: this rank's alone.
    """

    loss: float
    faults: int
    stops: int
    preempts: int
    next_weight: float
    next_targets: int
    square: float
    own_next_weight: float


def train(
    loop: Loop, engine: Engine, task: Task, monitors: Sequence[Monitor], state: RunState
) -> tuple[Engine, Decision]:
    """Collective. Runs from `state.step` to the end, or until a monitor stops it; gives the engine and why it ended.

    Changes `state`, and the engine's weights.
    """
    steps = step_batches(
        loop.plan,
        task.splits["train"],
        task.collate,
        engine.context.topology,
        lock_step=engine.lock_step,
        start=state.step,
        stop=loop.total_steps,
        workers=loop.workers,
    )
    heartbeat = engine.context.heartbeat
    heartbeat.at(Phase.DATA, step=state.step)
    coming = next(steps, None)
    sums = add_up(engine, task, [], wish=Decision.CONTINUE, coming=coming, square=0.0)
    wish = stopped = Decision.CONTINUE
    warm: Engine | None = None
    while coming is not None and stopped == Decision.CONTINUE:
        if coming.step % loop.plan.steps_per_epoch == 0:
            engine = loop.before_epoch(engine, loop.plan.epoch_of(coming.step))
        if not engine.module.training:  # at the start, and after an evaluation
            loop.train_mode(engine.module)
        if engine is not warm:  # new: at the start, after a thaw, after a rollback
            with heartbeat.within(Phase.BUILDING):  # it may compile
                warm = warm_up(engine, task, coming)
        record, sums, coming = take_step(loop, engine, task, coming, steps, sums, state, wish=wish)
        heartbeat.at(Phase.MONITORS)
        answer = ask(monitors, record)
        if answer == Decision.ROLLBACK and loop.roll_back is not None:  # on every rank alike
            engine, answer = loop.roll_back(engine), Decision.CONTINUE
        # Between two averages the ranks have no common weights to stop with: a wish is kept until there are.
        wish = answer if record.averaged else max(wish, answer)
        stopped = agreed(sums) if record.averaged else Decision.CONTINUE
        # A wish rides with the next step's all-reduce and holds one step later; after an evaluation it holds at once.
        if record.metrics is not None:
            stopped = Decision(agree(max(stopped, wish), engine.context))
    return engine, stopped


def warm_up(engine: Engine, task: Task, batches: StepBatches) -> Engine:
    """Collective. Lets a new engine make ready on a micro-batch that counts for nothing; gives the engine."""
    tensors = batches.micro_batches[0].tensors
    with frozen_statistics(engine.module):
        device = next(engine.module.parameters()).device
        engine.warm_up(lambda: task.loss(engine.model, to_device(tensors, device)), step=batches.step)
    return engine


def ask(monitors: Sequence[Monitor], record: StepRecord) -> Decision:
    """The largest answer. Who stands below one that wants to roll back is not asked: this step's state is given up."""
    wish = Decision.CONTINUE
    for monitor in monitors:
        wish = max(wish, answer := monitor.after_step(record))
        if answer == Decision.ROLLBACK:
            return answer
    return wish


def agreed(sums: Sums) -> Decision:
    """What the ranks' wishes come to."""
    if sums.preempts:
        return Decision.PREEMPT
    return Decision.STOP if sums.stops else Decision.CONTINUE


def take_step(
    loop: Loop,
    engine: Engine,
    task: Task,
    batches: StepBatches,
    steps: Iterator[StepBatches],
    sums: Sums,
    state: RunState,
    *,
    wish: Decision,
) -> tuple[StepRecord, Sums, StepBatches | None]:
    """Collective. One step; gives its record, the sums that the next one needs, and the next one's batches."""
    heartbeat, before = engine.context.heartbeat, engine.context.traffic.copy()
    heartbeat.at(Phase.MICRO_BATCH, step=batches.step)
    learning_rate = loop.learning_rate(state.updates)
    targets, weight, own_weight = sums.next_targets, sums.next_weight, sums.own_next_weight
    losses = run_micro_batches(engine, task, batches, scale=_scale(engine, weight, own_weight), seed=loop.seed)
    heartbeat.at(Phase.DATA)
    coming = next(steps, None)
    sums = add_up(engine, task, losses, wish=wish, coming=coming, square=_square(engine, own_weight))
    heartbeat.at(Phase.UPDATE)
    gradient_norms = engine.gradient_norms() if _measures(loop, state) else None
    with explain_in_step():
        result = _update(loop, engine, sums, (weight, own_weight), gradient_norms, learning_rate=learning_rate)
    grad_norm = 0.0 if weight == 0 else result.grad_norm
    # fp16 answers an overflow with a smaller loss scale; below 1 it is no overflow any more.
    norm_is_fine = math.isfinite(grad_norm) or (loop.loss_is_scaled and engine.scalars().get("loss_scale", 1.0) >= 1)
    _advance(state, batches, targets, applied=result.applied)
    ends_epoch, is_last = (batches.step + 1) % loop.plan.steps_per_epoch == 0, state.step == loop.total_steps
    averaged = _average_if_due(engine, state, is_due=ends_epoch or is_last)
    faults = _gather_faults(engine, batches, losses) if sums.faults else ()
    traffic = engine.context.traffic.since(before)
    record = StepRecord(
        step=state.step,
        epoch=_epochs_after(loop.plan, batches.step),
        loss=sums.loss / weight if weight else 0.0,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        examples=batches.examples,
        targets=targets,
        applied=result.applied,
        finite=sums.faults == 0 and norm_is_fine,
        faults=faults,
        ends_epoch=ends_epoch,
        is_last=is_last,
        gradient_norms=gradient_norms,
        averaged=averaged,
        traffic=traffic if traffic.is_whole else None,
    )
    return record, sums, coming


def _measures(loop: Loop, state: RunState) -> bool:
    return loop.log_gradients is not None and (state.step + 1) % loop.log_gradients == 0


def _advance(state: RunState, batches: StepBatches, targets: int, *, applied: bool) -> None:
    state.step += 1
    state.updates += int(applied)
    state.examples += batches.examples
    state.targets += targets


def _epochs_after(plan: StepPlan, step: int) -> float:
    """Passes over the data when that step is done."""
    return plan.epoch_of(step) + (step % plan.steps_per_epoch + 1) / plan.steps_per_epoch


def _average_if_due(engine: Engine, state: RunState, *, is_due: bool) -> bool:
    """Collective. Whether all ranks hold the same weights after this step, for which those of local steps average."""
    local = engine.local
    if local is None:
        return True
    if is_due or state.step % local.every == 0:
        local.average()
        return True
    return False


def _square(engine: Engine, own_weight: float) -> float:
    """This rank's weight times the square of its own gradient's norm, where ranks step apart."""
    if engine.local is None or not own_weight:
        return 0.0
    norm = engine.local.own_norm()
    return own_weight * (norm * norm)  # a power would raise an error where this is infinite, on one rank alone


def _scale(engine: Engine, weight: float, own_weight: float) -> float:
    """What turns a loss sum into what `engine.backward` takes; 0 without a target."""
    if engine.local is not None:
        return 1.0 / own_weight if own_weight else 0.0
    # The engine averages gradients over ranks; this turns the average into (sum of losses) / (sum of weights).
    return engine.context.world_size / weight if weight else 0.0


def _update(
    loop: Loop,
    engine: Engine,
    sums: Sums,
    weights: tuple[float, float],
    gradient_norms: Mapping[str, float] | None,
    *,
    learning_rate: float,
) -> StepResult:
    """Collective. The optimizer's step, unless it is left out; the result is the same on every rank.

    Args:
        weights: summed weight of the step on all ranks, and on this one.
        gradient_norms: where they are measured already.
    """
    for group in engine.param_groups:
        group["lr"] = learning_rate
    weight, own_weight = weights
    is_unwanted = _is_unwanted(loop, sums, weight)
    # Without a target there is no gradient: a step would only decay weights and moments.
    discard = sums.faults > 0 or weight == 0 or is_unwanted
    if engine.local is None:
        # DeepSpeed does not tell the norm of what it drops.
        dropped_norm = _norm_of(gradient_norms or engine.gradient_norms()) if is_unwanted else None
        result = engine.step(discard=discard)
        return result if dropped_norm is None else replace(result, grad_norm=dropped_norm)
    norm = math.sqrt(sums.square / weight) if weight else 0.0
    applied = not discard and math.isfinite(norm)
    engine.step(discard=not applied or own_weight == 0)
    if applied:
        engine.local.took(own_weight, weight)
    return StepResult(norm, applied)


def _is_unwanted(loop: Loop, sums: Sums, weight: float) -> bool:
    """Whether the update is left out for its loss, which is finite."""
    return loop.drops is not None and sums.faults == 0 and weight > 0 and loop.drops(sums.loss / weight)


def _norm_of(gradient_norms: Mapping[str, float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in gradient_norms.values()))


def run_micro_batches(engine: Engine, task: Task, batches: StepBatches, *, scale: float, seed: int) -> list[float]:
    """Collective. Forward and backward of this rank's part; gives the loss sum of each counted micro-batch, in nats.

    Args:
        scale: of each loss sum, by which the gradients add up to that of (sum of losses) / (sum of weights) (law 4).
    """
    device = next(engine.module.parameters()).device
    losses = []
    for position, micro_batch in enumerate(batches.micro_batches):
        engine.context.heartbeat.tick()
        is_last = position == len(batches.micro_batches) - 1
        with engine.micro_batch(last=is_last), explain_in_training(micro_batch.tensors):
            seed_all(seed, "forward", batches.step, micro_batch.index)
            with nullcontext() if micro_batch.counted else frozen_statistics(engine.module):
                loss = task.loss(engine.model, to_device(micro_batch.tensors, device))
            engine.backward(loss * (scale if micro_batch.counted else 0.0))
        if micro_batch.counted:
            losses.append(loss.detach())
    return torch.stack(losses).double().tolist() if losses else []


def add_up(
    engine: Engine, task: Task, losses: Sequence[float], *, wish: Decision, coming: StepBatches | None, square: float
) -> Sums:
    """Collective. The one small all-reduce of a step; float64 holds its counts exactly."""
    engine.context.heartbeat.at(Phase.SUMMING)
    ahead = [task.targets(batch.tensors) for batch in _counted(coming)]
    own_weight = math.fsum(targets.weight for targets in ahead)
    own = [
        math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan,
        sum(not math.isfinite(loss) for loss in losses),
        int(wish == Decision.STOP),
        int(wish == Decision.PREEMPT),
        own_weight,
        sum(targets.count for targets in ahead),
        square,
    ]
    loss, faults, stops, preempts, weight, count, square = all_reduce_sum(
        torch.tensor(own, dtype=torch.float64), engine.context
    ).tolist()
    return Sums(loss, int(faults), int(stops), int(preempts), weight, int(count), square, own_weight)


def _counted(batches: StepBatches | None) -> list[MicroBatch]:
    return [batch for batch in batches.micro_batches if batch.counted] if batches is not None else []


def _gather_faults(engine: Engine, batches: StepBatches, losses: Sequence[float]) -> list[Fault]:
    """Collective. Which micro-batches, on which ranks, gave a loss that is not finite."""
    own = [
        {
            "rank": engine.context.rank,
            "micro_batch": batch.index,
            "loss": str(loss),
            "examples": list(batch.example_index),
        }
        for batch, loss in zip(_counted(batches), losses, strict=True)
        if not math.isfinite(loss)
    ]
    return [Fault.from_json(found) for part in all_gather_object(own, engine.context) for found in part]

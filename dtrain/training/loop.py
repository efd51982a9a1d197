"""The training step and the loop around it.

A step: forward and backward of the micro-batches, one small all-reduce (look_ahead.py), clip and update, monitors.
Everything in a StepRecord is equal on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from dtrain.data.batches import StepBatches, step_batches
from dtrain.data.order import StepPlan
from dtrain.data.read_ahead import read_ahead
from dtrain.data.seeding import seed_all
from dtrain.distributed.collectives import agree, all_gather_object
from dtrain.distributed.heartbeat import Phase
from dtrain.engine.parameter_groups import set_learning_rate
from dtrain.engine.protocol import Engine, StepResult, StepWeight
from dtrain.errors import ConfigError
from dtrain.models.freezing import frozen_statistics
from dtrain.models.host_copy import to_device
from dtrain.tasks.protocol import Task
from dtrain.training.look_ahead import LookAhead, Step, StepTotals, counted
from dtrain.training.monitors.protocol import Decision, Fault, Monitor, RunState, StepRecord
from dtrain.training.out_of_memory import explain_in_step, explain_in_training


@dataclass(frozen=True)
class LoopSettings:
    """The values that do not change during a run.

    Attributes:
        plan: which examples each step takes.
        total_steps: the step at which the run ends.
        seed: run.seed.
        workers: data loader processes.
        loss_is_scaled: whether precision is fp16, where a smaller loss scale handles a gradient overflow.
        learning_rate: returns the learning rate, given the number of updates applied so far.
        train_mode: puts the module in training mode, except its frozen parts.
        log_gradients: number of steps between two measurements of each parameter's gradient; None: never.
        drops: given a step's loss per target before the update, returns whether to skip the update. Equal on every rank.
    """

    plan: StepPlan
    total_steps: int
    seed: int
    workers: int
    loss_is_scaled: bool
    learning_rate: Callable[[int], float]
    train_mode: Callable[[nn.Module], None]
    log_gradients: int | None = None
    drops: Callable[[float], bool] | None = None


class LoopRun(Protocol):
    """The part of a run that the loop uses. The run owns the engine: `begin_epoch` and `roll_back` may replace it."""

    @property
    def engine(self) -> Engine: ...
    @property
    def task(self) -> Task: ...
    @property
    def state(self) -> RunState: ...
    @property
    def settings(self) -> LoopSettings: ...
    @property
    def look_ahead(self) -> LookAhead: ...

    def begin_epoch(self, epoch: int) -> None:
        """Collective. Unfreezes the parameters that are due. Called before the first step of an epoch."""
        ...

    def roll_back(self) -> None:
        """Collective. Restores a checkpoint, if there is one, when a monitor requests it. The data position stays."""
        ...


def batches_ahead(
    settings: LoopSettings, task: Task, engine: Engine, *, start: int
) -> Generator[StepBatches, None, None]:
    """Returns this rank's batches of every step from `start` to the end."""
    steps = step_batches(
        settings.plan,
        task.splits["train"],
        task.collate,
        engine.context.topology,
        lock_step=engine.lock_step,
        start=start,
        stop=settings.total_steps,
        workers=settings.workers,
    )
    return steps if settings.workers else read_ahead(steps)  # workers read ahead themselves


def train(run: LoopRun, monitors: Sequence[Monitor]) -> Decision:
    """Collective. Trains from `run.state.step` to the end, or until a monitor stops it; returns why it ended.

    Changes the run's state, and its engine's weights.
    """
    plan, look_ahead, context = run.settings.plan, run.look_ahead, run.engine.context
    context.heartbeat.at(Phase.DATA, step=run.state.step)
    look_ahead.start()
    decision = Decision.CONTINUE
    prepared_engine: Engine | None = None
    while (step := look_ahead.next_step) is not None and decision == Decision.CONTINUE:
        if step.batches.step % plan.steps_per_epoch == 0:
            run.begin_epoch(plan.epoch_of(step.batches.step))
        if not run.engine.module.training:  # At the start, and after an evaluation.
            run.settings.train_mode(run.engine.module)
        if run.engine is not prepared_engine:  # The engine is new at the start, after a thaw and after a rollback.
            with context.heartbeat.within(Phase.BUILDING):  # it may compile
                warm_up(run.engine, run.task, step.batches)
            prepared_engine = run.engine
        record = take_step(run, step)
        decision = decide(run, record, monitors)
    return decision


def warm_up(engine: Engine, task: Task, batches: StepBatches) -> None:
    """Collective. Lets a new engine prepare itself on a micro-batch that does not count."""
    tensors = batches.micro_batches[0].tensors
    with frozen_statistics(engine.module):
        device = next(engine.module.parameters()).device
        engine.warm_up(lambda: task.loss(engine.model, to_device(tensors, device)), step=batches.step)


def take_step(run: LoopRun, step: Step) -> StepRecord:
    """Collective. Takes one step; the run's look-ahead then holds the next one."""
    engine, settings, state, batches = run.engine, run.settings, run.state, step.batches
    heartbeat, traffic_before = engine.context.heartbeat, engine.context.traffic.copy()
    heartbeat.at(Phase.MICRO_BATCH, step=batches.step)
    learning_rate = settings.learning_rate(state.updates)
    losses = run_micro_batches(engine, run.task, batches, scale=engine.loss_scale(step.weight), seed=settings.seed)
    local_sq_norm = engine.weighted_sq_norm(step.weight)
    totals = run.look_ahead.advance(losses, weighted_sq_norm=local_sq_norm, lacks_gradients=engine.lacks_gradients)
    heartbeat.at(Phase.UPDATE)
    if totals.lacking:
        engine.settle_missing_gradients(totals.lacking)
    gradient_norms = engine.gradient_norms() if _measures_gradients(settings, state) else None
    with explain_in_step():
        result = _update(
            run,
            step.weight,
            totals,
            gradient_norms,
            learning_rate=learning_rate,
            has_summed_norm=local_sq_norm is not None,
        )
    _advance_state(state, step, applied=result.applied)
    ends_epoch = (batches.step + 1) % settings.plan.steps_per_epoch == 0
    is_last = state.step == settings.total_steps
    averaged = engine.synchronize(state.step, force=ends_epoch or is_last)
    faults = _gather_faults(engine, batches, losses) if totals.faults else ()
    traffic = engine.context.traffic.since(traffic_before)
    weight = step.weight.total
    grad_norm = result.grad_norm if weight else 0.0
    return StepRecord(
        step=state.step,
        epoch=_epochs_after(settings.plan, batches.step),
        loss=totals.loss / weight if weight else 0.0,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        examples=batches.examples,
        targets=step.targets,
        applied=result.applied,
        finite=totals.faults == 0 and _is_norm_acceptable(grad_norm, settings, engine),
        faults=faults,
        ends_epoch=ends_epoch,
        is_last=is_last,
        gradient_norms=gradient_norms,
        averaged=averaged,
        traffic=traffic if traffic.is_complete else None,
    )


def decide(run: LoopRun, record: StepRecord, monitors: Sequence[Monitor]) -> Decision:
    """Collective. Runs the monitors; returns whether, and how, the loop ends after this step."""
    look_ahead, context = run.look_ahead, run.engine.context
    context.heartbeat.at(Phase.MONITORS)
    request = run_monitors(monitors, record)
    if request == Decision.ROLLBACK:  # the same on every rank, because it depends on the record alone
        run.roll_back()
        request = Decision.CONTINUE
    # Between two averages of local steps the ranks hold different weights, so a request waits for the next average.
    look_ahead.requested = request if record.averaged else max(look_ahead.requested, request)
    decision = look_ahead.decision if record.averaged else Decision.CONTINUE
    # The next step's all-reduce carries a request, so it takes effect one step later; after an evaluation, immediately.
    if record.metrics is not None:
        wanted = Decision.PREEMPT if look_ahead.wants_stop() else Decision.CONTINUE
        decision = Decision(agree(max(decision, look_ahead.requested, wanted), context))
    return decision


def settle(run: LoopRun, record: StepRecord, monitors: Sequence[Monitor]) -> Decision:
    """Collective. Runs the monitors of a step whose checkpoint precedes its evaluation, after that was restored."""
    with run.engine.context.heartbeat.within(Phase.MONITORS):
        request = run_monitors(monitors, record)
    if request == Decision.ROLLBACK:
        run.roll_back()
        request = Decision.CONTINUE
    return Decision(agree(request, run.engine.context))


def run_monitors(monitors: Sequence[Monitor], record: StepRecord) -> Decision:
    """Returns the largest request. Stops at the first monitor that requests a rollback: this step's state is discarded."""
    largest = Decision.CONTINUE
    for monitor in monitors:
        largest = max(largest, request := _request_of(monitor, record))
        if request == Decision.ROLLBACK:
            return request
    return largest


def _request_of(monitor: Monitor, record: StepRecord) -> Decision:
    """Returns what one monitor requests. A monitor without a return statement requests nothing.

    Raises:
        ConfigError: it returned something that is not a Decision.
    """
    request: object = monitor.after_step(record)
    if request is None:
        return Decision.CONTINUE
    if type(request) is Decision:
        return request
    if not isinstance(request, int) or isinstance(request, bool) or request not in list(Decision):
        raise ConfigError(
            f"{type(monitor).__name__}.after_step returned {request!r} at step {record.step}. Return Decision.CONTINUE, "
            "STOP, ROLLBACK or PREEMPT (dtrain.training.monitors.protocol.Decision), or nothing, which continues."
        )
    return Decision(request)


def run_micro_batches(engine: Engine, task: Task, batches: StepBatches, *, scale: float, seed: int) -> list[float]:
    """Collective. Runs forward and backward of this rank's part; returns the loss sum of each counted micro-batch, in nats.

    Args:
        scale: multiplies each loss sum, so that the gradients add up to that of (sum of losses) / (sum of weights) (law 4).
    """
    device = next(engine.module.parameters()).device
    losses = []
    for position, micro_batch in enumerate(batches.micro_batches):
        engine.context.heartbeat.at(Phase.MICRO_BATCH)
        is_last = position == len(batches.micro_batches) - 1
        with (
            engine.micro_batch(last=is_last),
            explain_in_training(micro_batch.tensors, size_setting=batches.size_setting),
        ):
            seed_all(seed, "forward", batches.step, micro_batch.index)
            if micro_batch.counted:
                loss = task.loss(engine.model, to_device(micro_batch.tensors, device))
                losses.append(loss.detach())
            else:
                with frozen_statistics(engine.module):
                    loss = task.loss(engine.model, to_device(micro_batch.tensors, device))
            engine.context.heartbeat.at(Phase.BACKWARD)
            engine.backward(loss * (scale if micro_batch.counted else 0.0))
    return _to_floats(losses)


def _to_floats(losses: list[torch.Tensor]) -> list[float]:
    """Returns numbers of one device, with one transfer for all."""
    if len(losses) == 1:
        return [losses[0].item()]
    return torch.stack(list(losses)).double().tolist() if losses else []


def _measures_gradients(settings: LoopSettings, state: RunState) -> bool:
    return settings.log_gradients is not None and (state.step + 1) % settings.log_gradients == 0


def _advance_state(state: RunState, step: Step, *, applied: bool) -> None:
    state.step += 1
    state.updates += int(applied)
    state.examples += step.batches.examples
    state.targets += step.targets


def _epochs_after(plan: StepPlan, step: int) -> float:
    """Returns the number of passes over the data once that step is done."""
    return plan.epoch_of(step) + (step % plan.steps_per_epoch + 1) / plan.steps_per_epoch


def _is_norm_acceptable(grad_norm: float, settings: LoopSettings, engine: Engine) -> bool:
    """Returns whether a gradient norm is acceptable. fp16 handles an overflow by a smaller loss scale, down to 1."""
    return math.isfinite(grad_norm) or (settings.loss_is_scaled and engine.scalars().get("loss_scale", 1.0) >= 1)


def _update(
    run: LoopRun,
    weight: StepWeight,
    totals: StepTotals,
    gradient_norms: Mapping[str, float] | None,
    *,
    learning_rate: float,
    has_summed_norm: bool,
) -> StepResult:
    """Collective. Takes the optimizer's step or skips it; the result is the same on every rank.

    Args:
        gradient_norms: norm of each parameter's gradient, if already measured.
        has_summed_norm: whether `totals` has the gradient's norm.
    """
    engine = run.engine
    set_learning_rate(engine.param_groups, learning_rate)
    is_dropped = _is_dropped(run.settings, totals, weight.total)
    # DeepSpeed does not report the norm of a gradient that it discards.
    measures_norm = is_dropped and not has_summed_norm
    dropped_norm = _total_norm(gradient_norms or engine.gradient_norms()) if measures_norm else None
    # Without a target there is no gradient: a step would only decay weights and moments.
    discard = totals.faults > 0 or weight.total == 0 or is_dropped
    result = engine.step(weight, weighted_sq_norm=totals.weighted_sq_norm, discard=discard)
    return result if dropped_norm is None else replace(result, grad_norm=dropped_norm)


def _is_dropped(settings: LoopSettings, totals: StepTotals, weight: float) -> bool:
    """Returns whether to skip the update because of its loss, which is finite."""
    return settings.drops is not None and totals.faults == 0 and weight > 0 and settings.drops(totals.loss / weight)


def _total_norm(gradient_norms: Mapping[str, float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in gradient_norms.values()))


def _gather_faults(engine: Engine, batches: StepBatches, losses: Sequence[float]) -> list[Fault]:
    """Collective. Lists the micro-batches, of all ranks, whose loss is not finite."""
    local = [
        {
            "rank": engine.context.rank,
            "micro_batch": batch.index,
            "loss": str(loss),
            "examples": list(batch.example_index),
        }
        for batch, loss in zip(counted(batches), losses, strict=True)
        if not math.isfinite(loss)
    ]
    return [Fault.from_json(fault) for part in all_gather_object(local, engine.context) for fault in part]

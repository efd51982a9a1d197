"""The training step and the loop around it.

A step: forward and backward of the micro-batches, one small all-reduce (look_ahead.py), clip and update, monitors.
Everything in a StepRecord is equal on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import nn

from dtrain.data.batches import StepBatches, step_batches
from dtrain.data.order import StepPlan
from dtrain.data.read_ahead import read_ahead
from dtrain.data.seeding import seed_all
from dtrain.distributed.collectives import agree, all_gather_object
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.traffic import Traffic
from dtrain.engine.parameter_groups import set_learning_rate
from dtrain.engine.protocol import Engine
from dtrain.models.freezing import frozen_statistics
from dtrain.models.host_copy import to_device
from dtrain.models.placement import compute_device
from dtrain.tasks.protocol import Task
from dtrain.training.late_totals import LateTotals, StepValues, to_floats
from dtrain.training.look_ahead import LookAhead, Step, StepTotals, counted
from dtrain.training.monitors.calls import at_once_rule, run_monitors
from dtrain.training.monitors.protocol import Decision, Fault, Monitor, RunState, StepEnd, StepRecord
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
        contiguous=engine.contiguous,
    )
    return steps if settings.workers else read_ahead(steps)  # workers read ahead themselves


def train(run: LoopRun, monitors: Sequence[Monitor]) -> Decision:
    """Collective. Trains from `run.state.step` to the end, or until a monitor stops it; returns why it ended.

    Changes the run's state, and its engine's weights.
    """
    plan, look_ahead, context = run.settings.plan, run.look_ahead, run.engine.context
    context.heartbeat.at(Phase.DATA, step=run.state.step)
    look_ahead.start()
    needs_at_once = at_once_rule(monitors, context) if run.engine.decides_on_device else _always
    decision = Decision.CONTINUE
    prepared_engine: Engine | None = None
    late: TakenStep | None = None  # the step before, if its values are still on the device
    while (step := look_ahead.next_step) is not None and decision == Decision.CONTINUE:
        if step.batches.step % plan.steps_per_epoch == 0:
            run.begin_epoch(plan.epoch_of(step.batches.step))
        if not run.engine.module.training:  # At the start, and after an evaluation.
            run.settings.train_mode(run.engine.module)
        if run.engine is not prepared_engine:  # The engine is new at the start, after a thaw and after a rollback.
            with context.heartbeat.within(Phase.BUILDING):  # it may compile
                warm_up(run.engine, run.task, step.batches)
            prepared_engine = run.engine
        finish = partial(finish_late, run, late, monitors) if late is not None else None
        taken = take_step(run, step, at_once=is_read_at_once(run, step, needs_at_once), finish_previous=finish)
        late = taken if taken.is_late else None
        if late is None:
            decision = decide(run, record_of(run, taken), monitors)
    assert late is None, "a run that ends with a step whose values nobody has read"
    return decision


def is_read_at_once(run: LoopRun, step: Step, needs_at_once: Callable[[StepEnd], bool]) -> bool:
    """Returns whether a step's values are read before the next step begins. Equal on every rank."""
    settings = run.settings
    if not run.engine.decides_on_device or settings.drops is not None or not step.weight.total:
        return True
    end = step_end(settings, step)
    return end.ends_epoch or end.is_last or _measures_gradients(settings, end.step) or needs_at_once(end)


def _always(_end: StepEnd) -> bool:
    return True


def step_end(settings: LoopSettings, step: Step) -> StepEnd:
    """Returns what is known of a step before it is taken."""
    plan, done = settings.plan, step.batches.step + 1
    return StepEnd(done, _epochs_after(plan, done - 1), done % plan.steps_per_epoch == 0, done == settings.total_steps)


def finish_late(run: LoopRun, late: TakenStep, monitors: Sequence[Monitor]) -> None:
    """Collective. Runs the monitors of the step before, while the device works on the current one."""
    engine = run.engine
    engine.context.heartbeat.at(Phase.SUMMING)
    decide(run, record_of(run, late), monitors)
    assert run.engine is engine, "a rollback at a step that no monitor needed at once"


def warm_up(engine: Engine, task: Task, batches: StepBatches) -> None:
    """Collective. Lets a new engine prepare itself on a micro-batch that does not count."""
    tensors = batches.micro_batches[0].tensors
    with frozen_statistics(engine.module):
        device = compute_device(engine.module)
        engine.warm_up(lambda: task.loss(engine.model, to_device(tensors, device)), step=batches.step)


class TakenStep(NamedTuple):
    """A step that was taken.

    Attributes:
        step: the step.
        end: what was known of it before.
        learning_rate: the one that it used.
        read: returns its values; waits for the device where `is_late`.
        is_late: whether the values may be read after the next step's micro-batches.
        averaged: as in StepRecord.
        traffic: what this rank sent.
    """

    step: Step
    end: StepEnd
    learning_rate: float
    read: Callable[[], StepValues]
    is_late: bool
    averaged: bool
    traffic: Traffic


def take_step(
    run: LoopRun, step: Step, *, at_once: bool = True, finish_previous: Callable[[], None] | None = None
) -> TakenStep:
    """Collective. Takes one step; the run's look-ahead then holds the next one.

    Args:
        at_once: whether the step's values are fetched before its update.
        finish_previous: reads the values of the step before, if it was late. Called when this step's micro-batches are
            in the device's queue, and before everything that depends on the number of updates.
    """
    engine, settings, batches = run.engine, run.settings, step.batches
    heartbeat, traffic = engine.context.heartbeat, engine.context.traffic
    before = traffic.copy()
    heartbeat.at(Phase.MICRO_BATCH, step=batches.step)
    losses = run_micro_batches(engine, run.task, batches, scale=engine.loss_scale(step.weight), seed=settings.seed)
    if finish_previous is not None:
        paused = traffic.copy()
        finish_previous()
        others = traffic.since(paused)
        before.add(others.payload_bytes, collectives=others.collectives)
    learning_rate = settings.learning_rate(run.state.updates)
    set_learning_rate(engine.param_groups, learning_rate)
    read = _update_at_once(run, step, losses) if at_once else _update_on_device(run, step, losses)
    end = step_end(settings, step)
    return TakenStep(
        step,
        end,
        learning_rate,
        read,
        is_late=not at_once and run.look_ahead.decision == Decision.CONTINUE,
        averaged=engine.synchronize(batches.step + 1, force=end.ends_epoch or end.is_last),
        traffic=traffic.since(before),
    )


def record_of(run: LoopRun, taken: TakenStep) -> StepRecord:
    """Collective. Reads the values of a step, and counts it in the run's state."""
    engine, settings, state, step = run.engine, run.settings, run.state, taken.step
    values, weight, end = taken.read(), step.weight.total, taken.end
    _advance_state(state, step, applied=values.applied)
    faults: Sequence[Fault] = ()
    if values.faults:
        before = engine.context.traffic.copy()
        faults = _gather_faults(engine, step.batches, values.losses)
        sent = engine.context.traffic.since(before)
        taken.traffic.add(sent.payload_bytes, collectives=sent.collectives)
    grad_norm = values.grad_norm if weight else 0.0
    return StepRecord(
        step=state.step,
        epoch=end.epoch,
        loss=values.loss / weight if weight else 0.0,
        grad_norm=grad_norm,
        learning_rate=taken.learning_rate,
        examples=step.batches.examples,
        targets=step.targets,
        applied=values.applied,
        finite=values.faults == 0 and _is_norm_acceptable(grad_norm, settings, engine),
        faults=faults,
        ends_epoch=end.ends_epoch,
        is_last=end.is_last,
        gradient_norms=values.gradient_norms,
        averaged=taken.averaged,
        traffic=taken.traffic if taken.traffic.is_complete else None,
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


def run_micro_batches(
    engine: Engine, task: Task, batches: StepBatches, *, scale: float, seed: int
) -> list[torch.Tensor]:
    """Collective. Runs forward and backward of this rank's part; returns the loss sum of each counted micro-batch, in nats.

    The sums are () tensors on the device: nothing is fetched.

    Args:
        scale: multiplies each loss sum, so that the gradients add up to that of (sum of losses) / (sum of weights) (law 4).
    """
    device = compute_device(engine.module)
    losses: list[torch.Tensor] = []
    engine.begin_step(batches.shares)
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
    return losses


def _measures_gradients(settings: LoopSettings, step: int) -> bool:
    return settings.log_gradients is not None and step % settings.log_gradients == 0


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


def _update_at_once(run: LoopRun, step: Step, losses: Sequence[torch.Tensor]) -> Callable[[], StepValues]:
    """Collective. Fetches the step's values, then takes the optimizer's step or skips it; equal on every rank."""
    engine, settings = run.engine, run.settings
    local = to_floats(losses)
    local_sq_norm = engine.weighted_sq_norm(step.weight)
    totals = run.look_ahead.advance(local, weighted_sq_norm=local_sq_norm, lacks_gradients=engine.lacks_gradients)
    engine.context.heartbeat.at(Phase.UPDATE)
    if totals.lacking:
        engine.settle_missing_gradients(totals.lacking)
    gradient_norms = engine.gradient_norms() if _measures_gradients(settings, step.batches.step + 1) else None
    is_dropped = _is_dropped(settings, totals, step.weight.total)
    with explain_in_step():
        # DeepSpeed does not report the norm of a gradient that it discards.
        measures_norm = is_dropped and local_sq_norm is None
        dropped_norm = _total_norm(gradient_norms or engine.gradient_norms()) if measures_norm else None
        # Without a target there is no gradient: a step would only decay weights and moments.
        discard = totals.faults > 0 or step.weight.total == 0 or is_dropped
        result = engine.step(step.weight, weighted_sq_norm=totals.weighted_sq_norm, discard=discard)
    grad_norm = result.grad_norm if dropped_norm is None else dropped_norm
    values = StepValues(local, totals.loss, totals.faults, grad_norm, result.applied, gradient_norms)
    return lambda: values


def _update_on_device(run: LoopRun, step: Step, losses: Sequence[torch.Tensor]) -> Callable[[], StepValues]:
    """Collective. Lets the device take the optimizer's step or skip it, without waiting for it; equal on every rank."""
    engine = run.engine
    totals = LateTotals(losses, compute_device(engine.module), engine.context)
    # Between the hosts, which know these numbers: the weight of the next step, and requests to stop.
    known = run.look_ahead.advance([], weighted_sq_norm=None, lacks_gradients=engine.lacks_gradients)
    engine.context.heartbeat.at(Phase.UPDATE)
    if known.lacking:
        engine.settle_missing_gradients(known.lacking)
    with explain_in_step():
        grad_norm = engine.step_on_device(totals.has_faults)
    return totals.start_copy(grad_norm)


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

"""Calls the monitors of a run after a step, and asks before it which of them must see it at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dtrain.distributed.collectives import all_gather_object
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.training.monitors.protocol import Decision, LateMonitor, Monitor, StepEnd, StepRecord


def at_once_rule(monitors: Sequence[Monitor], context: RankContext) -> Callable[[StepEnd], bool]:
    """Collective. Returns a function that says whether some monitor must see a step before the next one begins.

    Its answer is the same on all ranks. Ranks with other monitors than the first one make every step be read at once.
    """
    late = [monitor for monitor in monitors if isinstance(monitor, LateMonitor)]
    numbers = all_gather_object((len(monitors), len(late)), context)
    if len(late) < len(monitors) or any(number != numbers[0] for number in numbers):
        return lambda _end: True
    return lambda end: any(monitor.needs_at_once(end) for monitor in late)


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

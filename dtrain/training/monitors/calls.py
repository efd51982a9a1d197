"""Calls the monitors of a run after a step, and asks before it which of them must see it at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dtrain.errors import ConfigError
from dtrain.training.monitors.protocol import Decision, LateMonitor, Monitor, StepEnd, StepRecord


def at_once_rule(monitors: Sequence[Monitor]) -> Callable[[StepEnd], bool]:
    """Returns a function that says whether some monitor must see a step before the next one begins."""
    late = [monitor for monitor in monitors if isinstance(monitor, LateMonitor)]
    if len(late) < len(monitors):
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

"""Decides whether the job hangs: a pure function of the last state that each rank's monitor has reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.distributed.heartbeat import IDLE_RULES, IdleRule, Phase

MAX_MEDIAN_STEPS = 10.0
"""A step may take this many median steps."""

MIN_LOWERED_LIMIT_S = 60.0
"""Quick steps never lower the limit below this."""

GIL_STALL_S = 3.0
"""The interpreter lock (GIL) counts as blocked if the helper thread, which takes it every second, waits this long."""


@dataclass(frozen=True)
class HangSettings:
    """The settings that decide whether the job hangs.

    Attributes:
        hang_timeout_s: train.hang_timeout; None: nothing counts as a hang.
        compiles: the model is compiled, so the first step and the first evaluation have no limit.
    """

    hang_timeout_s: float | None
    compiles: bool = False


@dataclass(frozen=True)
class RankState:
    """A rank, as its monitor saw it last.

    Attributes:
        rank: its number.
        phase: the kind of work that it is doing.
        step: 0-based; -1 before the first.
        idle_s: seconds since the last heartbeat, counted only while the monitor itself was running.
        stopped_s: seconds for which a signal has stopped the process.
        gil_blocked_s: seconds for which the helper thread has not acquired the interpreter lock (GIL).
        in_collective: whether a collective is pending; None if unknown.
        in_collective_s: seconds for which the same collective has been pending.
        median_step_s: median duration of the last steps.
        steps_timed: number of steps timed since the start.
        evaluations: number of evaluations completed since the start.
        unreachable_s: seconds since the monitor was last heard, if it is out of reach; else 0.
    """

    rank: int
    phase: Phase
    step: int = -1
    idle_s: float = 0.0
    stopped_s: float = 0.0
    gil_blocked_s: float = 0.0
    in_collective: bool | None = None
    in_collective_s: float = 0.0
    median_step_s: float = 0.0
    steps_timed: int = 0
    evaluations: int = 0
    unreachable_s: float = 0.0


def idle_limit_s(state: RankState, settings: HangSettings) -> float | None:
    """Returns how long that rank may be idle in its phase, in seconds; None: no limit."""
    rule, limit = IDLE_RULES[state.phase], settings.hang_timeout_s
    if limit is None or rule in (IdleRule.UNLIMITED, IdleRule.WAITING):
        return None
    if state.phase is Phase.EVALUATION and settings.compiles and state.evaluations == 0:
        return None
    if rule is IdleRule.STEP:
        if settings.compiles and state.steps_timed == 0:
            return None
        if state.steps_timed and not settings.compiles:  # any step may compile a new shape
            return min(limit, max(MIN_LOWERED_LIMIT_S, MAX_MEDIAN_STEPS * state.median_step_s))
    return limit


def needs_query(state: RankState, settings: HangSettings) -> bool:
    """Returns whether that rank has been idle for so long that its monitor asks it which collective it waits in."""
    limit, timeout_s = idle_limit_s(state, settings), settings.hang_timeout_s
    if timeout_s is None or state.stopped_s or IDLE_RULES[state.phase] is IdleRule.WAITING:
        return False
    return state.idle_s > (timeout_s / 2 if limit is None else limit / 2)


def is_hang(ranks: Sequence[RankState], settings: HangSettings) -> bool:
    """Returns whether the job hangs and must be ended.

    A rank that is stopped, or idle outside of a collective, hangs whatever the others do. A rank that waits in a
    collective hangs if no other rank may still join it: all others wait as well or are out of reach. A rank at work in
    a phase without a limit may still join.
    """
    if settings.hang_timeout_s is None:
        return False
    limit = settings.hang_timeout_s
    if any(state.stopped_s > limit for state in ranks):
        return True
    overdue = [state for state in ranks if is_overdue(state, settings)]
    if any(state.in_collective is False or state.gil_blocked_s > max(GIL_STALL_S, limit / 4) for state in overdue):
        return True
    if overdue and not any(_may_be_at_work(state, settings) for state in ranks):
        return True
    awaited = [state for state in ranks if _may_be_awaited(state, settings)]
    return bool(awaited) and all(_is_stuck(state, settings) for state in awaited)


def is_overdue(state: RankState, settings: HangSettings) -> bool:
    """Returns whether that rank has been idle for longer than its phase allows."""
    limit = idle_limit_s(state, settings)
    return limit is not None and state.idle_s > limit and state.unreachable_s <= limit


def is_unreachable(state: RankState, settings: HangSettings) -> bool:
    """Returns whether that rank has been out of reach for longer than it was allowed to be idle in its last known phase."""
    limit = idle_limit_s(state, settings) or settings.hang_timeout_s
    return limit is not None and state.unreachable_s > limit


def _may_be_awaited(state: RankState, settings: HangSettings) -> bool:
    """Returns whether other ranks may wait for that rank.

    A rank that has only just started to wait for another's work was at work itself until then. A rank that waited for
    it in a collective continues, and may not have reported that yet.
    """
    assert settings.hang_timeout_s is not None
    if is_unreachable(state, settings):
        return False
    return IDLE_RULES[state.phase] is not IdleRule.WAITING or state.idle_s <= settings.hang_timeout_s / 3


def _is_stuck(state: RankState, settings: HangSettings) -> bool:
    """Returns whether that rank has waited in a collective for too long, also in a phase without a limit.

    In such a phase it must be the same collective: many of them may take long, for example to gather a large model.
    """
    assert settings.hang_timeout_s is not None
    if state.in_collective is not True:
        return False
    if idle_limit_s(state, settings) is not None:
        return is_overdue(state, settings)
    return state.idle_s > settings.hang_timeout_s and state.in_collective_s > settings.hang_timeout_s / 3


def _may_be_at_work(state: RankState, settings: HangSettings) -> bool:
    """Returns whether that rank may be at work, so that others rightly wait for it. Judges by what it last reported."""
    assert settings.hang_timeout_s is not None
    if is_unreachable(state, settings) or state.stopped_s > settings.hang_timeout_s:
        return False
    if IDLE_RULES[state.phase] is IdleRule.WAITING:
        return False
    return not is_overdue(state, settings)

"""Whether the job hangs: a pure function of what the monitors of all ranks have last seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.distributed.heartbeat import RULES, Phase, Rule

MEDIANS = 10.0
"""A step may take so many median ones."""

AT_LEAST_S = 60.0
"""But no limit is lowered below this by quick steps."""

DEAF_S = 3.0
"""How long no thread of a rank gets the interpreter lock until it counts as held; threads ask for it every second."""


@dataclass(frozen=True)
class Rules:
    """hang_timeout_s: train.hang_timeout; None: silence is not judged.

    compiles: the first step and the first evaluation may take for ever.
    """

    hang_timeout_s: float | None
    compiles: bool = False


@dataclass(frozen=True)
class Seen:
    """A rank as its monitor saw it last.

    silent_s: since the last heartbeat, as far as the monitor itself was awake. stopped_s: how long the process has been
    stopped by a signal. deaf_s: how long no thread has had the interpreter lock. waits: whether a collective is under
    way; None where that cannot be told. waited_s: how long it has been seen in the same one. unheard_s: how long the
    monitor has said nothing.
    """

    rank: int
    phase: Phase
    step: int = -1
    silent_s: float = 0.0
    stopped_s: float = 0.0
    deaf_s: float = 0.0
    waits: bool | None = None
    waited_s: float = 0.0
    median_s: float = 0.0
    steps_timed: int = 0
    evaluations: int = 0
    unheard_s: float = 0.0


def limit_of(seen: Seen, rules: Rules) -> float | None:
    """How long that rank may be silent where it is, in seconds; None: as long as it takes."""
    rule, limit = RULES[seen.phase], rules.hang_timeout_s
    if limit is None or rule in (Rule.SLOW, Rule.WAIT):
        return None
    if seen.phase is Phase.EVALUATION and rules.compiles and seen.evaluations == 0:
        return None
    if rule is Rule.STEP:
        if rules.compiles and seen.steps_timed == 0:
            return None
        if seen.steps_timed and not rules.compiles:  # a new shape is compiled at any step
            return min(limit, max(AT_LEAST_S, MEDIANS * seen.median_s))
    return limit


def is_asked(seen: Seen, rules: Rules) -> bool:
    """Whether that rank has been silent for so long that its monitor asks it what it waits in."""
    limit, most = limit_of(seen, rules), rules.hang_timeout_s
    if most is None or seen.stopped_s or RULES[seen.phase] is Rule.WAIT:
        return False
    return seen.silent_s > (most / 2 if limit is None else limit / 2)


def hanging(ranks: Sequence[Seen], rules: Rules) -> bool:
    """Whether somebody must end this job.

    A rank that is stopped, or silent outside of a collective, hangs whatever the others do. One that waits in a
    collective hangs when there is nobody left who may still be on the way to it: nobody who works, in a phase that
    takes as long as it takes, too, but only who waits as well, or is out of reach.
    """
    if rules.hang_timeout_s is None:
        return False
    limit = rules.hang_timeout_s
    if any(seen.stopped_s > limit for seen in ranks):
        return True
    late = [seen for seen in ranks if is_late(seen, rules)]
    if any(seen.waits is False or seen.deaf_s > max(DEAF_S, limit / 4) for seen in late):
        return True
    if late and not any(_may_come(seen, rules) for seen in ranks):
        return True
    on_the_way = [seen for seen in ranks if _is_on_the_way(seen, rules)]
    return bool(on_the_way) and all(_is_stuck(seen, rules) for seen in on_the_way)


def is_late(seen: Seen, rules: Rules) -> bool:
    """Whether that rank is silent for longer than it may be where it is."""
    limit = limit_of(seen, rules)
    return limit is not None and seen.silent_s > limit and seen.unheard_s <= limit


def is_gone(seen: Seen, rules: Rules) -> bool:
    """Whether nothing has been heard of that rank for longer than it might be silent where it was last."""
    limit = limit_of(seen, rules) or rules.hang_timeout_s
    return limit is not None and seen.unheard_s > limit


def _is_on_the_way(seen: Seen, rules: Rules) -> bool:
    """Whether others may wait for that rank.

    One that began to wait for another's work only now was at work itself until then; who waited in a collective for that
    goes on, and may not have said so yet.
    """
    assert rules.hang_timeout_s is not None
    if is_gone(seen, rules):
        return False
    return RULES[seen.phase] is not Rule.WAIT or seen.silent_s <= rules.hang_timeout_s / 3


def _is_stuck(seen: Seen, rules: Rules) -> bool:
    """Whether that rank waits in a collective for too long, in a phase without a limit as well.

    There it must be the same one: many together may take long, as when a large model is gathered.
    """
    assert rules.hang_timeout_s is not None
    if seen.waits is not True:
        return False
    if limit_of(seen, rules) is not None:
        return is_late(seen, rules)
    return seen.silent_s > rules.hang_timeout_s and seen.waited_s > rules.hang_timeout_s / 3


def _may_come(seen: Seen, rules: Rules) -> bool:
    """Whether that rank is at work, for all that is known, so that others wait for it with reason."""
    assert rules.hang_timeout_s is not None
    if is_gone(seen, rules) or seen.stopped_s > rules.hang_timeout_s:
        return False
    if RULES[seen.phase] is Rule.WAIT:
        return False
    return not is_late(seen, rules)

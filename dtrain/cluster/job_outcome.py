"""How a job of several parts ended: one exit code and one message, out of what each part saw of it."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dtrain.errors import Interrupted, TopologyError

SECOND_HAND = TopologyError.__name__
"""What a rank says that has lost another: true, but who was closer knows more."""

INTERRUPTED = Interrupted.__name__
"""What a rank says that was told to end."""


@dataclass(frozen=True)
class PartEnd:
    """How one host's part ended.

    code: the launcher's exit code; negative where a signal ended it.
    note: exit.json, if dtrain wrote it in this job.
    problem: why the command could not be started.
    lost: what became of the connection, where the end itself is not known.
    was_killed: it was ended since another part had failed.
    """

    host: str
    code: int
    note: Mapping[str, Any] | None = None
    problem: str = ""
    lost: str = ""
    was_killed: bool = False

    @property
    def own_code(self) -> int:
        """dtrain's code where it is known; a launcher makes another one of it, even a 0."""
        return int(self.note["code"]) if self.note and self.note["code"] else self.code

    @property
    def is_known(self) -> bool:
        """Whether it is its command that has ended, rather than the way to it."""
        return not (self.problem or self.lost)


class Outcome(NamedTuple):
    """How a job ended.

    code: of the job; 0 only where every part has ended well.
    message: why not; it names the host.
    asked: the signal that told this process to end the job, if any did.
    """

    code: int
    message: str
    asked: int | None = None


def outcome(ends: Sequence[PartEnd], launcher: str, *, is_elastic: bool = False, asked: int | None = None) -> Outcome:
    """The job's end.

    Args:
        ends: of all parts, in the order in which they came.
        launcher: the name of what was started on each host.
        is_elastic: parts that failed on the way count for nothing where another has done the work to its end.
        asked: the signal that was passed on to the parts, if any was.
    """
    bad = [end for end in ends if end.own_code != 0 or not end.is_known]
    if not bad or (is_elastic and len(bad) < len(ends)):
        return Outcome(0, "", asked)
    first = min(bad, key=lambda end: _distance(end, asked))
    return Outcome(_code_of(first, asked), _message_of(first, launcher, asked), asked)


def _distance(end: PartEnd, asked: int | None) -> int:
    """How far from the cause this part was; the least speaks for the job."""
    if end.was_killed:
        return 1 if end.note is not None and end.note["cause"] not in (SECOND_HAND, INTERRUPTED) else 5
    if end.problem or _was_struck(end, asked):
        return 0  # its ranks only know that they were told to end
    if end.note is not None and end.note["cause"] != SECOND_HAND:
        return 1
    if end.lost:
        return 2
    return 3 if end.note is not None else 4


def _was_struck(end: PartEnd, asked: int | None) -> bool:
    """Whether a signal ended the launcher, without its ranks having been told to end and having said why."""
    was_told = end.was_killed or end.code == -(asked or 0)
    return end.code < 0 and not (was_told and end.note is not None)


def _code_of(end: PartEnd, asked: int | None) -> int:
    if not end.is_known:
        return TopologyError.exit_code
    if _was_struck(end, asked):
        return 128 - end.code if end.code == -(asked or 0) else TopologyError.exit_code
    return end.own_code


def _message_of(end: PartEnd, launcher: str, asked: int | None) -> str:
    if not end.is_known:
        return end.lost or f"{end.host}: {launcher} cannot be started: {end.problem}"
    if _was_struck(end, asked):
        name = signal.Signals(-end.code).name
        if end.code == -(asked or 0):
            return f"{end.host}: {launcher} was ended by {name}, as you asked, before its ranks could save anything."
        return f"{end.host}: {launcher} was killed by {name}: from outside, or for want of memory?"
    if end.note is None:
        return f"{end.host}: {launcher} ended with {end.code}; above it said why."
    # The rank itself has printed all of a message of several lines.
    message = (str(end.note["message"]).splitlines() or [str(end.note["cause"])])[0]
    return message if str(end.note["host"]) in message else f"rank {end.note['rank']} on {end.note['host']}: {message}"

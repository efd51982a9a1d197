"""Combines how the hosts' commands ended into one exit code and one message for the job."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dtrain.errors import Interrupted, Preempted, TopologyError

LOST_PEER = TopologyError.__name__
"""The cause that a rank records when it has lost another rank. It is true, but the lost rank's host knows more."""

INTERRUPTED = Interrupted.__name__
"""The cause that a rank records when it was told to stop."""


@dataclass(frozen=True)
class HostResult:
    """The end of one host's command.

    Attributes:
        host: the host's name.
        code: the launcher's exit code; negative if a signal ended it.
        record: the content of exit.json if dtrain wrote it during this job.
        problem: why the command could not be started; empty if it was.
        lost: how the connection was lost, if the end of the command is therefore unknown; else empty.
        was_killed: it was ended because another host's command had failed.
    """

    host: str
    code: int
    record: Mapping[str, Any] | None = None
    problem: str = ""
    lost: str = ""
    was_killed: bool = False

    @property
    def dtrain_code(self) -> int:
        """dtrain's exit code if it is known, since a launcher replaces it, sometimes with 0; else the launcher's."""
        return int(self.record["code"]) if self.record and self.record["code"] else self.code

    @property
    def is_known(self) -> bool:
        """Whether the command itself ended, rather than failed to start or lost its connection."""
        return not (self.problem or self.lost)


def silent_result(host: str) -> HostResult:
    """Returns the result of a host that is not waited for."""
    lost = f"{host}: it no longer answers, so its processes may still be running; its ranks end by themselves."
    return HostResult(host, 1, lost=lost, was_killed=True)


class JobOutcome(NamedTuple):
    """The end of a job.

    Attributes:
        code: the job's exit code; 0 only if every host's command succeeded.
        message: why the job failed, with the host's name; empty on success.
        stop_signal: the signal by which this process was told to stop the job; None if there was none.
    """

    code: int
    message: str
    stop_signal: int | None = None


def combine_results(
    results: Sequence[HostResult], launcher: str, *, is_elastic: bool = False, stop_signal: int | None = None
) -> JobOutcome:
    """Returns the job's outcome.

    Args:
        results: results of all hosts, in the order in which they arrived.
        launcher: the name of the program that was started on each host.
        is_elastic: failed hosts do not count if another host finished the job.
        stop_signal: the signal that was forwarded to the hosts, if any.
    """
    failed = [result for result in results if result.dtrain_code != 0 or not result.is_known]
    if not failed or (is_elastic and len(failed) < len(results)):
        return JobOutcome(0, "", stop_signal)
    cause = min(failed, key=lambda result: _distance_to_cause(result, stop_signal))
    return JobOutcome(_job_code(cause, stop_signal), _job_message(cause, launcher, stop_signal), stop_signal)


def _distance_to_cause(result: HostResult, stop_signal: int | None) -> int:
    """Returns how far this host was from the root cause; the smallest distance determines the job's outcome."""
    if result.was_killed:
        return 1 if result.record is not None and result.record["cause"] not in (LOST_PEER, INTERRUPTED) else 5
    if result.problem or _was_launcher_killed(result, stop_signal):
        return 0  # its ranks only know that they were told to stop
    if result.record is not None and result.record["cause"] != LOST_PEER:
        return 1
    if result.lost:
        return 2
    return 3 if result.record is not None else 4


def _was_launcher_killed(result: HostResult, stop_signal: int | None) -> bool:
    """Returns whether a signal ended the launcher, and its ranks did not record a requested stop or a saved run."""
    was_stopped = result.was_killed or result.code == -(stop_signal or 0) or result.dtrain_code == Preempted.exit_code
    return result.code < 0 and not (was_stopped and result.record is not None)


def _job_code(result: HostResult, stop_signal: int | None) -> int:
    if not result.is_known:
        return TopologyError.exit_code
    if _was_launcher_killed(result, stop_signal):
        return 128 - result.code if result.code == -(stop_signal or 0) else TopologyError.exit_code
    return result.dtrain_code


def _job_message(result: HostResult, launcher: str, stop_signal: int | None) -> str:
    if not result.is_known:
        return result.lost or f"{result.host}: cannot start {launcher}: {result.problem}"
    if _was_launcher_killed(result, stop_signal):
        name = signal.Signals(-result.code).name
        if result.code == -(stop_signal or 0):
            return (
                f"{result.host}: {launcher} was stopped by {name} as requested, before its ranks could save anything."
            )
        return f"{result.host}: {launcher} was killed by {name}: by another process, or out of memory?"
    record = result.record
    if record is None:
        return f"{result.host}: {launcher} exited with code {result.code}; its output above gives the reason."
    # The rank has already printed all lines of a longer message.
    message = (str(record["message"]).splitlines() or [str(record["cause"])])[0]
    return message if str(record["host"]) in message else f"rank {record['rank']} on {record['host']}: {message}"

"""When a run stops before its end with a checkpoint, and how the ranks leave an evaluation or an export together."""

from __future__ import annotations

import time
from collections.abc import Callable

from dtrain.distributed.collectives import agree
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import StopRequest


class RunStopped(Exception):
    """Raised on every rank: a signal has broken off an evaluation or an export, which a later start repeats."""


class StopCondition:
    """Whether this rank wants the run to stop: after a signal, or when `train.max_minutes` has passed."""

    def __init__(self, request: StopRequest, max_minutes: float | None = None, *, began: float = 0.0) -> None:
        """
        Args:
            began: time.monotonic() when this start began.
        """
        self._request = request
        self._end = None if max_minutes is None else began + 60 * max_minutes

    @property
    def why(self) -> str | None:
        """Why the run is to stop; None if it is not."""
        if self._request.why is not None:
            return self._request.why
        is_over = self._end is not None and time.monotonic() > self._end
        return "train.max_minutes has passed" if is_over else None

    def is_wanted(self) -> bool:
        """Returns whether the run is to stop after this step."""
        return self.why is not None

    def is_signaled(self) -> bool:
        """Returns whether this rank has got a signal.

        The end of train.max_minutes does not count: the next start would break the same evaluation off again.
        """
        return self._request.number is not None

    def attempt(self, work: Callable[[], object]) -> bool:
        """Runs work without collectives, which a signal breaks off; returns whether it ended.

        Call `leave_together` afterwards.
        """
        return self._request.attempt(work)

    def leave_together(self, context: RankContext) -> None:
        """Collective.

        Raises:
            RunStopped: on every rank, if one of them has got a signal.
        """
        if agree(self.is_signaled(), context):
            raise RunStopped


NO_STOP = StopCondition(StopRequest())
"""For evaluations outside of a run: a signal raises an exception there."""

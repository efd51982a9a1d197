"""Whom a rank blames that a launcher tells to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from dtrain.commands.farewell import Job, _is_told_for_another
from dtrain.errors import DtrainError, Interrupted
from dtrain.topology import SINGLE
from dtrain.watching.start import News


@dataclass
class Heard:
    """A watch that has heard of something, or of nothing."""

    heard: News | None

    def news(self, _within_s: float) -> News | None:
        return self.heard


DIED = News(1, "node1", "Rank 1 died.", 4, by_signal=False)


@pytest.mark.parametrize(
    ("error", "heard", "follows"),
    [
        (Interrupted("Stopped by SIGTERM."), DIED, True),
        (Interrupted("Stopped by SIGTERM."), DIED._replace(by_signal=True), False),
        (Interrupted("Stopped by SIGTERM."), None, False),
        (DtrainError("its own"), DIED, False),
    ],
)
def test_a_rank_told_to_end_after_another_has_died_ends_because_of_that(
    error: BaseException, heard: News | None, follows: bool
) -> None:
    watch: Any = Heard(heard)

    assert _is_told_for_another(error, Job(SINGLE, None, [], watch)) is follows

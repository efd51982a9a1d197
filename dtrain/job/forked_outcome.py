"""How one start of forked ranks has ended: the job's exit code, and the launcher's last line. Needs no torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.cluster.remote_supervisor import stamp
from dtrain.config import bounded_json
from dtrain.errors import TopologyError

UNKNOWN_ERROR = 1
"""Exit code of an error that has no message for users: its rank prints a traceback."""


@dataclass
class RankStart:
    """One start of all ranks.

    Attributes:
        running: rank of each process that has not ended, by process id.
        codes: exit code of each rank that has ended, negative for a signal, in the order of their ends.
        pids: process id of each rank.
    """

    running: dict[int, int] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)

    def failures(self, allowed: Sequence[int] = (0,)) -> list[int]:
        """Returns the ranks that have failed, the first failure first."""
        return [rank for rank, code in self.codes.items() if code not in allowed]

    def send(self, number: int) -> None:
        """Sends a signal to all ranks that are running."""
        for pid in self.running:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def job_code(start: RankStart, record: dict[str, Any] | None) -> int:
    """Returns dtrain's exit code of the first rank that failed; a killed rank has none, but those that follow it do."""
    failures = start.failures()
    codes = [start.codes[rank] for rank in failures if start.codes[rank] > 0]
    if not failures:
        return 0
    if record is not None and record["code"]:
        return int(record["code"])
    return codes[0] if codes else TopologyError.exit_code


def describe_first_failure(start: RankStart) -> str:
    """Returns how the rank that failed first has ended."""
    rank = start.failures()[0]
    code = start.codes[rank]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"Rank {rank} (process {start.pids[rank]}) {how}."


def final_message(start: RankStart, record: dict[str, Any] | None) -> str | None:
    """Returns the job's last line; None if the ranks have printed it.

    Rank 0 prints its own error, and one that all ranks have. Only below a traceback of another rank the cause is missing.
    """
    failures = start.failures()
    if not failures:
        return None
    if record is None or not record["code"]:
        is_silent = all(start.codes[rank] < 0 for rank in failures)
        return f"{describe_first_failure(start)} Was the memory full?" if is_silent else None
    if record["rank"] == 0 or record["code"] != UNKNOWN_ERROR:
        return None
    message = (str(record["message"]).splitlines() or [str(record["cause"])])[0]
    return f"rank {record['rank']} on {record['host']}: {message}"


def read_exit(file: Path | None, old_stamp: tuple[int, int] | None) -> dict[str, Any] | None:
    """Returns exit.json if this start has written it."""
    if file is None or stamp(file) in (None, old_stamp):
        return None
    try:
        record: dict[str, Any] = bounded_json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if {"code", "cause", "rank", "host", "message"} <= set(record) else None

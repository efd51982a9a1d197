"""Turns the evidence about a hang into one message: which ranks wait in which collective, which do not, and where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtrain.distributed.heartbeat import PHASE_DESCRIPTIONS, Phase
from dtrain.job.watchdog.rules import (
    GIL_STALL_S,
    HangSettings,
    RankState,
    idle_limit_s,
    is_overdue,
    is_unreachable,
)
from dtrain.job.watchdog.stacks import STATE_NAMES, Frame

HangKind = Literal["absent", "mismatch", "together"]
"""absent: the suspects do not join the collective that others wait in. mismatch: all ranks wait, but in different
collectives; one suspect for each. together: all wait in the same one, and no rank is the cause."""

MAX_LISTED = 8
"""How many ranks a line names."""

COLLECTIVE_CODE = ("/torch/distributed/", "/deepspeed/comm/", "/dtrain/distributed/collectives.py")
"""A rank whose stack ends there waits in a collective, even if torch's recorder does not show it."""

LIBRARY_CODE = ("/site-packages/", "/lib/python3", "/dtrain/distributed/collectives.py")
OWN_CODE = f"{Path(__file__).parents[2]}/"
IDLE_WORKER_CODE = ("/multiprocessing/", "/torch/utils/data/_utils/", "/selectors.py", "/threading.py")
"""The place of a data worker that waits for work."""


@dataclass(frozen=True)
class CollectiveCall:
    """A collective that a rank has started. The fields are those of flight_recorder.last_collectives."""

    group: str
    number: int
    name: str
    sizes: str
    pending: bool

    def __str__(self) -> str:
        group = "" if self.group in ("default_pg", "") else f" of {self.group}"
        return f"collective {self.number}{group}, {self.name} {self.sizes}"


@dataclass(frozen=True)
class RankEvidence:
    """The evidence about one rank of a job that hangs.

    Attributes:
        state: its last state, as its monitor saw it.
        host: its host name.
        pid: its process id.
        process_state: letter in /proc.
        stack: stack of its main thread, innermost first; empty if it is unknown.
        workers: stacks of its data workers.
        collectives: the last one of each group; empty if unknown.
        is_reachable: whether its monitor is in reach.
        text: all that faulthandler wrote.
    """

    state: RankState
    host: str
    pid: int
    process_state: str = "S"
    stack: Sequence[Frame] = ()
    workers: Sequence[Sequence[Frame]] = ()
    collectives: Sequence[CollectiveCall] = ()
    is_reachable: bool = True
    text: str = ""

    @property
    def rank(self) -> int:
        return self.state.rank

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def is_stopped(self) -> bool:
        return self.state.stopped_s > 0

    @property
    def is_gil_blocked(self) -> bool:
        return self.is_reachable and not self.is_stopped and self.state.gil_blocked_s > GIL_STALL_S

    @property
    def pending(self) -> CollectiveCall | None:
        """The collective that it waits in."""
        return next((each for each in self.collectives if each.pending), None)

    @property
    def is_in_collective(self) -> bool:
        if self.collectives:
            return self.pending is not None
        if not self.stack:  # its monitor was too slow to send more
            return self.state.in_collective is True
        return any(code in frame.file for frame in self.stack[:MAX_LISTED] for code in COLLECTIVE_CODE)


def evidence_from_json(value: Mapping[str, Any], state: RankState) -> RankEvidence:
    """Converts what a rank's monitor has sent."""
    return RankEvidence(
        state,
        value["host"],
        value["pid"],
        value["state"],
        [Frame(*frame) for frame in value["stack"]],
        [[Frame(*frame) for frame in stack] for stack in value.get("workers", ())],
        [CollectiveCall(**each) for each in value["collectives"]],
        text=value["text"],
    )


def find_suspects(ranks: Sequence[RankEvidence], settings: HangSettings) -> tuple[HangKind, list[RankEvidence]]:
    """Returns the kind of hang, and the ranks that keep the others waiting; see HangKind."""
    overdue = [each for each in ranks if is_overdue(each.state, settings)]
    for suspects in (
        [each for each in ranks if is_unreachable(each.state, settings)],
        [each for each in ranks if each.is_stopped],
        _not_waiting(overdue) or _not_waiting(ranks),  # a rank that has only just started to work is no suspect
        [each for each in ranks if not each.is_reachable],
    ):
        if suspects:
            return "absent", suspects
    by_collective: dict[str, RankEvidence] = {}
    # Without the recorder, the stack shows that a rank waits, but not in which collective.
    for each in [each for each in ranks if each.pending is not None] or ranks:
        by_collective.setdefault(str(each.pending), each)
    return "mismatch" if len(by_collective) > 1 else "together", list(by_collective.values())


def _not_waiting(ranks: Sequence[RankEvidence]) -> list[RankEvidence]:
    """Returns the ranks that hold the interpreter lock, or else those that are not in a collective."""
    at_work = [each for each in ranks if each.is_reachable and each.state.phase != Phase.WAITING_FOR_NODE]
    return [each for each in at_work if each.is_gil_blocked] or [each for each in at_work if not each.is_in_collective]


def hang_message(
    ranks: Sequence[RankEvidence], settings: HangSettings, *, stacks_file: str | None
) -> tuple[str, list[int]]:
    """Returns the message about a hang, and the suspects.

    Args:
        stacks_file: the file with the stacks of all ranks; None if there is none.
    """
    kind, suspects = find_suspects(ranks, settings)
    step = max(each.state.step for each in ranks)
    idle_s = max(max(each.state.idle_s, each.state.stopped_s) for each in ranks)
    lines = [_headline(kind, suspects, len(ranks))]
    limit = min((idle_limit_s(each.state, settings) or settings.hang_timeout_s or 0.0) for each in ranks)
    reason = f"train.hang_timeout={settings.hang_timeout_s:g}"
    reason += f", here {limit:g} s: 10 median steps" if limit < (settings.hang_timeout_s or 0.0) else ""
    lines.append(f"  no progress for {idle_s:.0f} s{f' in step {step + 1}' if step >= 0 else ''} ({reason})")
    lines += [f"  {line}" for line in _group_lines(ranks)]
    if stacks_file is not None:
        lines.append(f"  the stacks of all ranks: {stacks_file}")
    return "\n".join(lines), [each.rank for each in suspects]


def _headline(kind: HangKind, suspects: Sequence[RankEvidence], world_size: int) -> str:
    if kind == "together":
        others = "alone" if world_size == 1 else f"with all {world_size} ranks"
        collective = suspects[0].pending or "a collective"
        return f"The job hangs: {suspects[0].name} waits in {collective} {others}. Does the network between them work?"
    if kind == "mismatch":
        waits = ", ".join(f"{each.name} in {each.pending} at {_place(each)}" for each in suspects[:MAX_LISTED])
        return f"The job hangs: its ranks wait in different collectives: {waits}. One of them has skipped a collective."
    names = ", ".join(each.name for each in suspects[:MAX_LISTED])
    more = f" and {len(suspects) - MAX_LISTED} more" if len(suspects) > MAX_LISTED else ""
    hangs = f"{names[0].upper()}{names[1:]}{more} hang{'s' if len(suspects) == 1 else ''}"
    return f"{hangs}: {_activity(suspects[0])}."


def _activity(each: RankEvidence) -> str:
    """Describes what a rank is doing, and where."""
    if not each.is_reachable:
        return f"no sign of life for {each.state.unreachable_s:.0f} s; its node or the network to it is down"
    phase = PHASE_DESCRIPTIONS[each.state.phase]
    place = f", at {_place(each)}" if each.stack else ""
    if each.is_stopped:
        return f"it is stopped by a signal (state T) while {phase}{place}"
    if each.is_gil_blocked:
        return f"it holds the interpreter lock (GIL) while {phase}{place}"
    if each.pending is not None:
        return f"waits in {each.pending}{place}"
    if each.is_in_collective:
        return f"waits in a collective{place}"
    return f"{phase}{place}"


def _group_lines(ranks: Sequence[RankEvidence]) -> Iterable[str]:
    """Yields one line for all ranks that are in the same place, so that hundreds of ranks make a few lines."""
    groups: dict[str, list[RankEvidence]] = {}
    for each in ranks:
        state = (
            f" [{each.process_state}: {STATE_NAMES.get(each.process_state, 'unknown')}]" if each.is_reachable else ""
        )
        groups.setdefault(f"{_activity(each)}{state}", []).append(each)
    for activity, members in groups.items():
        names = ", ".join(str(each.rank) for each in members[:MAX_LISTED])
        more = f" and {len(members) - MAX_LISTED} more" if len(members) > MAX_LISTED else ""
        hosts = list(dict.fromkeys(each.host for each in members))
        on = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
        yield f"rank{'s' if len(members) > 1 else ''} {names}{more} on {on}: {activity}"


def _place(each: RankEvidence) -> str:
    """Returns where a rank is: the line of a data worker, or the line that called the library that waits."""
    for stack in each.workers if any("/torch/utils/data/" in frame.file for frame in each.stack) else ():
        if stack and not any(code in stack[0].file for code in IDLE_WORKER_CODE):
            return f"{stack[0]} (in a data worker)"
    caller = next((frame for frame in each.stack if not _is_library(frame)), None)
    return str(caller) if each.is_in_collective and caller is not None else format_place(each.stack)


def format_place(stack: Sequence[Frame]) -> str:
    """Returns the innermost line, and the innermost one outside of libraries that called it."""
    if not stack:
        return "an unknown place"
    caller = next((frame for frame in stack if not _is_library(frame)), stack[0])
    return str(caller) if caller == stack[0] else f"{stack[0]}, from {caller}"


def _is_library(frame: Frame) -> bool:
    if frame.file.startswith(OWN_CODE) and not frame.file.endswith("/dtrain/distributed/collectives.py"):
        return False  # an installed dtrain is among the libraries
    return any(code in frame.file for code in LIBRARY_CODE)

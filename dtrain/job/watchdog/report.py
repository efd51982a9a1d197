"""What a hang looks like, in words: who waits in which collective, who is elsewhere, and where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtrain.distributed.heartbeat import WORDS, Phase
from dtrain.job.watchdog.rules import DEAF_S, Rules, Seen, is_gone, is_late, limit_of
from dtrain.job.watchdog.stacks import STATES, Frame

Kind = Literal["alone", "differ", "together"]

LISTED = 8
"""How many ranks a line names."""

COLLECTIVE_CODE = ("/torch/distributed/", "/deepspeed/comm/", "/dtrain/distributed/collectives.py")
"""A stack that ends there is one that waits, whatever torch's recorder knows."""

LIBRARY_CODE = ("/site-packages/", "/lib/python3", "/dtrain/distributed/collectives.py")
OWN_CODE = f"{Path(__file__).parents[2]}/"
WORKER_CODE = ("/multiprocessing/", "/torch/utils/data/_utils/", "/selectors.py", "/threading.py")
"""Where a data worker is that has nothing to do."""


@dataclass(frozen=True)
class Collective:
    """One that a rank has begun; see flight.last_collectives."""

    group: str
    number: int
    name: str
    sizes: str
    pending: bool

    def __str__(self) -> str:
        group = "" if self.group in ("default_pg", "") else f" of {self.group}"
        return f"collective {self.number}{group}, {self.name} {self.sizes}"


@dataclass(frozen=True)
class Evidence:
    """What is known of one rank.

    state: letter of /proc. stack: of its main thread, innermost first; empty where it could not be asked. workers: the
    same of its data workers. collectives: the last of each group; empty where nobody could tell. heard: whether its
    monitor is in reach. text: all that faulthandler wrote.
    """

    seen: Seen
    host: str
    pid: int
    state: str = "S"
    stack: Sequence[Frame] = ()
    workers: Sequence[Sequence[Frame]] = ()
    collectives: Sequence[Collective] = ()
    heard: bool = True
    text: str = ""

    @property
    def rank(self) -> int:
        return self.seen.rank

    @property
    def who(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def is_stopped(self) -> bool:
        return self.seen.stopped_s > 0

    @property
    def is_deaf(self) -> bool:
        return self.heard and not self.is_stopped and self.seen.deaf_s > DEAF_S

    @property
    def pending(self) -> Collective | None:
        """The collective in which it waits."""
        return next((each for each in self.collectives if each.pending), None)

    @property
    def waits(self) -> bool:
        if self.collectives:
            return self.pending is not None
        if not self.stack:  # its monitor was too slow to say more
            return self.seen.waits is True
        return any(code in frame.file for frame in self.stack[:LISTED] for code in COLLECTIVE_CODE)


def from_json(value: Mapping[str, Any], seen: Seen) -> Evidence:
    """What a rank's monitor sent."""
    return Evidence(
        seen,
        value["host"],
        value["pid"],
        value["state"],
        [Frame(*frame) for frame in value["stack"]],
        [[Frame(*frame) for frame in stack] for stack in value.get("workers", ())],
        [Collective(**each) for each in value["collectives"]],
        text=value["text"],
    )


def blame(ranks: Sequence[Evidence], rules: Rules) -> tuple[Kind, list[Evidence]]:
    """Who keeps the others waiting.

    Returns:
        alone: these do not come. differ: all wait, but not in the same collective; one of each kind. together: all wait
        in the same one, and none is to blame.
    """
    late = [each for each in ranks if is_late(each.seen, rules)]
    for guilty in (
        [each for each in ranks if is_gone(each.seen, rules)],
        [each for each in ranks if each.is_stopped],
        _own_fault(late) or _own_fault(ranks),  # who has only begun to work is not to blame
        [each for each in ranks if not each.heard],
    ):
        if guilty:
            return "alone", guilty
    kinds: dict[str, Evidence] = {}
    # Where the recorder was not to be had, the stack says that a rank waits, but not in what.
    for each in [each for each in ranks if each.pending is not None] or ranks:
        kinds.setdefault(str(each.pending), each)
    return ("differ", list(kinds.values())) if len(kinds) > 1 else ("together", list(kinds.values()))


def _own_fault(ranks: Sequence[Evidence]) -> list[Evidence]:
    """Those that hold the interpreter lock, or else those that are not where the others wait."""
    here = [each for each in ranks if each.heard and each.seen.phase != Phase.WAITING_FOR_NODE]
    return [each for each in here if each.is_deaf] or [each for each in here if not each.waits]


def message(ranks: Sequence[Evidence], rules: Rules, *, stacks: str | None) -> tuple[str, list[int]]:
    """The one message about a hang, and the ranks that are to blame.

    Args:
        stacks: the file that has the stacks of all ranks; None where there is none.
    """
    kind, guilty = blame(ranks, rules)
    step = max(each.seen.step for each in ranks)
    silent = max(max(each.seen.silent_s, each.seen.stopped_s) for each in ranks)
    lines = [_headline(kind, guilty, len(ranks))]
    limit = min((limit_of(each.seen, rules) or rules.hang_timeout_s or 0.0) for each in ranks)
    why = f"train.hang_timeout={rules.hang_timeout_s:g}"
    why += f", here {limit:g} s: 10 median steps" if limit < (rules.hang_timeout_s or 0.0) else ""
    lines.append(f"  no progress for {silent:.0f} s{f' in step {step + 1}' if step >= 0 else ''} ({why})")
    lines += [f"  {line}" for line in _grouped(ranks)]
    if stacks is not None:
        lines.append(f"  the stacks of all ranks: {stacks}")
    return "\n".join(lines), [each.rank for each in guilty]


def _headline(kind: Kind, guilty: Sequence[Evidence], world_size: int) -> str:
    if kind == "together":
        others = "alone" if world_size == 1 else f"with all {world_size} ranks"
        where = guilty[0].pending or "a collective"
        return f"The job hangs: {guilty[0].who} waits in {where} {others}. Does the network pass between them?"
    if kind == "differ":
        waits = ", ".join(f"{each.who} in {each.pending} at {_place(each)}" for each in guilty[:LISTED])
        return (
            f"The job hangs: its ranks wait in different collectives: {waits}. One of them has left a collective out."
        )
    names = ", ".join(each.who for each in guilty[:LISTED])
    more = f" and {len(guilty) - LISTED} more" if len(guilty) > LISTED else ""
    first = guilty[0]
    hangs = f"{names[0].upper()}{names[1:]}{more} hang{'s' if len(guilty) == 1 else ''}"
    return f"{hangs}: {_doing(first)}."


def _doing(each: Evidence) -> str:
    """What keeps a rank, and where."""
    if not each.heard:
        return f"nothing has been heard of it for {each.seen.unheard_s:.0f} s; its node or the network to it is gone"
    where = f", at {_place(each)}" if each.stack else ""
    if each.is_stopped:
        return f"it is stopped by a signal (state T) while {WORDS[each.seen.phase]}{where}"
    if each.is_deaf:
        return f"it holds the interpreter lock while {WORDS[each.seen.phase]}{where}"
    if each.pending is not None:
        return f"waits in {each.pending}{where}"
    if each.waits:
        return f"waits in a collective{where}"
    return f"{WORDS[each.seen.phase]}{where}"


def _grouped(ranks: Sequence[Evidence]) -> Iterable[str]:
    """One line for all ranks that are in the same place, so that hundreds of them make a few lines."""
    groups: dict[str, list[Evidence]] = {}
    for each in ranks:
        state = f" [{each.state}: {STATES.get(each.state, 'unknown')}]" if each.heard else ""
        groups.setdefault(f"{_doing(each)}{state}", []).append(each)
    for doing, members in groups.items():
        names = ", ".join(str(each.rank) for each in members[:LISTED])
        more = f" and {len(members) - LISTED} more" if len(members) > LISTED else ""
        hosts = list(dict.fromkeys(each.host for each in members))
        on = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
        yield f"rank{'s' if len(members) > 1 else ''} {names}{more} on {on}: {doing}"


def _place(each: Evidence) -> str:
    """Where a rank is: the line that called the library in which it waits, or that a data worker is at."""
    for stack in each.workers if any("/torch/utils/data/" in frame.file for frame in each.stack) else ():
        if stack and not any(code in stack[0].file for code in WORKER_CODE):
            return f"{stack[0]} (in a data worker)"
    own = next((frame for frame in each.stack if not _is_library(frame)), None)
    return str(own) if each.waits and own is not None else place_of(each.stack)


def place_of(stack: Sequence[Frame]) -> str:
    """The innermost line, and the one outside of libraries that led there."""
    if not stack:
        return "an unknown place"
    own = next((frame for frame in stack if not _is_library(frame)), stack[0])
    return str(own) if own == stack[0] else f"{stack[0]}, from {own}"


def _is_library(frame: Frame) -> bool:
    if frame.file.startswith(OWN_CODE) and not frame.file.endswith("/dtrain/distributed/collectives.py"):
        return False  # an installed dtrain lies among the libraries
    return any(code in frame.file for code in LIBRARY_CODE)

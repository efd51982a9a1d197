"""Where the monitors of all ranks meet: it hears of each rank, judges, and tells all what to do.

It lives in the monitor of rank 0, outside of every rank. What crosses is one short line of JSON from each rank every
second or two, over a socket of its own with a word that only this job knows.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dtrain.console import log
from dtrain.distributed.heartbeat import Phase
from dtrain.errors import TopologyError
from dtrain.job.watchdog import report
from dtrain.job.watchdog.report import LISTED, Evidence
from dtrain.job.watchdog.rules import Rules, Seen, hanging

Message = dict[str, Any]

EVIDENCE_S = 5.0
"""How long the monitors may take to say what they see of a hang."""

AFTER_DEATH_S = 2.5
AFTER_ERROR_S = 4.0
"""How long ranks may go on after another one has died, or has said why it ends; they are told to end then."""

QUIET_S = 30.0
QUIET_AT_LEAST_S = 10.0
"""A monitor that says nothing for so long is out of reach; sooner where ranks may not be silent for as long."""

JOINING_S = 30.0
"""A monitor that has not come by then does not come."""

LONGEST_LINE = 2**20


def quiet_of(rules: Rules) -> float:
    """How long a monitor, or the hub, may say nothing until it counts as out of reach, in seconds."""
    return min(QUIET_S, max(QUIET_AT_LEAST_S, rules.hang_timeout_s or QUIET_S))


@dataclass
class Member:
    """A rank, as far as the hub knows it. seen: None before its first report."""

    send: Callable[[Message], None]
    host: str
    pid: int
    seen: Seen | None = None
    owns_folder: bool = False
    heard_s: float = field(default_factory=time.monotonic)
    evidence: Message | None = None
    has_left: bool = False
    is_lost: bool = False

    @property
    def has_testified(self) -> bool:
        """Whether that was all: its data workers come last."""
        return self.evidence is not None and "workers" in self.evidence


class Hub:
    """All ranks, and what becomes of them."""

    def __init__(
        self, ranks: Iterable[int], rules: Rules, speak: Callable[[Message, Sequence[Evidence]], Awaitable[None]]
    ) -> None:
        """
        Args:
            speak: prints and writes down how the job ends; a mapping as exit.json has it, and what was seen of a hang.
        """
        self._awaited = frozenset(ranks)
        self._rules = rules
        self._speak = speak
        self._members: dict[int, Member] = {}
        self._is_over = self._is_said = self._has_ended = False
        self._followed: asyncio.Task[None] | None = None
        self._begin_s, self._has_warned = time.monotonic(), False
        self._quiet_s = quiet_of(rules)

    def join(self, rank: int, member: Member) -> None:
        """A monitor has come."""
        self._members[rank] = member

    def receive(self, rank: int, message: Message) -> None:
        """What the monitor of a rank says."""
        member = self._members[rank]
        member.heard_s = time.monotonic()
        match message:
            case {"seen": values}:
                member.owns_folder = values.pop("owns_folder")
                member.seen = Seen(**{**values, "rank": rank, "phase": Phase(values["phase"])})
            case {"evidence": evidence}:
                member.evidence = evidence
            case {"bye": _}:
                member.has_left = True
                if self._followed is not None:  # the others are still to be ended, also by a rank 0 that has gone
                    self._is_said = True  # it has said why it follows
                elif rank == 0 and not self._is_over:
                    self._is_over = self._has_ended = True
                    self._tell_all({"over": True})
            case {"died": words, "owns_folder": owns_folder}:
                member.has_left, member.owns_folder = True, owns_folder
                self._follow(rank, words, TopologyError.exit_code, AFTER_DEATH_S)
            case {"failed": words, "code": code, "by_signal": by_signal}:
                member.has_left = self._is_said = True
                self._follow(rank, words, code, AFTER_ERROR_S, by_signal=by_signal)

    def lost(self, rank: int) -> None:
        """The line to a monitor is closed. It alone may have been killed: that is no reason to end a healthy job."""
        self._members[rank].is_lost = True

    def stand_down(self) -> None:
        """Another hub judges from here on."""
        self._is_over = self._has_ended = True

    async def judge(self, period_s: float) -> None:
        """Looks at all ranks for as long as the job goes on."""
        while not self._is_over:
            await asyncio.sleep(period_s)
            self._tell_all({"here": True})
            missing = self._missing()
            if missing is not None and hanging([*self._all_seen(), *missing], self._rules):
                await self._end_hang()

    def _missing(self) -> list[Seen] | None:
        """Ranks without a monitor, of which it is said once; None while monitors may still come.

        Such a rank is at work, for all that is known, as one that starts: others wait for it with reason.
        """
        missing = sorted(self._awaited - self._members.keys())
        if missing and time.monotonic() - self._begin_s < JOINING_S:
            return None
        if missing and not self._has_warned:
            self._has_warned = True
            names = f"{', '.join(map(str, missing[:LISTED]))}{' and more' if len(missing) > LISTED else ''}"
            log.warning(
                "Nobody here watches rank%s %s: no monitor has come from there within %.0f s. Ranks that wait for "
                "%s are not taken for hanging.",
                "" if len(missing) == 1 else "s",
                names,
                JOINING_S,
                "it" if len(missing) == 1 else "them",
            )
        return [Seen(rank, Phase.STARTING) for rank in missing]

    def _all_seen(self) -> list[Seen]:
        now = time.monotonic()
        found = []
        for member in self._members.values():
            if member.seen is not None and not member.has_left:
                unheard = now - member.heard_s
                is_away = member.is_lost or unheard > self._quiet_s
                found.append(replace(member.seen, unheard_s=unheard if is_away else 0.0))
        return found

    async def _end_hang(self) -> None:
        self._is_over = True
        seen = {each.rank: each for each in self._all_seen()}
        self._tell_all({"testify": True})
        deadline = time.monotonic() + EVIDENCE_S
        waiting = [self._members[rank] for rank, each in seen.items() if each.unheard_s == 0]
        while not all(member.has_testified for member in waiting) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._has_ended:  # it stood down meanwhile: who waited may go on
            return
        ranks = [self._evidence_of(rank, each) for rank, each in sorted(seen.items())]
        text, guilty = report.message(ranks, self._rules, stacks=None)
        first = next((each for each in ranks if each.rank in guilty), ranks[0])
        await self._say_and_end(
            {
                "code": TopologyError.exit_code,
                "cause": "Hang",
                "rank": first.rank,
                "host": first.host,
                "message": text,
                "ranks": guilty,
                "step": max(each.seen.step for each in ranks) + 1,
                "owns_folder": any(member.owns_folder for member in self._members.values()),
            },
            ranks,
        )

    def _evidence_of(self, rank: int, seen: Seen) -> Evidence:
        member = self._members[rank]
        if member.evidence is None:
            return Evidence(seen, member.host, member.pid, state="?", heard=seen.unheard_s == 0)
        return report.from_json(member.evidence, seen)

    async def _others_end(self, rank: int, words: str, code: int, grace_s: float, *, by_signal: bool) -> None:
        """All other ranks are told that this one has ended; those that go on regardless are ended."""
        member = self._members[rank]
        news = {"rank": rank, "host": member.host, "message": words, "code": code, "by_signal": by_signal}
        self._tell_all({"news": news})
        deadline = time.monotonic() + grace_s
        while self._alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._is_over:
            return
        self._is_over = True
        if not self._is_said and not any(each.seen and each.seen.phase == Phase.ENDING for each in self._alive()):
            self._tell_all({"hush": True})
            # What one process prints itself before it leaves is not known here; with a folder, exit.json tells.
            end = {"code": code, "cause": "TopologyError", "rank": rank, "host": member.host, "message": words}
            owns_folder = any(each.owns_folder for each in self._members.values())
            if owns_folder or len(self._awaited) > 1:
                await self._say_and_end({**end, "owns_folder": owns_folder}, [])
                return
        self._end_all(code)

    async def _say_and_end(self, end: Message, ranks: Sequence[Evidence]) -> None:
        try:
            await self._speak(end, ranks)
        finally:  # whatever cannot be said or written
            self._end_all(end["code"])

    def _end_all(self, code: int) -> None:
        self._tell_all({"end": code})
        self._has_ended = True

    @property
    def is_settled(self) -> bool:
        """Whether nobody needs it any more: the job is over, or all have left, or who has not was told to end."""
        return self._has_ended or (self._followed is None and not self._alive())

    def _alive(self) -> list[Member]:
        return [each for each in self._members.values() if not (each.has_left or each.is_lost)]

    def _tell_all(self, message: Message) -> None:
        """Those who are there: one that has said why it ends does so itself, and may go on as a process."""
        for member in self._members.values():
            if not member.has_left:
                member.send(message)

    def _follow(self, rank: int, words: str, code: int, grace_s: float, *, by_signal: bool = False) -> None:
        """The first end counts; further ones follow from it."""
        if self._followed is None:
            self._followed = asyncio.get_running_loop().create_task(
                self._others_end(rank, words, code, grace_s, by_signal=by_signal)
            )


async def serve(hub: Hub, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, token: str) -> None:
    """One connection, from its first line, which must have the job's word, to its end."""
    rank: int | None = None
    try:
        hello = json.loads(await asyncio.wait_for(reader.readline(), timeout=10.0) or b"{}")
        if hello.get("token") != token:
            return
        rank = int(hello["rank"])
        hub.join(rank, Member(lambda message: send(writer, message), hello["host"], hello["pid"]))
        while line := await reader.readline():
            hub.receive(rank, json.loads(line))
    except (OSError, ValueError, KeyError, TimeoutError, asyncio.TimeoutError):
        pass  # gone, or never one of ours
    finally:
        if rank is not None:
            hub.lost(rank)
        writer.close()


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """A line of JSON; nothing where the other side is gone."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")

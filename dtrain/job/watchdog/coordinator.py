"""Coordinator of all monitors: receives the state of each rank, detects hangs, and tells every monitor what to do.

It runs in the monitor of rank 0, outside of every rank. Each rank's monitor sends one short line of JSON every second
or two, over its own socket, after a token that only this job knows.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dtrain.config import bounded_json
from dtrain.console import log
from dtrain.distributed.heartbeat import Phase
from dtrain.errors import TopologyError
from dtrain.job.watchdog.evidence import MonitorMessage
from dtrain.job.watchdog.report import MAX_LISTED, RankEvidence, evidence_from_json, hang_message
from dtrain.job.watchdog.rules import HangSettings, RankState, is_hang

EVIDENCE_S = 5.0
"""How long the monitors may take to send evidence about a hang."""

AFTER_DEATH_S = 2.5
AFTER_ERROR_S = 4.0
"""How long the other ranks may continue after one has died, or has reported why it ends; then they are ended."""

UNREACHABLE_S = 30.0
MIN_UNREACHABLE_S = 10.0
"""A monitor counts as unreachable after this silence: UNREACHABLE_S, or less if the limit for idle ranks is lower."""

JOINING_S = 30.0
"""Monitors that have not connected by then are not waited for."""

MAX_LINE = 2**20

HELLO_TIMEOUT_S = 10.0
"""Time limit for the first line of a connection."""


def unreachable_after_s(settings: HangSettings) -> float:
    """Returns after how many seconds of silence a monitor, or the coordinator, counts as out of reach."""
    return min(UNREACHABLE_S, max(MIN_UNREACHABLE_S, settings.hang_timeout_s or UNREACHABLE_S))


@dataclass
class RankRecord:
    """The coordinator's record of a rank.

    Attributes:
        send: sends a message to its monitor.
        host: its host name.
        pid: its process id.
        state: None before its first report.
        owns_run_dir: whether this run may write exit.json.
        heard_s: time.monotonic() when its monitor last sent something.
        evidence: evidence about a hang that its monitor has sent.
        has_left: whether the rank has ended or its monitor has left.
        is_disconnected: whether the connection to its monitor is closed.
    """

    send: Callable[[MonitorMessage], None]
    host: str
    pid: int
    state: RankState | None = None
    owns_run_dir: bool = False
    heard_s: float = field(default_factory=time.monotonic)
    evidence: MonitorMessage | None = None
    has_left: bool = False
    is_disconnected: bool = False

    @property
    def has_all_evidence(self) -> bool:
        """Whether the evidence is complete: data workers come last."""
        return self.evidence is not None and "workers" in self.evidence


class CoordinatorEndpoint(NamedTuple):
    """The address at which monitors connect to the coordinator.

    Attributes:
        address: host or address.
        port: its port.
        token: known to this job only.
        host: host name of rank 0, whose monitor runs the coordinator.
        pid: process id of rank 0.
    """

    address: str
    port: int
    token: str
    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.address} port {self.port}"


class Coordinator:
    """Tracks all ranks and decides when to end the job."""

    def __init__(
        self,
        ranks: Iterable[int],
        settings: HangSettings,
        report_end: Callable[[MonitorMessage, Sequence[RankEvidence]], Awaitable[None]],
    ) -> None:
        """
        Args:
            ranks: all ranks of the job, or those that this coordinator watches.
            settings: the settings that define a hang.
            report_end: prints and writes how the job ends: the fields of exit.json, and the evidence about a hang.
        """
        self._expected = frozenset(ranks)
        self._settings = settings
        self._report_end = report_end
        self._ranks: dict[int, RankRecord] = {}
        self._unsignaled: set[int] = set()
        self._is_over = self._is_reported = self._is_done = False
        self._ending: asyncio.Task[None] | None = None
        self._start_s, self._has_warned = time.monotonic(), False
        self._unreachable_after_s = unreachable_after_s(settings)

    def add_rank(self, rank: int, record: RankRecord) -> None:
        """Adds a rank when its monitor connects."""
        self._ranks[rank] = record
        self._unsignaled.add(rank)

    def receive(self, rank: int, message: MonitorMessage) -> None:
        """Handles a message from the monitor of a rank."""
        record = self._ranks[rank]
        record.heard_s = time.monotonic()
        match message:
            case {"state": values, "owns_run_dir": owns_run_dir}:
                record.owns_run_dir = owns_run_dir
                record.state = RankState(**{**values, "rank": rank, "phase": Phase(values["phase"])})
            case {"evidence": evidence}:
                record.evidence = evidence
            case {"signal": _}:
                self._pass_on_signal(rank, message)
            case {"leaving": _}:
                record.has_left = True
                if self._ending is not None:  # the others must still be ended, even if rank 0 is gone
                    self._is_reported = True  # this rank has reported why it follows
                elif rank == 0 and not self._is_over:
                    self._is_over = self._is_done = True
                    self._send_all({"finished": True})
            case {"died": text, "owns_run_dir": owns_run_dir}:
                record.has_left, record.owns_run_dir = True, owns_run_dir
                self._start_ending(rank, text, TopologyError.exit_code, AFTER_DEATH_S)
            case {"failed": text, "code": code, "by_signal": by_signal}:
                record.has_left = self._is_reported = True
                self._start_ending(rank, text, code, AFTER_ERROR_S, by_signal=by_signal)

    def disconnect(self, rank: int) -> None:
        """Records that the connection to a monitor is closed. It may have been killed alone, so the job continues."""
        self._ranks[rank].is_disconnected = True

    def stop_deciding(self) -> None:
        """Stops all decisions here, because another coordinator takes them."""
        self._is_over = self._is_done = True

    async def watch(self, period_s: float) -> None:
        """Checks all ranks periodically until the job is over."""
        while not self._is_over:
            await asyncio.sleep(period_s)
            self._send_all({"alive": True})
            missing = self._missing_ranks()
            if missing is not None and is_hang([*self._reported_states(), *missing], self._settings):
                await self._end_hang()

    def _missing_ranks(self) -> list[RankState] | None:
        """Returns ranks without a monitor, and warns about them once; None while monitors may still connect.

        Such a rank counts as starting, which has no limit: others may rightly wait for it.
        """
        missing = sorted(self._expected - self._ranks.keys())
        if missing and time.monotonic() - self._start_s < JOINING_S:
            return None
        if missing and not self._has_warned:
            self._has_warned = True
            names = f"{', '.join(map(str, missing[:MAX_LISTED]))}{' and more' if len(missing) > MAX_LISTED else ''}"
            log.warning(
                "No watchdog for rank%s %s: its monitor has not connected within %.0f s. Ranks that wait for %s do not "
                "count as hanging.",
                "" if len(missing) == 1 else "s",
                names,
                JOINING_S,
                "it" if len(missing) == 1 else "them",
            )
        return [RankState(rank, Phase.STARTING) for rank in missing]

    def _reported_states(self) -> list[RankState]:
        now = time.monotonic()
        states = []
        for rank, record in self._ranks.items():
            if not record.has_left:
                # A node may be lost before its first report, which comes within seconds of the connection.
                state = record.state or RankState(rank, Phase.STARTING)
                silence_s = now - record.heard_s
                is_unreachable = record.is_disconnected or silence_s > self._unreachable_after_s
                states.append(replace(state, unreachable_s=silence_s if is_unreachable else 0.0))
        return states

    async def _end_hang(self) -> None:
        self._is_over = True
        states = {state.rank: state for state in self._reported_states()}
        self._send_all({"send_evidence": True})
        deadline = time.monotonic() + EVIDENCE_S
        reachable = [self._ranks[rank] for rank, state in states.items() if state.unreachable_s == 0]
        while not all(record.has_all_evidence for record in reachable) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._is_done:  # another coordinator has taken over, so the ranks may continue
            return
        ranks = [self._evidence(rank, state) for rank, state in sorted(states.items())]
        text, suspects = hang_message(ranks, self._settings, stacks_file=None)
        first = next((each for each in ranks if each.rank in suspects), ranks[0])
        await self._report_and_end(
            {
                "code": TopologyError.exit_code,
                "cause": "Hang",
                "rank": first.rank,
                "host": first.host,
                "message": text,
                "ranks": suspects,
                "step": max(each.state.step for each in ranks) + 1,
                "owns_run_dir": self._owns_run_dir,
            },
            ranks,
        )

    def _evidence(self, rank: int, state: RankState) -> RankEvidence:
        record = self._ranks[rank]
        if record.evidence is None:
            is_reachable = state.unreachable_s == 0
            return RankEvidence(state, record.host, record.pid, process_state="?", is_reachable=is_reachable)
        return evidence_from_json(record.evidence, state)

    def _start_ending(self, rank: int, text: str, code: int, grace_s: float, *, by_signal: bool = False) -> None:
        """Starts to end the other ranks after the first failure. Further failures follow from the first."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(
                self._end_others(rank, text, code, grace_s, by_signal=by_signal)
            )

    async def _end_others(self, rank: int, text: str, code: int, grace_s: float, *, by_signal: bool) -> None:
        """Tells all other ranks that this one has ended, and ends those that continue for too long."""
        record = self._ranks[rank]
        failure = {"rank": rank, "host": record.host, "message": text, "code": code, "by_signal": by_signal}
        self._send_all({"failure": failure})
        deadline = time.monotonic() + grace_s
        while self._alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._is_over:
            return
        self._is_over = True
        is_any_ending = any(each.state and each.state.phase == Phase.ENDING for each in self._alive())
        # What a single process prints before it leaves is not known here; with a run folder, exit.json shows it.
        if not self._is_reported and not is_any_ending:
            self._send_all({"silence": True})
            if self._owns_run_dir or len(self._expected) > 1:
                end = {"code": code, "cause": "TopologyError", "rank": rank, "host": record.host, "message": text}
                await self._report_and_end({**end, "owns_run_dir": self._owns_run_dir}, [])
                return
        self._end_all(code)

    async def _report_and_end(self, end: MonitorMessage, ranks: Sequence[RankEvidence]) -> None:
        try:
            await self._report_end(end, ranks)
        finally:  # also if the report fails
            self._end_all(end["code"])

    def _end_all(self, code: int) -> None:
        self._send_all({"end": code})
        self._is_done = True

    @property
    def is_settled(self) -> bool:
        """Whether no rank needs it any more: the job is over, or every rank has left or was told to end."""
        return self._is_done or (self._ending is None and not self._alive())

    @property
    def _owns_run_dir(self) -> bool:
        return any(record.owns_run_dir for record in self._ranks.values())

    def _alive(self) -> list[RankRecord]:
        return [record for record in self._ranks.values() if not (record.has_left or record.is_disconnected)]

    def _pass_on_signal(self, rank: int, message: MonitorMessage) -> None:
        """Sends a signal to each rank that has had none. Every rank that gets one reports it in turn: that adds nothing."""
        ranks = self._unsignaled - {rank}
        self._unsignaled = set()
        self._send_to([self._ranks[each] for each in sorted(ranks)], message)

    def _send_all(self, message: MonitorMessage) -> None:
        """Sends to all ranks that have not left. A rank that has failed ends by itself, or continues in a notebook."""
        self._send_to(self._ranks.values(), message)

    def _send_to(self, records: Iterable[RankRecord], message: MonitorMessage) -> None:
        encoded = EncodedMessage(message)
        for record in records:
            if not record.has_left:
                record.send(encoded)


class EncodedMessage(dict[str, Any]):
    """A message to many monitors, with the line that each of them gets."""

    def __init__(self, message: MonitorMessage) -> None:
        super().__init__(message)
        self.line = json.dumps(message).encode() + b"\n"


async def serve_monitor(
    coordinator: Coordinator, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, token: str
) -> None:
    """Serves the connection of one monitor, whose first line must have the job's token, until it is closed."""
    rank: int | None = None
    try:
        hello = _parse_hello(await asyncio.wait_for(reader.readline(), timeout=HELLO_TIMEOUT_S), token)
        if hello is None:
            return
        rank = int(hello["rank"])
        record = RankRecord(lambda message: send_message(writer, message), hello["host"], hello["pid"])
        coordinator.add_rank(rank, record)
        while line := await reader.readline():
            coordinator.receive(rank, bounded_json.loads(line))
    except (OSError, ValueError, KeyError, TimeoutError, asyncio.TimeoutError):
        pass  # the connection is broken, or a stranger sent a line without an end
    finally:
        if rank is not None:
            coordinator.disconnect(rank)
        writer.close()


def _parse_hello(line: bytes, token: str) -> MonitorMessage | None:
    """Returns the first line of a monitor of this job; None for anything that a stranger may send to the port."""
    try:
        hello = bounded_json.loads(line)
    except ValueError:
        return None
    if not isinstance(hello, dict) or not secrets.compare_digest(str(hello.get("token")).encode(), token.encode()):
        return None
    return hello


def send_message(writer: asyncio.StreamWriter, message: MonitorMessage) -> None:
    """Sends a line of JSON, unless the connection is closed."""
    if not writer.is_closing():
        line = message.line if isinstance(message, EncodedMessage) else json.dumps(message).encode() + b"\n"
        writer.write(line)

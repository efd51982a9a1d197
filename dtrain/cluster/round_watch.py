"""Tells the rounds of a job (rounds.py) what happens on its hosts, and sends their orders to the launchers there."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dtrain.cluster.job_outcome import HostResult, silent_result
from dtrain.cluster.rounds import LOST_AFTER_S, Order, RoundPlan, Rounds
from dtrain.console import log

PING_INTERVAL_S = 3.0
"""Interval at which each supervisor receives a ping, which it answers."""

WATCH_INTERVAL_S = 0.5
"""The same while the job can go on without a host that does not answer."""


PAUSE_S = 1.0
"""A look that is later than this was delayed by a stop of this process (Ctrl-Z, a sleeping laptop)."""


class Connection(Protocol):
    """The connection to one host's supervisor.

    Attributes:
        host: the host's name.
        index: its number among the job's hosts.
        last_message_s: when it sent something last, by time.monotonic().
        is_local: the host is this machine, which answers without a network.
    """

    host: str
    index: int
    last_message_s: float
    is_local: bool

    def send(self, order: Mapping[str, Any]) -> None:
        """Sends one line; does nothing if the supervisor has ended."""


class RoundWatch:
    """Tells the rounds of a job what happens on its hosts, and sends their orders to the launchers."""

    def __init__(self, connections: Sequence[Connection], plan: RoundPlan) -> None:
        self.rounds, self._connections = Rounds(plan), connections
        self._last_look = time.monotonic()
        self._send(self.rounds.begin())

    @property
    def ping_interval_s(self) -> float:
        """Interval between two pings."""
        return WATCH_INTERVAL_S if self.rounds.can_lose_hosts else PING_INTERVAL_S

    def look(self, running: Sequence[Connection], now: float) -> list[HostResult]:
        """Acts on what is due. Returns results of hosts that are given up because they do not answer."""
        paused_s, self._last_look = now - self._last_look, now
        # Between two looks there is a ping at the latest. More than that: this process was stopped itself, so it has heard nobody.
        for connection in running if paused_s > self.ping_interval_s + PAUSE_S else ():
            connection.last_message_s += paused_s
        given_up = []
        silent = [each for each in running if now - each.last_message_s > LOST_AFTER_S]
        remote = [each for each in running if not each.is_local]
        # If nobody answers, or no other one of several, this machine's own network is gone.
        is_cut_off = len(silent) == len(running) or len(silent) == len(remote) > 1
        if self.rounds.can_lose_hosts and not is_cut_off:
            for connection in silent:
                reason = f"{connection.host}: no answer for {LOST_AFTER_S:g} s."
                connection.send({"kill": True})
                given_up.append(silent_result(connection.host))
                self._send(self.rounds.lose(connection.index, reason, now, left_trace=False))
        self._send(self.rounds.tick(now))
        for index, reason in self.rounds.given_up:
            self._connections[index].send({"kill": True})
            given_up.append(HostResult(self._connections[index].host, 1, lost=reason, was_killed=True))
        self.rounds.given_up.clear()
        return given_up

    def take_report(self, index: int, report: Mapping[str, Any], now: float) -> None:
        """Takes a report of a launcher."""
        self._send(self.rounds.take(index, report, now))

    def take_end(self, index: int, result: HostResult, now: float) -> None:
        """Takes note that a host's launcher has ended."""
        if result.is_known and result.code >= 0 and not self.rounds.is_unused(index):
            self._send(self.rounds.stop())  # by itself: it was told to, or cannot start
            return
        how = (
            f"ended with code {result.code}"
            if result.code >= 0
            else f"was killed by {signal.Signals(-result.code).name}"
        )
        reason = result.lost or result.problem or f"its launcher {how}."
        reason = reason if reason.startswith(result.host) else f"{result.host}: {reason}"
        self._send(self.rounds.lose(index, reason, now, left_trace=result.is_known))

    def stop(self) -> None:
        """Takes note that the user stops the job."""
        self._send(self.rounds.stop())

    def of_last_round(self, results: Sequence[HostResult]) -> list[HostResult]:
        """Returns the results that decide how the job has ended, the first end first."""
        hosts = [connection.host for connection in self._connections]
        members = [hosts[index] for index in self.rounds.members]
        order = [hosts[index] for index in self.rounds.end_order]
        counted = [result for result in results if result.host in members]
        return sorted(counted, key=lambda each: order.index(each.host) if each.host in order else len(order))

    def _send(self, orders: Sequence[Order]) -> None:
        for note in self.rounds.notes:
            log.warning("%s", note)
        self.rounds.notes.clear()
        for index, order in orders:
            self._connections[index].send({"order": order})

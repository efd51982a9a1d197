"""Decides which hosts take part in each start (round) of a job under launch/dtrain.sh, and when it starts again.

A state machine without input and output: events and the time in, orders for the hosts' launchers out. job/node_orders.py
describes the orders. A host that is lost is replaced by a spare one in its place, so that the world size stays the same;
without a spare the job goes on smaller. torchrun would let all nodes negotiate; here one process sees all hosts anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from dtrain.errors import NON_RETRYABLE_CODES, Preempted

LOST_AFTER_S = 3.0
"""A host that does not answer for this long is given up if the job can go on without it."""

SETTLE_S = 5.0
"""Time for the ranks to end by themselves after some have failed; they notice at once, and report why."""

SETTLE_AFTER_LOSS_S = 0.2
"""The same after a host is lost without a trace: the other ranks wait for it and cannot save anything."""

KILL_TIMEOUT_S = 3.0
"""Time for a launcher to report the end of its ranks after the order to kill them."""

IMPORT_TIMEOUT_S = 300.0
"""Time for a launcher to import everything. Until then it has no ranks and follows no order, but nothing is wrong with it."""


@dataclass(frozen=True)
class RoundHost:
    """One host.

    Attributes:
        name: its name in the hostfile.
        address: where ranks on other hosts reach it.
        slots: number of ranks that it can run.
        is_spare: it takes part only in place of another host.
    """

    name: str
    address: str
    slots: int
    is_spare: bool = False


Order: TypeAlias = tuple[int, dict[str, Any]]
"""A host's index and the order for its launcher."""


class RoundOrder(NamedTuple):
    """One start of the ranks on all nodes.

    Attributes:
        ranks: number of ranks on this node.
        first_rank: the rank of this node's first process.
        world_size: number of ranks on all nodes.
        node_rank: number of this node, from 0.
        num_nodes: number of nodes.
        address: address where the ranks meet.
        port: its port.
        restart: how often the job was started before.
        max_restarts: how often it may be started again.
        lost_hosts: host names of nodes that the coordinator has given up.
    """

    ranks: int
    first_rank: int
    world_size: int
    node_rank: int
    num_nodes: int
    address: str
    port: int
    restart: int
    max_restarts: int
    lost_hosts: list[str]


@dataclass(frozen=True)
class RoundPlan:
    """What is known before the first start.

    Attributes:
        hosts: all hosts, in the order of ranks.
        port: the port where ranks meet; 0 for a free one in each start.
        max_restarts: how often the job may start again.
    """

    hosts: Sequence[RoundHost]
    port: int
    max_restarts: int


class Rounds:
    """The starts of one job.

    Attributes:
        members: the hosts of the current start, in the order of ranks: index and number of ranks.
        is_final: there will be no other start, so the launchers end.
        deadline: when `tick` must be called at the latest.
        notes: lines for the user that have not been printed yet.
        end_order: the hosts of the current start that have ended or are lost, the first first.
        given_up: hosts, and why, whose launchers follow no orders any more. Who takes one from here ends it.
    """

    def __init__(self, plan: RoundPlan) -> None:
        hosts = plan.hosts
        self._hosts, self._port, self._max_restarts = hosts, plan.port, plan.max_restarts
        self.members = {index: host.slots for index, host in enumerate(hosts) if not host.is_spare}
        self._spares = [index for index, host in enumerate(hosts) if host.is_spare]
        self._restart, self._ended, self._gone = 0, dict[int, int](), dict[int, str]()
        self._started, self._host_names, self._first_failure = False, dict[int, str](), ""
        self.is_final, self._was_killed, self.deadline = False, False, math.inf
        self.notes: list[str] = []
        self.end_order: list[int] = []
        self.given_up: list[tuple[int, str]] = []
        self._begin_s: float | None = None

    @property
    def can_lose_hosts(self) -> bool:
        """Whether a host that no longer answers may be given up, because the job can go on without it."""
        return not self.is_final and self._restart < self._max_restarts

    def is_unused(self, index: int) -> bool:
        """Returns whether a host is a spare one that has taken no place yet."""
        return index in self._spares

    @property
    def has_begun(self) -> bool:
        """Whether the hosts were told to start their ranks."""
        return self._started or self._restart > 0

    def begin(self) -> list[Order]:
        """Returns the orders of a start: the first host opens the socket where the ranks meet."""
        self._ended, self.end_order, self._started, self._first_failure = {}, [], False, ""
        self._was_killed, self.deadline, self._begin_s = False, math.inf, None
        first = next(iter(self.members))
        return [(first, {"listen": {"address": self._hosts[first].address, "port": self._port}})]

    def stop(self) -> list[Order]:
        """Takes note that the user stops the job, or that a launcher has refused it: there is no other start."""
        return [] if self.is_final else self._finish()

    def take(self, index: int, report: Mapping[str, Any], now: float) -> list[Order]:
        """Takes a report of a launcher, and returns orders."""
        if "ready" in report:
            self._host_names[index] = str(report["ready"])
        elif "listening" in report and index == next(iter(self.members)) and self._can_start():
            return self._start(int(report["listening"]))
        elif report.get("ended") == self._restart and index in self.members and index not in self._gone:
            if index in self._ended:  # it ended by itself just before the order to do so
                return []
            code = self._ended[index] = int(report["code"])
            self.end_order.append(index)
            if self.is_final:
                return []
            if not self.can_lose_hosts or code in NON_RETRYABLE_CODES:
                return self._finish()  # the launchers end when their ranks have ended
            if code not in (0, Preempted.exit_code):
                self._first_failure = self._first_failure or f"{self._hosts[index].name}: {report['failure']}"
                self.deadline = min(self.deadline, now + SETTLE_S)
            return self._proceed()
        return []

    def lose(self, index: int, reason: str, now: float, *, left_trace: bool) -> list[Order]:
        """Takes note that a host's launcher has ended, or that the host no longer answers. Returns orders.

        Args:
            reason: what happened, with the host's name.
            left_trace: its ranks, or the connections of its ranks, were ended, so that the other ranks know.
        """
        if self.is_final or index in self._gone:
            return []
        self._gone[index] = reason
        if index in self._spares:
            self._spares.remove(index)
            self.notes.append(f"{reason} It was a spare host, so the job goes on.")
            return []
        if index not in self.members:
            return []
        self.end_order.append(index)
        if not self.can_lose_hosts:
            return self._finish()
        self.deadline = min(self.deadline, now + (SETTLE_S if left_trace else SETTLE_AFTER_LOSS_S))
        return self._proceed()

    def tick(self, now: float) -> list[Order]:
        """Kills ranks that should have ended by now; gives up launchers that do not even answer that."""
        self._begin_s = now if self._begin_s is None else self._begin_s
        if self.is_final:
            return []
        if not self._started and now > self._begin_s + IMPORT_TIMEOUT_S and self.deadline == math.inf:
            first = next(iter(self.members))
            reason = f"{self._hosts[first].name}: its launcher has not begun to work within {IMPORT_TIMEOUT_S:g} s."
            self.given_up.append((first, reason))
            return self.lose(first, reason, now, left_trace=False)
        if now < self.deadline:
            return []
        left = [index for index in self.members if index not in self._ended and index not in self._gone]
        if not self._was_killed:
            self._was_killed, self.deadline = True, now + KILL_TIMEOUT_S
            return [(index, {"stop": self._restart}) for index in left]
        is_patient = self.can_lose_hosts and now < self._begin_s + IMPORT_TIMEOUT_S
        for index in left:
            if index not in self._host_names and is_patient:
                self.deadline = now + KILL_TIMEOUT_S  # it still imports; the next start needs it
                continue
            self._gone[index] = f"{self._hosts[index].name}: its launcher does not end its ranks."
            self.given_up.append((index, self._gone[index]))
        return self._proceed()

    def _can_start(self) -> bool:
        """Returns whether this start can still begin: nobody is lost, and nobody was told to stop."""
        return not (self._started or self.is_final or self._was_killed or self._gone.keys() & self.members.keys())

    def _start(self, port: int) -> list[Order]:
        self._started = True
        first, orders, first_rank = next(iter(self.members)), [], 0
        for node_rank, (index, ranks) in enumerate(self.members.items()):
            order = RoundOrder(
                ranks=ranks,
                first_rank=first_rank,
                world_size=sum(self.members.values()),
                node_rank=node_rank,
                num_nodes=len(self.members),
                address=self._hosts[first].address,
                port=port,
                restart=self._restart,
                max_restarts=self._max_restarts,
                lost_hosts=[self._host_names.get(gone, self._hosts[gone].name) for gone in self._gone],
            )
            orders.append((index, {"start": order._asdict()}))
            first_rank += ranks
        return orders

    def _proceed(self) -> list[Order]:
        """Ends the round if all its hosts have ended: the job is over, or begins again. There is a restart left."""
        lost = [index for index in self.members if index in self._gone]
        if len(self._ended.keys() | lost) < len(self.members):
            return []
        codes = set(self._ended.values())
        is_stopped = codes <= {0, Preempted.exit_code} and not lost  # else ranks saved because a launcher has died
        is_done = bool(codes) and codes <= {0}
        if is_stopped or is_done:
            if is_done:  # a host that is lost after all others have finished does not count
                self.members = {index: slots for index, slots in self.members.items() if index not in lost}
            return self._finish()
        members = self._replace(lost)
        if not members:
            return self._finish()
        self._restart += 1
        reason = self._gone[lost[0]] if lost else self._first_failure
        before, after = sum(self.members.values()), sum(members.values())
        size = f"{after} ranks" if before == after else f"{after} instead of {before} ranks"
        names = ", ".join(self._hosts[index].name for index in members)
        self.notes.append(
            f"{reason} The job starts again with {size} on {names}: restart {self._restart} of {self._max_restarts}."
        )
        self.members = members
        return self.begin()

    def _replace(self, lost: Sequence[int]) -> dict[int, int]:
        """Returns the hosts of the next start. A spare host takes the place of a lost one, so that ranks keep theirs."""
        members = {}
        for index, ranks in self.members.items():
            if index not in lost:
                members[index] = ranks
            elif self._spares:
                fitting = [spare for spare in self._spares if self._hosts[spare].slots >= ranks]
                spare = fitting[0] if fitting else max(self._spares, key=lambda each: self._hosts[each].slots)
                self._spares.remove(spare)
                members[spare] = min(ranks, self._hosts[spare].slots)
        return members

    def _finish(self) -> list[Order]:
        self.is_final, self.deadline = True, math.inf
        return [(index, {"finish": True}) for index in range(len(self._hosts)) if index not in self._gone]

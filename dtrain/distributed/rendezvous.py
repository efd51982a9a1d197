"""Rendezvous: waits in a store for every rank before the process group starts, and rejects processes of other jobs.

Every process writes its arrival into the store. Rank 0, the leader, replies to each arrival, and a process that
answers the reply is alive. So a restarted job may use a store that is full of entries of dead processes, and a process
of another job gets an error. torch's stores are used through the protocol `KeyValueStore`, so this file needs no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dtrain.console import log
from dtrain.distributed.job_identity import Arrival, JobIdentity, difference_table
from dtrain.distributed.process_info import boot_id
from dtrain.errors import TopologyError

PROGRESS_EVERY_S = 30.0
MAX_POLL_S = 0.25
"""Longest pause between two looks at the store."""

MAX_LISTED = 8
"""How many ranks a message lists before "and n more"."""

RoundResult = dict[str, Any]
"""How a round ended, as JSON: `placements` of all ranks or a `problem`, and the rank that published it (`by`)."""


class KeyValueStore(Protocol):
    """The methods of torch.distributed.Store that are used here."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def set(self, key: str, value: str) -> None: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class RankPlacement(NamedTuple):
    """A rank's place on its node, found by comparing all ranks. The fields are those of topology.Topology."""

    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int


class RendezvousResult(NamedTuple):
    """The result for one rank.

    Attributes:
        placement: this rank's place on its node.
        round: number of this rendezvous; unique in its store.
    """

    placement: RankPlacement
    round: int


@dataclass
class _Wait:
    """Polls until a deadline, less often while nothing happens, to spare the store."""

    deadline: float
    timeout_s: float
    pause_s: float = 0.01

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def pause(self, *, progress: bool) -> None:
        self.pause_s = 0.01 if progress else min(self.pause_s * 1.5, MAX_POLL_S)
        time.sleep(self.pause_s)


def join(
    store: KeyValueStore,
    *,
    rank: int,
    world_size: int,
    local_rank: int | None,
    node: str | None,
    deadline: float,
    timeout_s: float,
    identity: JobIdentity | None = None,
) -> RendezvousResult:
    """Collective. Waits for all ranks. Then all of them continue, or all raise the same message.

    A process of another job, or of an older start of this one, is rejected with its own message, while rank 0 continues
    to wait.

    Args:
        local_rank: as the launcher set it; None to derive it.
        node: equal for all ranks of one node; default: host name and boot id.
        deadline: time.monotonic() at which this rank stops waiting.
        timeout_s: the time-out that led to this deadline, for the message.
        identity: the job that this process belongs to.

    Raises:
        TopologyError: ranks are missing, exist twice, belong to another job, or expect another world size.
    """
    host, pid = socket.gethostname(), os.getpid()
    me = Arrival(rank, world_size, local_rank, node or f"{host}/{boot_id()}", host, pid, identity or JobIdentity())
    wait = _Wait(deadline, timeout_s)
    try:
        result = _lead(store, me, wait) if rank == 0 else _follow(store, me, wait)
    except RuntimeError as error:  # torch's DistError: the host of the store is gone
        raise TopologyError(f"Rank {rank} on {host} lost the rendezvous while waiting for others: {error}") from error
    if "problem" in result:
        failure = TopologyError(result["problem"])
        failure.is_reported_elsewhere = result["by"] != rank
        raise failure
    return RendezvousResult(RankPlacement(*result["placements"][rank]), result["round"])


# ---------------------------------------------------------------- followers


def _follow(store: KeyValueStore, me: Arrival, wait: _Wait) -> RoundResult:
    """Joins as any rank but 0: writes its arrival, answers the leader's reply, returns the result."""
    number = store.add("arrivals", 1)
    store.set(f"arrival/{number}", me.to_json())
    round_ = 0
    while True:
        reply = _read_json(store, f"reply/{number}")
        if reply is not None and "problem" in reply:
            return reply
        is_new_round = reply is not None and reply["round"] != round_
        if reply is not None and is_new_round:  # the second time it is by a newer rank 0
            round_ = reply["round"]
            store.set(f"present/{round_}/{number}", "present")
        result = _read_json(store, f"result/{round_}") if round_ else None
        if result is None and wait.is_over:
            problem = _missing_ranks(me, _present(store, me, round_), wait.timeout_s)
            problem += "" if round_ else _missed_round_hint(store)
            result = _publish(store, round_, {"problem": problem, "by": me.rank}, me.identity.restart)
        if result is not None:
            store.add(f"read/{result['round']}", 1)
            if "problem" in result or result["numbers"][me.rank] == number:
                return result
            return {"problem": _duplicate_rank(result["names"][me.rank], me), "by": me.rank}
        wait.pause(progress=is_new_round)


def _present(store: KeyValueStore, me: Arrival, round_: int) -> list[Arrival]:
    """Returns who has answered the leader; without a leader, who has arrived, which includes dead processes."""
    leader = _read_text(store, f"leader/{round_}")
    present = [Arrival.from_json(leader)] if leader is not None else []
    for number in range(1, store.add("arrivals", 0) + 1):
        arrival = _read_arrival(store, number)
        has_answered = round_ == 0 or store.check([f"present/{round_}/{number}"])
        if arrival is not None and has_answered and arrival.identity.is_same_start(me.identity):
            present.append(arrival)
    return present


def _missed_round_hint(store: KeyValueStore) -> str:
    """Returns a hint for a rank that was never contacted: the others may have formed the group already."""
    leader = _read_text(store, f"leader/{store.add('rounds', 0)}")
    if leader is None:
        return ""
    leads = Arrival.from_json(leader)
    return f" The job of {leads} has started without this process: is it left over from an older start?"


# ---------------------------------------------------------------- the leader


def _lead(store: KeyValueStore, me: Arrival, wait: _Wait) -> RoundResult:
    """Joins as rank 0: starts a round, replies to every arrival, collects the answers, publishes the result."""
    round_ = store.add("rounds", 1)
    store.set(f"leader/{round_}", me.to_json())
    leader = _Leader(store, me, round_)
    next_report = time.monotonic() + PROGRESS_EVERY_S
    while True:
        superseded = leader.superseded()
        if superseded is not None:  # publishes nothing: the others may follow the newer rank 0 already
            return {"problem": superseded, "by": 0}
        progress = leader.poll()
        outcome = leader.outcome()
        if outcome is None and wait.is_over:
            missing = _missing_ranks(me, leader.present.values(), wait.timeout_s)
            outcome = {"problem": "\n".join([missing, *leader.rejections[:MAX_LISTED]])}
        result = _read_json(store, f"result/{round_}")  # a follower's time may have run out first
        if result is None and outcome is not None:
            result = _publish(store, round_, {**outcome, "by": 0}, 0)
        if result is not None:
            break
        if time.monotonic() > next_report:
            log.info("Still waiting for %s", _format_list(leader.missing()))
            next_report = time.monotonic() + PROGRESS_EVERY_S
        wait.pause(progress=progress)
    store.set("processed", str(leader.last_arrival))
    if "problem" in result:
        _wait_for_readers(store, round_, leader)
    return result


class _Leader:
    """Rank 0's state of one round.

    Attributes:
        last_arrival: number of the arrival that was read last.
        present: by rank, the processes that have answered.
        num_followers: how many processes wait for the result.
        rejections: messages about rejected processes.
    """

    def __init__(self, store: KeyValueStore, me: Arrival, round_: int) -> None:
        self._store, self._me, self._round = store, me, round_
        # An earlier round has handled the arrivals before these.
        self.last_arrival = int(store.get("processed")) if store.check(["processed"]) else 0
        self.present: dict[int, Arrival] = {0: me}
        self.num_followers = 0
        self.rejections: list[str] = []
        self._numbers = {0: 0}
        self._unread: list[int] = []
        self._unanswered: dict[int, Arrival] = {}
        self._problem: str | None = None
        self._superseded: str | None = None
        self._rounds_seen = 0

    def superseded(self) -> str | None:
        """Returns a message if a newer start has replaced this rank 0, which its launcher has not ended yet."""
        if self._superseded is not None:
            return self._superseded
        me, latest = self._me, self._store.add("rounds", 0)
        for number in range(self._rounds_seen + 1, latest + 1):
            text = _read_text(self._store, f"leader/{number}") if number != self._round else None
            if text is None:
                continue
            other = Arrival.from_json(text)
            is_later = (other.identity.restart, number) > (me.identity.restart, self._round)
            if other.identity.job == me.identity.job and is_later:
                return f"{me.capitalized} is left over from an older start of this job, which {other} leads now."
        self._rounds_seen = latest
        return None

    def poll(self) -> bool:
        """Replies to new arrivals and reads the answers; returns whether there was an answer."""
        latest = self._store.add("arrivals", 0)
        self._unread += range(self.last_arrival + 1, latest + 1)
        self.last_arrival = max(self.last_arrival, latest)
        for number in list(self._unread):
            arrival = _read_arrival(self._store, number)
            if arrival is not None:  # else the process has its number, but has not written its arrival yet
                self._unread.remove(number)
                self._unanswered[number] = arrival
                self._store.set(f"reply/{number}", json.dumps({"round": self._round}))
        answered = [n for n in self._unanswered if self._store.check([f"present/{self._round}/{n}"])]
        for number in answered:
            self._admit(number, self._unanswered.pop(number))
        return bool(answered)

    def _admit(self, number: int, arrival: Arrival) -> None:
        """Admits a live process, or rejects it, or records why the job cannot start."""
        leader, our_job, its_job = self._me, self._me.identity, arrival.identity
        has_other_size, has_other_run = arrival.world_size != leader.world_size, its_job.run != our_job.run
        # A launcher that names the job gives all its ranks one world size, but each node may be given another command.
        # Without a launcher, ranks are started by hand: another size is a mistake then, another run is another job.
        is_other_job = not our_job.is_same_start(its_job) or (has_other_size if our_job.job else has_other_run)
        if our_job.is_older_start(its_job):
            self._superseded = (
                f"{leader.capitalized} is left over from an older start of this job, to which {arrival} belongs."
            )
            return
        if is_other_job:
            self._reject(number, arrival)
            return
        self.num_followers += 1
        if has_other_run:
            table = difference_table(leader, arrival)
            self._problem = (
                f"{leader.capitalized} and {arrival} work on different runs:\n{table}\nStart all with one command."
            )
        elif has_other_size:
            self._problem = (
                f"{arrival.capitalized} expects {arrival.world_size} processes, rank 0 expects {leader.world_size}: start "
                "every rank with the same WORLD_SIZE."
            )
        elif arrival.rank in self.present:
            problem = _duplicate_rank(str(self.present[arrival.rank]), arrival)
            self._reply(number, {"problem": problem, "by": arrival.rank})
        else:
            self.present[arrival.rank], self._numbers[arrival.rank] = arrival, number

    def _reject(self, number: int, arrival: Arrival) -> None:
        text = (
            f"{arrival.capitalized} does not belong to the job that {self._me} leads, and was rejected. It is left "
            f"over from an older start, or uses the address of another job.\n{difference_table(self._me, arrival)}"
        )
        self.rejections.append(text)
        log.warning("%s", text)
        fix = "If it is an old process, stop it. Else use one MASTER_PORT per job, and one command for all its ranks."
        self._reply(number, {"problem": f"{text}\n{fix}", "by": arrival.rank})

    def _reply(self, number: int, reply: RoundResult) -> None:
        self._store.set(f"reply/{number}", json.dumps(reply))

    def outcome(self) -> RoundResult | None:
        """Returns why the job cannot start, or the placements of all ranks once they are present; else None."""
        if self._problem is not None:
            return {"problem": self._problem}
        if self.missing():
            return None
        ranks = [self.present[rank] for rank in range(self._me.world_size)]
        numbers = [self._numbers[arrival.rank] for arrival in ranks]
        return {**_place_ranks(ranks), "numbers": numbers, "names": [str(arrival) for arrival in ranks]}

    def missing(self) -> list[str]:
        """Returns the ranks that have not answered."""
        return [f"rank {rank}" for rank in range(self._me.world_size) if rank not in self.present]


def _wait_for_readers(store: KeyValueStore, round_: int, leader: _Leader) -> None:
    """Keeps the store, which ends with rank 0, until all followers have read the result; 2 s at most."""
    begin = time.monotonic()
    while (waited_s := time.monotonic() - begin) < 2.0:
        leader.poll()
        # A process that has just got its reply may look only after its pause.
        if waited_s > 2 * MAX_POLL_S and store.add(f"read/{round_}", 0) >= leader.num_followers:
            return
        time.sleep(0.02)


def _place_ranks(ranks: Sequence[Arrival]) -> RoundResult:
    """Returns the placements of all ranks, or the problem with them."""
    nodes = list(dict.fromkeys(arrival.node for arrival in ranks))
    members = {node: [rank for rank, arrival in enumerate(ranks) if arrival.node == node] for node in nodes}
    placements = []
    for rank, arrival in enumerate(ranks):
        neighbors = members[arrival.node]
        local_rank = neighbors.index(rank) if arrival.local_rank is None else arrival.local_rank
        placements.append(RankPlacement(local_rank, len(neighbors), nodes.index(arrival.node), len(nodes)))
    keys = [(placement.node_rank, placement.local_rank) for placement in placements]
    for key, times in Counter(keys).items():
        if times > 1:
            same = [str(ranks[rank]) for rank, other in enumerate(keys) if other == key]
            names = _format_list(same)
            return {"problem": f"{times} ranks of one node have local rank {key[1]}: {names}. Unset LOCAL_RANK."}
    return {"placements": placements}


# ---------------------------------------------------------------- messages and the store


def _duplicate_rank(one: str, other: Arrival) -> str:
    return f"Two processes have the same rank: {one} and {other}. Give each its own RANK."


def _missing_ranks(me: Arrival, present: Iterable[Arrival], timeout_s: float) -> str:
    names = {arrival.rank: str(arrival) for arrival in sorted([*present, me], key=lambda arrival: arrival.rank)}
    missing = [f"rank {rank}" for rank in range(me.world_size) if rank not in names]
    return (
        f"{len(names)} of {me.world_size} ranks arrived within {timeout_s:g} s. Missing: {_format_list(missing)}. "
        f"Arrived: {_format_list(list(names.values()))}. Start all {me.world_size} with the same MASTER_ADDR, "
        "MASTER_PORT and WORLD_SIZE, or increase run.startup_timeout_s."
    )


def _publish(store: KeyValueStore, round_: int, result: RoundResult, restart: int) -> RoundResult:
    """Publishes a result unless there is one already; returns the first. Ranks without a round share a result."""
    key = f"result/{round_}" if round_ else f"result_without_round/{restart}"
    first: RoundResult = json.loads(store.compare_set(key, "", json.dumps({**result, "round": round_})))
    return first


def _read_arrival(store: KeyValueStore, number: int) -> Arrival | None:
    text = _read_text(store, f"arrival/{number}")
    return Arrival.from_json(text) if text is not None else None


def _read_json(store: KeyValueStore, key: str) -> RoundResult | None:
    text = _read_text(store, key)
    return json.loads(text) if text is not None else None


def _read_text(store: KeyValueStore, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _format_list(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more

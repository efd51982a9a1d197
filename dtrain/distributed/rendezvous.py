"""Rendezvous: waits in a store for every rank before the process group starts, and rejects processes of other jobs.

Every process writes its arrival into the store. Rank 0, the leader, replies to each arrival, and a process that
answers the reply is alive. So a restarted job may use a store that is full of entries of dead processes, and a process
of another job gets an error. Only rank 0 (rendezvous_leader.py) reads the entries of all others. torch's stores are used
through the protocol `KeyValueStore`, so this file needs no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from dtrain.console import log
from dtrain.distributed.job_identity import Arrival, JobIdentity
from dtrain.distributed.process_info import boot_id
from dtrain.distributed.rendezvous_leader import Leader, RankPlacement, RoundResult, duplicate_rank, read_arrival
from dtrain.distributed.store import MAX_LISTED, KeyValueStore, format_list, read_json, read_text
from dtrain.errors import TopologyError

PROGRESS_EVERY_S = 30.0
MAX_POLL_S = 0.25
"""Longest pause between two looks at the store, in a small world."""

MAX_LOOKS_PER_S = 4096
"""How often all ranks together look into the store at most, once they have waited for a while."""

CLAIM_S = 5.0
"""How long a follower whose time is over waits for the one that lists the missing ranks, before it lists them itself."""


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
    world_size: int
    pause_s: float = 0.01

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def pause(self, *, progress: bool) -> None:
        longest = max(MAX_POLL_S, self.world_size / MAX_LOOKS_PER_S)
        self.pause_s = 0.01 if progress else min(self.pause_s * 1.5, longest)
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
    wait = _Wait(deadline, timeout_s, world_size)
    try:
        result = _lead(store, me, wait) if rank == 0 else _follow(store, me, wait)
    except RuntimeError as error:  # torch's DistError: the host of the store is gone
        raise TopologyError(f"Rank {rank} on {host} lost the rendezvous while waiting for others: {error}") from error
    if "problem" in result:
        failure = TopologyError(result["problem"])
        failure.is_reported_elsewhere = result["by"] != rank
        raise failure
    return RendezvousResult(RankPlacement(*result["placement"]), result["round"])


# ---------------------------------------------------------------- followers


def _follow(store: KeyValueStore, me: Arrival, wait: _Wait) -> RoundResult:
    """Joins as any rank but 0: writes its arrival, answers the leader's reply, returns the result."""
    number = store.add("arrivals", 1)
    store.set(f"arrival/{number}", me.to_json())
    round_ = 0
    while True:
        reply = read_json(store, f"reply/{number}")
        if reply is not None and "problem" in reply:
            return reply
        is_new_round = reply is not None and reply["round"] != round_
        if reply is not None and is_new_round:  # the second time it is by a newer rank 0
            round_ = reply["round"]
            _answer(store, round_, number)
        result = read_json(store, f"result/{round_}") if round_ else None
        if result is None and wait.is_over:
            result = _end_late(store, me, round_, wait)
        if result is not None:
            store.add(f"read/{result['round']}", 1)
            if "problem" in result:
                return result
            place = json.loads(store.get(f"place/{round_}/{me.rank}"))
            if place["number"] == number:
                return {**result, "placement": place["placement"]}
            return {"problem": duplicate_rank(place["name"], me), "by": me.rank}
        wait.pause(progress=is_new_round)


def _answer(store: KeyValueStore, round_: int, number: int) -> None:
    """Answers the leader of a round. The answers are numbered, so that the leader reads each once."""
    store.set(f"present/{round_}/{number}", "present")
    store.set(f"answer/{round_}/{store.add(f'answers/{round_}', 1)}", str(number))


def _end_late(store: KeyValueStore, me: Arrival, round_: int, wait: _Wait) -> RoundResult | None:
    """Publishes which ranks are missing, once the time is over. All run out of time together, but one reads who is there."""
    restart = me.identity.restart
    key = f"result/{round_}" if round_ else f"result_without_round/{restart}"
    is_first = store.add(f"ending/{key}", 1) == 1
    if not is_first and time.monotonic() < wait.deadline + CLAIM_S:
        return read_json(store, key)
    problem = _missing_ranks(me, _present(store, me, round_), wait.timeout_s)
    problem += "" if round_ else _missed_round_hint(store)
    return _publish(store, round_, {"problem": problem, "by": me.rank}, restart)


def _present(store: KeyValueStore, me: Arrival, round_: int) -> list[Arrival]:
    """Returns who has answered the leader; without a leader, who has arrived, which includes dead processes."""
    leader = read_text(store, f"leader/{round_}")
    present = [Arrival.from_json(leader)] if leader is not None else []
    for number in range(1, store.add("arrivals", 0) + 1):
        arrival = read_arrival(store, number)
        has_answered = round_ == 0 or store.check([f"present/{round_}/{number}"])
        if arrival is not None and has_answered and arrival.identity.is_same_start(me.identity):
            present.append(arrival)
    return present


def _missed_round_hint(store: KeyValueStore) -> str:
    """Returns a hint for a rank that was never contacted: the others may have formed the group already."""
    leader = read_text(store, f"leader/{store.add('rounds', 0)}")
    if leader is None:
        return ""
    leads = Arrival.from_json(leader)
    return f" The job of {leads} has started without this process: is it left over from an older start?"


# ---------------------------------------------------------------- the leader


def _lead(store: KeyValueStore, me: Arrival, wait: _Wait) -> RoundResult:
    """Joins as rank 0: starts a round, replies to every arrival, collects the answers, publishes the result."""
    round_ = store.add("rounds", 1)
    store.set(f"leader/{round_}", me.to_json())
    leader = Leader(store, me, round_)
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
        result = read_json(store, f"result/{round_}")  # a follower's time may have run out first
        if result is None and outcome is not None:
            places = outcome.pop("places", None)
            if places is not None:
                leader.write_places(places)
            result = _publish(store, round_, {**outcome, "by": 0}, 0)
        if result is not None:
            break
        if time.monotonic() > next_report:
            log.info("Still waiting for %s", format_list(leader.missing()))
            next_report = time.monotonic() + PROGRESS_EVERY_S
        wait.pause(progress=progress)
    store.set("processed", str(leader.last_arrival))
    if "problem" in result:
        _wait_for_readers(store, round_, leader)
        return result
    return {**result, "placement": leader.placement}


def _wait_for_readers(store: KeyValueStore, round_: int, leader: Leader) -> None:
    """Keeps the store, which ends with rank 0, until all followers have read the result; 2 s at most."""
    begin = time.monotonic()
    while (waited_s := time.monotonic() - begin) < 2.0:
        leader.poll()
        # A process that has just got its reply may look only after its pause.
        if waited_s > 2 * MAX_POLL_S and store.add(f"read/{round_}", 0) >= leader.num_followers:
            return
        time.sleep(0.02)


# ---------------------------------------------------------------- messages and the result


def _missing_ranks(me: Arrival, present: Iterable[Arrival], timeout_s: float) -> str:
    names = {arrival.rank: str(arrival) for arrival in sorted([*present, me], key=lambda arrival: arrival.rank)}
    missing = [f"rank {rank}" for rank in range(me.world_size) if rank not in names]
    return (
        f"{len(names)} of {me.world_size} ranks arrived within {timeout_s:g} s. Missing: {format_list(missing)}. "
        f"Arrived: {format_list(list(names.values()))}. Start all {me.world_size} with the same MASTER_ADDR, "
        "MASTER_PORT and WORLD_SIZE, or increase run.startup_timeout_s."
    )


def _publish(store: KeyValueStore, round_: int, result: RoundResult, restart: int) -> RoundResult:
    """Publishes a result unless there is one already; returns the first. Ranks without a round share a result."""
    key = f"result/{round_}" if round_ else f"result_without_round/{restart}"
    first: RoundResult = json.loads(store.compare_set(key, "", json.dumps({**result, "round": round_})))
    return first

"""Rank 0's side of the rendezvous: replies to every process that arrives, admits or rejects it, and places the ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from dtrain.console import log
from dtrain.distributed.job_identity import Arrival, difference_table
from dtrain.distributed.store import KeyValueStore, format_list, read_text

RoundResult = dict[str, Any]
"""How a round ended, as JSON: whether `all` ranks are present or a `problem`, and the rank that published it (`by`)."""


class RankPlacement(NamedTuple):
    """A rank's place on its node, found by comparing all ranks. The fields are those of topology.Topology."""

    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int


class Leader:
    """Rank 0's state of one round.

    Attributes:
        last_arrival: number of the arrival that was read last.
        present: by rank, the processes that have answered.
        num_followers: how many processes wait for the result.
        placement: rank 0's own, once all ranks have theirs.
        rejections: messages about rejected processes.
    """

    def __init__(self, store: KeyValueStore, me: Arrival, round_: int) -> None:
        self._store, self._me, self._round = store, me, round_
        # An earlier round has handled the arrivals before these.
        self.last_arrival = int(store.get("processed")) if store.check(["processed"]) else 0
        self.present: dict[int, Arrival] = {0: me}
        self.num_followers = 0
        self.placement: RankPlacement | None = None
        self.rejections: list[str] = []
        self._numbers = {0: 0}
        self._unread: list[int] = []
        self._unanswered: dict[int, Arrival] = {}
        self._last_answer = 0
        self._unread_answers: list[int] = []
        self._problem: str | None = None
        self._superseded: str | None = None
        self._rounds_seen = 0

    def superseded(self) -> str | None:
        """Returns a message if a newer start has replaced this rank 0, which its launcher has not ended yet."""
        if self._superseded is not None:
            return self._superseded
        me, latest = self._me, self._store.add("rounds", 0)
        for number in range(self._rounds_seen + 1, latest + 1):
            text = read_text(self._store, f"leader/{number}") if number != self._round else None
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
        store, latest = self._store, self._store.add("arrivals", 0)
        self._unread += range(self.last_arrival + 1, latest + 1)
        self.last_arrival = max(self.last_arrival, latest)
        unread = []
        for number in self._unread:
            arrival = read_arrival(store, number)
            if arrival is None:  # the process has its number, but has not written its arrival yet
                unread.append(number)
            else:
                self._unanswered[number] = arrival
                store.set(f"reply/{number}", json.dumps({"round": self._round}))
        self._unread = unread
        answered = self._new_answers()
        for number in answered:
            self._admit(number, self._unanswered.pop(number))
        return bool(answered)

    def _new_answers(self) -> list[int]:
        """Returns the processes that have answered since the last call. Costs nothing for those that have not."""
        latest = self._store.add(f"answers/{self._round}", 0)
        self._unread_answers += range(self._last_answer + 1, latest + 1)
        self._last_answer = max(self._last_answer, latest)
        texts = {answer: read_text(self._store, f"answer/{self._round}/{answer}") for answer in self._unread_answers}
        # Without a text, the process has the number of its answer, but has not written it yet; it may have died.
        self._unread_answers = [answer for answer, text in texts.items() if text is None]
        return [int(text) for text in texts.values() if text is not None]

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
            problem = duplicate_rank(str(self.present[arrival.rank]), arrival)
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
        if len(self.present) < self._me.world_size:
            return None
        return _place_ranks([self.present[rank] for rank in range(self._me.world_size)])

    def write_places(self, places: Sequence[RankPlacement]) -> None:
        """Writes one entry per rank, so that no rank reads those of the others."""
        self.placement = places[0]
        for rank, placement in enumerate(places[1:], 1):
            place = {"placement": placement, "number": self._numbers[rank], "name": str(self.present[rank])}
            self._store.set(f"place/{self._round}/{rank}", json.dumps(place))

    def missing(self) -> list[str]:
        """Returns the ranks that have not answered."""
        return [f"rank {rank}" for rank in range(self._me.world_size) if rank not in self.present]


def _place_ranks(ranks: Sequence[Arrival]) -> RoundResult:
    """Returns the places of all ranks, or the problem with them."""
    members: dict[str, list[int]] = {}
    for rank, arrival in enumerate(ranks):
        members.setdefault(arrival.node, []).append(rank)
    node_ranks = {node: number for number, node in enumerate(members)}
    placements = []
    for rank, arrival in enumerate(ranks):
        neighbors = members[arrival.node]
        local_rank = neighbors.index(rank) if arrival.local_rank is None else arrival.local_rank
        placements.append(RankPlacement(local_rank, len(neighbors), node_ranks[arrival.node], len(members)))
    keys = [(placement.node_rank, placement.local_rank) for placement in placements]
    for key, times in Counter(keys).items():
        if times > 1:
            same = [str(ranks[rank]) for rank, other in enumerate(keys) if other == key]
            names = format_list(same)
            return {"problem": f"{times} ranks of one node have local rank {key[1]}: {names}. Unset LOCAL_RANK."}
    return {"all": True, "places": placements}


def duplicate_rank(one: str, other: Arrival) -> str:
    return f"Two processes have the same rank: {one} and {other}. Give each its own RANK."


def read_arrival(store: KeyValueStore, number: int) -> Arrival | None:
    text = read_text(store, f"arrival/{number}")
    return Arrival.from_json(text) if text is not None else None

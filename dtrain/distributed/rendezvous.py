"""Who came: the roll-call through a store before the process group starts, and who is turned away from it.

Every process that arrives leaves its name; rank 0 calls them, and who answers lives. So a restarted job may use a store
that is full of what its dead left there, and a process of another job is told so instead of being let in. Knows torch's
stores only by what they can do (`Board`), so that it needs no torch.
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
from dtrain.distributed.job_identity import Entry, Identity, difference
from dtrain.distributed.process_info import boot
from dtrain.errors import TopologyError

PROGRESS_EVERY_S = 30.0
LONGEST_PAUSE_S = 0.25
"""Between two looks at the store."""

NAMED = 8
"""How many ranks a message lists before it says "and n more"."""

Verdict = dict[str, Any]


class Board(Protocol):
    """What the roll-call needs of a torch.distributed.Store."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def set(self, key: str, value: str) -> None: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class Seat(NamedTuple):
    """A rank's place on its node, found by comparing all ranks."""

    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int


class Admission(NamedTuple):
    """What a rank goes on with. meeting: the number of this one, unlike that of any other in the same store."""

    seat: Seat
    meeting: int


@dataclass
class _Wait:
    """Until when, and how long until the next look."""

    deadline: float
    timeout_s: float
    pause_s: float = 0.01

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def look_again(self, *, progress: bool) -> None:
        """Sleeps, longer and longer while nothing happens, to spare the store."""
        self.pause_s = 0.01 if progress else min(self.pause_s * 1.5, LONGEST_PAUSE_S)
        time.sleep(self.pause_s)


def call(
    board: Board,
    *,
    rank: int,
    world_size: int,
    local_rank: int | None,
    node: str | None,
    deadline: float,
    timeout_s: float,
    identity: Identity | None = None,
) -> Admission:
    """Collective. Rank 0 calls the others; all go on when all are there, and all fail with one message otherwise.

    A process of another job, or of an older start of this one, is turned away with a message of its own, while rank 0
    goes on waiting.

    Args:
        local_rank: as the launcher gave it; None to be told.
        node: what ranks of one node have in common; default: host name and boot.
        deadline: time.monotonic() at which this rank stops waiting.
        timeout_s: the whole time-out, for the message.
        identity: of the job that this process believes it belongs to.

    Raises:
        TopologyError: ranks are missing, came twice, are another job's, or think of another world size.
    """
    host, pid = socket.gethostname(), os.getpid()
    me = Entry(rank, world_size, local_rank, node or f"{host}/{boot()}", host, pid, identity or Identity())
    wait = _Wait(deadline, timeout_s)
    try:
        verdict = _preside(board, me, wait) if rank == 0 else _attend(board, me, wait)
    except RuntimeError as error:  # torch's DistError: the store's host has gone
        raise TopologyError(
            f"Rank {rank} on {host} lost the meeting point while waiting for others: {error}"
        ) from error
    if "problem" in verdict:
        failure = TopologyError(verdict["problem"])
        failure.is_reported_elsewhere = verdict["by"] != rank
        raise failure
    return Admission(Seat(*verdict["seats"][rank]), verdict["meeting"])


# ---------------------------------------------------------------- ranks that are called


def _attend(board: Board, me: Entry, wait: _Wait) -> Verdict:
    """Any rank but 0: arrives, answers when it is called, and hears what was found."""
    number = board.add("arrived", 1)
    board.set(f"arrival/{number}", me.as_text())
    meeting = 0
    while True:
        reply = _read(board, f"reply/{number}")
        if reply is not None and "problem" in reply:
            return reply
        is_called = reply is not None and reply["meeting"] != meeting
        if reply is not None and is_called:  # by a newer rank 0, perhaps
            meeting = reply["meeting"]
            board.set(f"here/{meeting}/{number}", "here")
        verdict = _read(board, f"verdict/{meeting}") if meeting else None
        if verdict is None and wait.is_over:
            problem = _missing(me, _came(board, me, meeting), wait.timeout_s) + ("" if meeting else _too_late(board))
            verdict = _say(board, meeting, {"problem": problem, "by": me.rank}, me.identity.restart)
        if verdict is not None:
            return _heard(board, me, number, verdict)
        wait.look_again(progress=is_called)


def _heard(board: Board, me: Entry, number: int, verdict: Verdict) -> Verdict:
    board.add(f"read/{verdict['meeting']}", 1)
    if "problem" in verdict or verdict["members"][me.rank] == number:
        return verdict
    return {"problem": _twice(verdict["names"][me.rank], me), "by": me.rank}


def _came(board: Board, me: Entry, meeting: int) -> list[Entry]:
    """Who has answered rank 0; before it has called, who has left their name, the dead among them."""
    leader = _text(board, f"meeting/{meeting}")
    found = [Entry.from_text(leader)] if leader is not None else []
    for number in range(1, board.add("arrived", 0) + 1):
        entry = _entry(board, number)
        is_here = meeting == 0 or board.check([f"here/{meeting}/{number}"])
        if entry is not None and is_here and entry.identity.is_of_start(me.identity):
            found.append(entry)
    return found


def _too_late(board: Board) -> str:
    """For one whom nobody has called: perhaps the others have met long ago."""
    text = _text(board, f"meeting/{board.add('meetings', 0)}")
    leader = Entry.from_text(text) if text is not None else None
    return (
        "" if leader is None else f" The job of {leader} met without this process: is it left over from an older start?"
    )


# ---------------------------------------------------------------- rank 0


def _preside(board: Board, me: Entry, wait: _Wait) -> Verdict:
    """Rank 0: calls everyone who has arrived, listens who answers, and says what it found."""
    meeting = board.add("meetings", 1)
    board.set(f"meeting/{meeting}", me.as_text())
    hall = _Hall(board, me, meeting)
    next_report = time.monotonic() + PROGRESS_EVERY_S
    while True:
        newer = hall.newer()
        if newer is not None:  # without a word to the others, who may listen to that one by now
            return {"problem": newer, "by": 0}
        progress = hall.look()
        found = hall.found()
        if found is None and wait.is_over:
            found = {
                "problem": "\n".join([_missing(me, hall.seated.values(), wait.timeout_s), *hall.turned_away[:NAMED]])
            }
        verdict = _read(board, f"verdict/{meeting}")  # another's patience may have been over first
        if verdict is None and found is not None:
            verdict = _say(board, meeting, {**found, "by": 0}, 0)
        if verdict is not None:
            break
        if time.monotonic() > next_report:
            log.info("Still waiting for %s", _listed(hall.absent()))
            next_report = time.monotonic() + PROGRESS_EVERY_S
        wait.look_again(progress=progress)
    board.set("settled", str(hall.last))
    if "problem" in verdict:
        _linger(board, meeting, hall)
    return verdict


class _Hall:
    """What rank 0 sees of one meeting.

    seated: by rank, those who have answered. listeners: how many wait for a verdict. last: the arrival read last.
    """

    def __init__(self, board: Board, me: Entry, meeting: int) -> None:
        self._board, self._me, self._meeting = board, me, meeting
        # Who arrived earlier was heard by an earlier meeting.
        self.last = int(board.get("settled")) if board.check(["settled"]) else 0
        self.seated: dict[int, Entry] = {0: me}
        self.turned_away: list[str] = []
        self._numbers = {0: 0}
        self._unread: list[int] = []
        self._called: dict[int, Entry] = {}
        self._problem: str | None = None
        self._superseded: str | None = None
        self._meetings = 0
        self.listeners = 0

    def newer(self) -> str | None:
        """Why this rank 0 is none any more, though its launcher has not ended it yet."""
        if self._superseded is not None:
            return self._superseded
        me, latest = self._me, self._board.add("meetings", 0)
        for number in range(self._meetings + 1, latest + 1):
            text = _text(self._board, f"meeting/{number}") if number != self._meeting else None
            if text is None:
                continue
            other = Entry.from_text(text)
            is_later = (other.identity.restart, number) > (me.identity.restart, self._meeting)
            if other.identity.job == me.identity.job and is_later:
                return f"{me.at_start} is left over from an older start of this job, which {other} leads now."
        self._meetings = latest
        return None

    def look(self) -> bool:
        """Calls who is new and hears who answers; gives whether anybody did."""
        arrived = self._board.add("arrived", 0)
        self._unread += range(self.last + 1, arrived + 1)
        self.last = max(self.last, arrived)
        for number in list(self._unread):
            entry = _entry(self._board, number)
            if entry is not None:  # else it has its number, and writes its name in this moment
                self._unread.remove(number)
                self._called[number] = entry
                self._board.set(f"reply/{number}", json.dumps({"meeting": self._meeting}))
        answered = [n for n in self._called if self._board.check([f"here/{self._meeting}/{n}"])]
        for number in answered:
            self._hear(number, self._called.pop(number))
        return bool(answered)

    def _hear(self, number: int, entry: Entry) -> None:
        """Seats one that lives, or turns it away, or finds that the job as a whole cannot be."""
        me, mine, its = self._me, self._me.identity, entry.identity
        has_other_size, has_other_run = entry.world_size != me.world_size, its.run != mine.run
        # A launcher that has a name for the job gives all its ranks one size, but each node the command that it was
        # told. Without one ranks are started by hand: another size is a slip then, another run is another job.
        is_stranger = not mine.is_of_start(its) or (has_other_size if mine.job else has_other_run)
        if mine.is_older_start(its):
            self._superseded = f"{me.at_start} is left over from an older start of this job, to which {entry} belongs."
            return
        if is_stranger:
            self._turn_away(number, entry)
            return
        self.listeners += 1
        if has_other_run:
            table = difference(me, entry)
            self._problem = f"{me.at_start} and {entry} work on different runs:\n{table}\nStart all with one command."
        elif has_other_size:
            self._problem = (
                f"{entry.at_start} counts {entry.world_size} processes in all, rank 0 counts {me.world_size}: start "
                "every rank with the same WORLD_SIZE."
            )
        elif entry.rank in self.seated:
            self._reply(number, {"problem": _twice(str(self.seated[entry.rank]), entry), "by": entry.rank})
        else:
            self.seated[entry.rank], self._numbers[entry.rank] = entry, number

    def _turn_away(self, number: int, entry: Entry) -> None:
        text = (
            f"{entry.at_start} is not of the job that {self._me} leads, and was turned away: left over from an older "
            f"start, or led here by another job's address.\n{difference(self._me, entry)}"
        )
        self.turned_away.append(text)
        log.warning("%s", text)
        cure = (
            "Stop it if it is an old one; else give each job a MASTER_PORT of its own, and all its ranks one command."
        )
        self._reply(number, {"problem": f"{text}\n{cure}", "by": entry.rank})

    def _reply(self, number: int, reply: Verdict) -> None:
        self._board.set(f"reply/{number}", json.dumps(reply))

    def found(self) -> Verdict | None:
        """What is wrong with the job; or the seats of all, once they are there."""
        if self._problem is not None:
            return {"problem": self._problem}
        if self.absent():
            return None
        ranks = [self.seated[rank] for rank in range(self._me.world_size)]
        members = [self._numbers[entry.rank] for entry in ranks]
        return {**_judge(ranks), "members": members, "names": [str(entry) for entry in ranks]}

    def absent(self) -> list[str]:
        """The ranks that have not answered."""
        return [f"rank {rank}" for rank in range(self._me.world_size) if rank not in self.seated]


def _linger(board: Board, meeting: int, hall: _Hall) -> None:
    """Keeps the store, which ends with rank 0, until those who came have read the verdict; 2 s at most."""
    begin = time.monotonic()
    while (waited_s := time.monotonic() - begin) < 2.0:
        hall.look()
        # Who was called may look only now.
        if waited_s > 2 * LONGEST_PAUSE_S and board.add(f"read/{meeting}", 0) >= hall.listeners:
            return
        time.sleep(0.02)


def _judge(ranks: Sequence[Entry]) -> Verdict:
    """The seats of all ranks, or what is wrong with them."""
    nodes = list(dict.fromkeys(entry.node for entry in ranks))
    members = {node: [rank for rank, entry in enumerate(ranks) if entry.node == node] for node in nodes}
    seats = []
    for rank, entry in enumerate(ranks):
        here = members[entry.node]
        local_rank = here.index(rank) if entry.local_rank is None else entry.local_rank
        seats.append(Seat(local_rank, len(here), nodes.index(entry.node), len(nodes)))
    for place, times in Counter((seat.node_rank, seat.local_rank) for seat in seats).items():
        if times > 1:
            same = [str(ranks[r]) for r, seat in enumerate(seats) if (seat.node_rank, seat.local_rank) == place]
            return {"problem": f"One node has local rank {place[1]} {times} times: {_listed(same)}. Drop LOCAL_RANK."}
    return {"seats": seats}


def _twice(one: str, other: Entry) -> str:
    return f"Two processes are {one} and {other}: give each its own RANK."


def _missing(me: Entry, came: Iterable[Entry], timeout_s: float) -> str:
    here = {entry.rank: str(entry) for entry in sorted([*came, me], key=lambda entry: entry.rank)}
    gone = [f"rank {rank}" for rank in range(me.world_size) if rank not in here]
    return (
        f"{len(here)} of {me.world_size} ranks came within {timeout_s:g} s. Missing: {_listed(gone)}. "
        f"Came: {_listed(list(here.values()))}. Start all {me.world_size} with the same MASTER_ADDR, MASTER_PORT and "
        "WORLD_SIZE, or give them longer with run.startup_timeout_s."
    )


def _say(board: Board, meeting: int, verdict: Verdict, restart: int) -> Verdict:
    """The first to speak is believed; of those who were never called, among themselves."""
    place = f"verdict/{meeting}" if meeting else f"uncalled/{restart}"
    said: Verdict = json.loads(board.compare_set(place, "", json.dumps({**verdict, "meeting": meeting})))
    return said


def _entry(board: Board, number: int) -> Entry | None:
    text = _text(board, f"arrival/{number}")
    return Entry.from_text(text) if text is not None else None


def _read(board: Board, key: str) -> Verdict | None:
    text = _text(board, key)
    return json.loads(text) if text is not None else None


def _text(board: Board, key: str) -> str | None:
    return board.get(key).decode() if board.check([key]) else None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more

"""Who came: sockets at the master's address, and the roll-call through a store before the process group starts.

Knows torch's stores only by what they can do (`Board`), so that it needs no torch.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dtrain import network
from dtrain.console import log
from dtrain.errors import TopologyError

PROGRESS_EVERY_S = 30.0
NAMED = 8
"""How many ranks a message lists before it says "and n more"."""


class Board(Protocol):
    """What the roll-call needs of a torch.distributed.Store."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class Seat(NamedTuple):
    """A rank's place on its node, found by comparing all ranks."""

    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int


def listen(address: str, port: int) -> socket.socket:
    """A listening socket on one address only (torch's own listens on all interfaces); port 0 takes a free one.

    Raises:
        TopologyError: the port is taken.
        OSError: the address is not this machine's.
    """
    family, _ = network.resolve(address, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise TopologyError(
            f"Port {port} on {address} is in use, so rank 0 cannot open the meeting point there. Is another job, or an "
            "old one, still running? Choose another port (MASTER_PORT, --master-port)."
        ) from error
    return listener


def listen_as_master(address: str, port: int, *, serves_other_nodes: bool) -> socket.socket:
    """The master's listening socket, on the interface of MASTER_ADDR; on all where that address cannot be bound.

    Args:
        serves_other_nodes: other machines may come, so a name that means 127.0.1.1 here must not be taken at its word.

    Raises:
        TopologyError: the name does not resolve, or the port is taken.
    """
    try:
        _, own = network.resolve(address, port)
    except socket.gaierror as error:
        here = socket.gethostname()
        raise TopologyError(
            f"MASTER_ADDR={address} does not resolve on {here}: {error}. Use its IP address."
        ) from error
    if serves_other_nodes and network.is_loopback(own):
        return listen("0.0.0.0", port)
    try:
        return listen(own, port)
    except OSError:  # an address in front of this machine (a service, a NAT)
        return listen("::" if ":" in own else "0.0.0.0", port)


def reach(address: str, port: int, *, rank: int, deadline: float, timeout_s: float) -> None:
    """Waits until the master answers.

    Raises:
        TopologyError: nobody answered until the deadline.
    """
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((address, port), timeout=min(left, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TopologyError(
                    f"Rank {rank} on {socket.gethostname()} found no master at {address}:{port} within {timeout_s:g} s "
                    f"({error}). Rank 0 opens it: is it running there, with the same MASTER_ADDR and MASTER_PORT, "
                    "and does no firewall close the port?"
                ) from error
            time.sleep(0.1)


def call(
    board: Board,
    *,
    rank: int,
    world_size: int,
    local_rank: int | None,
    node: str | None,
    deadline: float,
    timeout_s: float,
) -> Seat:
    """Collective. Every rank writes its name; all go on when all are there, and all fail with one message otherwise.

    Args:
        local_rank: as the launcher gave it; None to be told.
        node: what ranks of one node have in common; default: host name and boot.
        deadline: time.monotonic() at which this rank stops waiting.
        timeout_s: the whole time-out, for the message.

    Raises:
        TopologyError: ranks are missing, came twice, or think of another world size.
    """
    host, pid = socket.gethostname(), os.getpid()
    node = node or f"{host}/{_boot()}"
    me = {"host": host, "pid": pid, "node": node, "local_rank": local_rank, "world_size": world_size}
    try:
        _sign_in(board, rank, me)
        verdict = _await_verdict(board, rank=rank, world_size=world_size, deadline=deadline, timeout_s=timeout_s)
        board.add("read", 1)
        if rank == 0 and "problem" in verdict:
            _linger(board, world_size)
    except RuntimeError as error:  # torch's DistError: the store's host has gone
        raise TopologyError(
            f"Rank {rank} on {host} lost the meeting point while waiting for others: {error}"
        ) from error
    if "problem" in verdict:
        failure = TopologyError(verdict["problem"])
        failure.is_said_elsewhere = verdict["by"] != rank
        raise failure
    return Seat(*verdict["seats"][rank])


def _sign_in(board: Board, rank: int, me: dict[str, Any]) -> None:
    text = json.dumps(me)
    first = board.compare_set(_key(rank), "", text).decode()
    if first != text:
        other = _name(rank, json.loads(first))
        raise TopologyError(f"Two processes are {other} and {_name(rank, me)}: give each its own RANK.")


def _await_verdict(board: Board, *, rank: int, world_size: int, deadline: float, timeout_s: float) -> dict[str, Any]:
    """Rank 0 looks for all ranks and says what it found; the others look for that only, to spare the store."""
    keys = [_key(r) for r in range(world_size)]
    pause, next_report = 0.01, time.monotonic() + PROGRESS_EVERY_S
    while not board.check(["verdict"]):
        now = time.monotonic()
        if rank == 0 and board.check(keys):
            return _say(board, rank, _judge([json.loads(board.get(key)) for key in keys]))
        if now > deadline:
            return _say(board, rank, {"problem": _missing(board, world_size, timeout_s)})
        if rank == 0 and now > next_report:
            absent = [f"rank {r}" for r, key in enumerate(keys) if not board.check([key])]
            log.info("Still waiting for %s", _listed(absent))
            next_report = now + PROGRESS_EVERY_S
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
    return _read(board.get("verdict"))


def _say(board: Board, rank: int, verdict: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps({**verdict, "by": rank})
    return _read(board.compare_set("verdict", "", text))  # the first to speak is believed


def _read(text: bytes) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads(text)
    return verdict


def _judge(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The seats of all ranks, or what is wrong with them."""
    for rank, entry in enumerate(ranks):
        if entry["world_size"] != len(ranks):
            return {
                "problem": f"{_name(rank, entry)} counts {entry['world_size']} processes in all, rank 0 counts "
                f"{len(ranks)}: start every rank with the same WORLD_SIZE."
            }
    nodes = list(dict.fromkeys(entry["node"] for entry in ranks))
    members = {node: [rank for rank, entry in enumerate(ranks) if entry["node"] == node] for node in nodes}
    seats = []
    for rank, entry in enumerate(ranks):
        here = members[entry["node"]]
        local_rank = here.index(rank) if entry["local_rank"] is None else entry["local_rank"]
        seats.append(Seat(local_rank, len(here), nodes.index(entry["node"]), len(nodes)))
    for place, times in Counter((seat.node_rank, seat.local_rank) for seat in seats).items():
        if times > 1:
            same = [_name(r, ranks[r]) for r, seat in enumerate(seats) if (seat.node_rank, seat.local_rank) == place]
            return {"problem": f"One node has local rank {place[1]} {times} times: {_listed(same)}. Drop LOCAL_RANK."}
    return {"seats": seats}


def _missing(board: Board, world_size: int, timeout_s: float) -> str:
    here = [rank for rank in range(world_size) if board.check([_key(rank)])]
    gone = [f"rank {rank}" for rank in range(world_size) if rank not in set(here)]
    came = [_name(rank, json.loads(board.get(_key(rank)))) for rank in here]
    return (
        f"{len(here)} of {world_size} ranks came within {timeout_s:g} s. Missing: {_listed(gone)}. "
        f"Came: {_listed(came)}. Start all {world_size} with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, or give "
        "them longer with run.startup_timeout_s."
    )


def _linger(board: Board, world_size: int) -> None:
    """Keeps the store, which ends with rank 0, until those who came have read the verdict; 2 s at most."""
    came = sum(board.check([_key(rank)]) for rank in range(world_size))
    until = time.monotonic() + 2.0
    while board.add("read", 0) < came and time.monotonic() < until:
        time.sleep(0.02)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _name(rank: int, entry: dict[str, Any]) -> str:
    return f"rank {rank} (process {entry['pid']} on {entry['host']})"


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _boot() -> str:
    """Tells machines of one host name apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

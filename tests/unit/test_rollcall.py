"""The roll-call over torch's in-memory store, each rank a thread."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dtrain import rollcall
from dtrain.errors import TopologyError
from dtrain.rollcall import Seat


def _call(board: Any, rank: int, world_size: int, *, timeout_s: float = 5.0, **more: Any) -> Seat | str:
    wanted = {"local_rank": None, "node": None, **more}
    try:
        return rollcall.call(
            board,
            rank=rank,
            world_size=world_size,
            deadline=time.monotonic() + timeout_s,
            timeout_s=timeout_s,
            **wanted,
        )
    except TopologyError as error:
        return str(error)


def _together(calls: list[dict[str, Any]]) -> list[Seat | str]:
    board = HashStore()
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: _call(board, **call), calls))


def test_ranks_that_all_come_learn_who_shares_their_node() -> None:
    nodes = ["a", "b", "a", "b", "b"]

    seats = _together([{"rank": rank, "world_size": 5, "node": node} for rank, node in enumerate(nodes)])

    assert seats == [Seat(0, 2, 0, 2), Seat(0, 3, 1, 2), Seat(1, 2, 0, 2), Seat(1, 3, 1, 2), Seat(2, 3, 1, 2)]


def test_local_ranks_that_a_launcher_gave_are_kept() -> None:
    seats = _together([{"rank": rank, "world_size": 2, "local_rank": 1 - rank} for rank in range(2)])

    assert seats == [Seat(1, 2, 0, 1), Seat(0, 2, 0, 1)]


def test_missing_ranks_are_counted_and_named_to_all_who_came() -> None:
    messages = _together([{"rank": rank, "world_size": 4, "timeout_s": 0.3} for rank in (0, 2)])

    assert messages[0] == messages[1]
    assert "2 of 4 ranks came within 0.3 s. Missing: rank 1, rank 3. Came: rank 0 (process " in str(messages[0])
    assert f"on {socket.gethostname()})" in str(messages[0])


def test_a_missing_rank_0_is_named_by_the_others() -> None:
    assert "1 of 2 ranks came within 0.2 s. Missing: rank 0." in str(_call(HashStore(), 1, 2, timeout_s=0.2))


def test_a_long_list_of_missing_ranks_is_cut() -> None:
    message = str(_call(HashStore(), 0, 64, timeout_s=0.1))

    assert "rank 8 and 55 more" in message


def test_ranks_that_disagree_about_the_size_of_the_world_are_named() -> None:
    messages = _together([{"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 3}])

    assert messages[0] == messages[1]
    assert "counts 3 processes in all, rank 0 counts 2" in str(messages[0])


def test_two_processes_of_one_rank_are_refused() -> None:
    board = HashStore()
    first = _call(board, 1, 2, timeout_s=0.1, node="a")
    second = _call(board, 1, 2, timeout_s=0.1, node="b")

    assert "Missing: rank 0" in str(first)
    assert str(second).startswith("Two processes are rank 1")


def test_a_local_rank_that_two_ranks_of_a_node_claim_is_refused() -> None:
    messages = _together([{"rank": rank, "world_size": 2, "local_rank": 0} for rank in range(2)])

    assert messages[0] == messages[1]
    assert "One node has local rank 0 2 times" in str(messages[0])


def test_the_masters_socket_is_on_its_own_address_and_a_taken_port_is_named() -> None:
    with rollcall.listen_as_master("127.0.0.1", 0, serves_other_nodes=False) as listener:
        address, port = listener.getsockname()[:2]
        with pytest.raises(TopologyError, match=rf"Port {port} on 127\.0\.0\.1 is in use"):
            rollcall.listen("127.0.0.1", port)

    assert address == "127.0.0.1"


def test_a_master_that_other_nodes_must_reach_does_not_hide_behind_loopback() -> None:
    with rollcall.listen_as_master("127.0.1.1", 0, serves_other_nodes=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_master_name_that_does_not_resolve_is_named() -> None:
    with pytest.raises(TopologyError, match=r"MASTER_ADDR=no-such-host\.invalid does not resolve"):
        rollcall.listen_as_master("no-such-host.invalid", 1, serves_other_nodes=True)


def test_a_master_that_never_answers_is_named_with_its_address_and_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody can answer there
        port = taken.getsockname()[1]
        with pytest.raises(TopologyError, match=rf"Rank 1 .* found no master at 127\.0\.0\.1:{port} within 0\.2 s"):
            rollcall.reach("127.0.0.1", port, rank=1, deadline=time.monotonic() + 0.2, timeout_s=0.2)

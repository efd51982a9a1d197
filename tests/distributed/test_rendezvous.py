"""The rendezvous over torch's in-memory store, each rank a thread; and the sockets at the master's address."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dtrain.distributed import network, rendezvous
from dtrain.distributed.job_identity import JobIdentity
from dtrain.distributed.rendezvous_leader import RankPlacement
from dtrain.errors import TopologyError


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store to spare here."""
    monkeypatch.setattr(rendezvous, "MAX_POLL_S", 0.02)


def _call(board: Any, rank: int, world_size: int, *, timeout_s: float = 5.0, **more: Any) -> RankPlacement | str:
    wanted = {"local_rank": None, "node": None, **more}
    try:
        return rendezvous.join(
            board,
            rank=rank,
            world_size=world_size,
            deadline=time.monotonic() + timeout_s,
            timeout_s=timeout_s,
            **wanted,
        ).placement
    except TopologyError as error:
        return str(error)


def _together(calls: list[dict[str, Any]]) -> list[RankPlacement | str]:
    board = HashStore()
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: _call(board, **call), calls))


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert done()


def test_all_ranks_learn_which_ranks_share_their_node() -> None:
    nodes = ["a", "b", "a", "b", "b"]

    placements = _together([{"rank": rank, "world_size": 5, "node": node} for rank, node in enumerate(nodes)])

    assert placements == [
        RankPlacement(0, 2, 0, 2),
        RankPlacement(0, 3, 1, 2),
        RankPlacement(1, 2, 0, 2),
        RankPlacement(1, 3, 1, 2),
        RankPlacement(2, 3, 1, 2),
    ]


def test_local_ranks_that_a_launcher_gave_are_kept() -> None:
    placements = _together([{"rank": rank, "world_size": 2, "local_rank": 1 - rank} for rank in range(2)])

    assert placements == [RankPlacement(1, 2, 0, 1), RankPlacement(0, 2, 0, 1)]


def test_missing_ranks_are_counted_and_named_to_all_that_arrived() -> None:
    messages = _together([{"rank": rank, "world_size": 4, "timeout_s": 1.0} for rank in (0, 2)])

    assert messages[0] == messages[1]
    assert "2 of 4 ranks arrived within 1 s. Missing: rank 1, rank 3. Arrived: rank 0 (process " in str(messages[0])
    assert f"on {socket.gethostname()})" in str(messages[0])


def test_a_missing_rank_0_is_named_by_the_others() -> None:
    assert "1 of 2 ranks arrived within 0.2 s. Missing: rank 0." in str(_call(HashStore(), 1, 2, timeout_s=0.2))


def test_a_long_list_of_missing_ranks_is_cut() -> None:
    message = str(_call(HashStore(), 0, 64, timeout_s=0.1))

    assert "rank 8 and 55 more" in message


def test_ranks_that_disagree_about_the_size_of_the_world_are_named() -> None:
    messages = _together([{"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 3}])

    assert messages[0] == messages[1]
    assert "expects 3 processes, rank 0 expects 2" in str(messages[0])


def test_of_two_processes_of_one_rank_the_later_is_rejected_and_the_job_continues() -> None:
    board, found = HashStore(), {}
    with ThreadPoolExecutor(3) as pool:
        second_1 = [pool.submit(_call, board, 1, 3, node=node) for node in ("a", "b")]
        wait_for(lambda: board.check(["arrival/2"]))
        zero = pool.submit(_call, board, 0, 3)
        done, _ = wait(second_1, timeout=20, return_when=FIRST_COMPLETED)
        found["refused"] = str(done.pop().result())
        two = _call(board, 2, 3)
        found["placements"] = [zero.result(), two, *(each.result() for each in second_1)]

    assert found["refused"].startswith("Two processes have the same rank: rank 1 (process ")
    assert "Give each its own RANK" in found["refused"]
    assert sum(isinstance(placement, RankPlacement) for placement in found["placements"]) == 3


def test_a_local_rank_that_two_ranks_of_a_node_claim_is_refused() -> None:
    messages = _together([{"rank": rank, "world_size": 2, "local_rank": 0} for rank in range(2)])

    assert messages[0] == messages[1]
    assert "2 ranks of one node have local rank 0" in str(messages[0])


# ---------------------------------------------------------------- other jobs


COLA = {"command": "train", "run folder": "runs/cola"}
SST2 = {"command": "train", "run folder": "runs/sst2"}


def of(restart: int = 0, job: str = "j1", *, run: dict[str, str] | None = None, alike: bool = True) -> JobIdentity:
    """As under torchrun."""
    return JobIdentity({"rdzv id": job}, restart, alike, run or COLA)


@pytest.mark.parametrize(
    ("mine", "its", "rows"),
    [
        pytest.param(of(1), of(0), ["restart", "1", "0"], id="an older start"),
        pytest.param(of(job="j1"), of(job="j2"), ["rdzv id", "j1", "j2"], id="another job"),
        pytest.param(of(), JobIdentity(run=COLA), ["rdzv id", "j1", "-"], id="started by hand"),
        pytest.param(
            JobIdentity(run=COLA), JobIdentity(run=SST2), ["run folder", "runs/cola", "runs/sst2"], id="another run"
        ),
        pytest.param(
            JobIdentity(run=COLA),
            JobIdentity(run={**COLA, "command": "evaluate"}),
            ["command", "train", "evaluate"],
            id="command",
        ),
    ],
)
def test_a_process_of_another_start_is_rejected_immediately_and_the_right_one_admitted(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    mine: JobIdentity,
    its: JobIdentity,
    rows: list[str],
) -> None:
    monkeypatch.setattr(logging.getLogger("dtrain"), "propagate", True)
    board = HashStore()
    with ThreadPoolExecutor(3) as pool:
        stranger = pool.submit(_call, board, 1, 2, identity=its, timeout_s=20.0)
        wait_for(lambda: board.check(["arrival/1"]))
        zero = pool.submit(_call, board, 0, 2, identity=mine, timeout_s=20.0)
        told = str(stranger.result(timeout=20))
        assert not zero.done()
        one = pool.submit(_call, board, 1, 2, identity=mine, timeout_s=20.0)
        placements = [zero.result(timeout=20), one.result(timeout=20)]

    assert placements == [RankPlacement(0, 2, 0, 1), RankPlacement(1, 2, 0, 1)]
    assert told.startswith("Rank 1 (process ")
    table = [line.split("  ") for line in told.splitlines() if line.startswith("  ")]
    assert [[cell.strip() for cell in line if cell] for line in table][1:] == [rows]
    assert "MASTER_PORT" in told
    assert told.splitlines()[0] in caplog.text, "rank 0 says it, too"


def test_a_rank_of_another_run_is_named_when_no_other_arrives() -> None:
    messages = _together(
        [
            {"rank": 0, "world_size": 2, "timeout_s": 1.0, "identity": JobIdentity(run=COLA)},
            {"rank": 1, "world_size": 2, "timeout_s": 1.0, "identity": JobIdentity(run=SST2)},
        ]
    )

    assert str(messages[0]).startswith("1 of 2 ranks arrived within 1 s. Missing: rank 1.")
    for message in messages:
        assert "runs/cola" in str(message)
        assert "runs/sst2" in str(message)


def test_nodes_of_one_job_with_different_commands_fail_together_with_a_table() -> None:
    sides = [of(run=COLA), of(run=SST2), of(run=COLA)]

    messages = _together([{"rank": rank, "world_size": 3, "identity": side} for rank, side in enumerate(sides)])

    assert len(set(messages)) == 1
    assert "Rank 0 (process " in str(messages[0])
    assert "work on different runs" in str(messages[0])
    assert "run folder  runs/cola" in str(messages[0])


def test_nodes_whose_agents_count_their_own_failures_meet_all_the_same() -> None:
    sides = [of(0, alike=False), of(1, alike=False)]

    placements = _together([{"rank": rank, "world_size": 2, "identity": side} for rank, side in enumerate(sides)])

    assert placements == [RankPlacement(0, 2, 0, 1), RankPlacement(1, 2, 0, 1)]


def test_entries_of_dead_processes_of_an_earlier_start_do_no_harm() -> None:
    board = HashStore()
    for rank in (1, 2):  # they arrived, and were killed before rank 0 came
        assert "Missing: rank 0" in str(_call(board, rank, 3, timeout_s=0.05, identity=of(alike=False)))
    for restart in (1, 1, 2):  # the same number again: another node joined
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(_call, board, rank, 3, identity=of(restart, alike=False)) for rank in range(3)]
            assert [call.result() for call in calls] == [RankPlacement(rank, 3, 0, 1) for rank in range(3)]


def test_each_rendezvous_in_a_store_has_another_number() -> None:
    board = HashStore()
    common: dict[str, Any] = {"world_size": 1, "local_rank": None, "node": None, "timeout_s": 5.0}

    rounds = [rendezvous.join(board, rank=0, deadline=time.monotonic() + 5, **common).round for _ in range(3)]

    assert rounds == [1, 2, 3]


def test_a_rank_0_of_an_older_start_leaves_the_others_to_the_newer_one() -> None:
    board = HashStore()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(_call, board, rank, 3, identity=of(1)) for rank in (0, 1)]
        wait_for(lambda: board.check(["present/1/1"]))
        late = str(_call(board, 0, 3, identity=of(0)))
        waiting.append(pool.submit(_call, board, 2, 3, identity=of(1)))
        placements = [call.result() for call in waiting]

    assert "is left over from an older start of this job, which rank 0 (process " in late
    assert placements == [RankPlacement(0, 3, 0, 1), RankPlacement(1, 3, 0, 1), RankPlacement(2, 3, 0, 1)]


def test_a_waiting_rank_0_gives_way_to_one_that_was_started_after_it() -> None:
    board = HashStore()
    with ThreadPoolExecutor(3) as pool:
        old = pool.submit(_call, board, 0, 3, identity=of(0))
        one = pool.submit(_call, board, 1, 3, identity=of(1))
        old_ended = old.result()
        new = [pool.submit(_call, board, 0, 3, identity=of(1))]
        two = _call(board, 2, 3, identity=of(1))
        found = [old_ended, new[0].result(), one.result()]

    assert "is left over from an older start" in str(found[0])
    assert [found[1], found[2], two] == [RankPlacement(rank, 3, 0, 1) for rank in range(3)]


def test_a_process_that_arrives_after_the_others_have_met_gets_a_hint() -> None:
    board = HashStore()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(_call, board, rank, 2, identity=of()) for rank in range(2)]
        assert all(isinstance(call.result(), RankPlacement) for call in calls)

    late = str(_call(board, 1, 2, identity=of(), timeout_s=0.1))

    assert "has started without this process: is it left over from an older start?" in late


# ---------------------------------------------------------------- sockets


def test_the_masters_socket_is_on_its_own_address_and_a_taken_port_is_named() -> None:
    with network.listen_as_master("127.0.0.1", 0, serves_other_nodes=False) as listener:
        address, port = listener.getsockname()[:2]
        with pytest.raises(TopologyError, match=rf"Port {port} on 127\.0\.0\.1 is in use"):
            network.listen("127.0.0.1", port)

    assert address == "127.0.0.1"


def test_a_master_that_other_nodes_must_reach_does_not_hide_behind_loopback() -> None:
    with network.listen_as_master("127.0.1.1", 0, serves_other_nodes=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_master_name_that_does_not_resolve_is_named() -> None:
    with pytest.raises(TopologyError, match=r"MASTER_ADDR=no-such-host\.invalid does not resolve"):
        network.listen_as_master("no-such-host.invalid", 1, serves_other_nodes=True)


def test_a_master_that_never_answers_is_named_with_its_address_and_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody can answer there
        port = taken.getsockname()[1]
        with pytest.raises(TopologyError, match=rf"Rank 1 .* found no master at 127\.0\.0\.1:{port} within 0\.2 s"):
            network.wait_for_master("127.0.0.1", port, rank=1, deadline=time.monotonic() + 0.2, timeout_s=0.2)

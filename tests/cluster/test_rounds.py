"""Which hosts take part in each start of a job: the state machine alone, with events and times made here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from dtrain.cluster.job_outcome import HostResult
from dtrain.cluster.round_watch import RoundWatch
from dtrain.cluster.rounds import (
    IMPORT_TIMEOUT_S,
    KILL_TIMEOUT_S,
    LOST_AFTER_S,
    SETTLE_AFTER_LOSS_S,
    SETTLE_S,
    Order,
    RoundHost,
    RoundPlan,
    Rounds,
)

NODES = [RoundHost("node1", "10.0.0.1", 2), RoundHost("node2", "10.0.0.2", 1)]
SPARE = RoundHost("node3", "10.0.0.3", 4, is_spare=True)
SMALL = RoundHost("node4", "10.0.0.4", 1, is_spare=True)


def rounds_of(*hosts: RoundHost, max_restarts: int = 1) -> Rounds:
    return Rounds(RoundPlan(hosts or NODES, 0, max_restarts))


def started(rounds: Rounds, port: int = 29500) -> dict[int, dict[str, Any]]:
    """Lets the first host open its socket, and returns the order to start of each host."""
    orders = rounds.take(next(iter(rounds.members)), {"listening": port}, 0.0)
    return {index: order["start"] for index, order in orders}


def ended(
    rounds: Rounds, index: int, code: int, *, restart: int = 0, now: float = 1.0, failure: str = ""
) -> list[Order]:
    return rounds.take(index, {"ended": restart, "code": code, "failure": failure}, now)


def test_the_first_host_opens_the_socket_and_all_hosts_start_their_ranks() -> None:
    rounds = rounds_of(*NODES, SPARE)
    assert rounds.begin() == [(0, {"listen": {"address": "10.0.0.1", "port": 0}})]
    orders = started(rounds)
    assert list(orders) == [0, 1]
    places = [(each["ranks"], each["first_rank"], each["world_size"], each["node_rank"]) for each in orders.values()]
    assert places == [(2, 0, 3, 0), (1, 2, 3, 1)]
    assert {(each["address"], each["port"], each["restart"]) for each in orders.values()} == {("10.0.0.1", 29500, 0)}
    assert not started(rounds), "a second report of a port starts nothing"
    assert ended(rounds, 0, 0) == []
    assert ended(rounds, 1, 0) == [(index, {"finish": True}) for index in range(3)]
    assert rounds.is_final
    assert not rounds.notes


def test_a_spare_host_takes_the_place_and_the_ranks_of_a_lost_one() -> None:
    rounds = rounds_of(*NODES, SMALL, SPARE)
    rounds.begin()
    started(rounds)
    rounds.take(0, {"ready": "host-1"}, 0.0)
    assert rounds.lose(0, "node1: no answer.", 5.0, left_trace=False) == []
    assert rounds.tick(5.0) == []
    assert rounds.deadline == 5.0 + SETTLE_AFTER_LOSS_S
    assert rounds.tick(rounds.deadline) == [(1, {"stop": 0})]
    assert ended(rounds, 1, 4) == [(3, {"listen": {"address": "10.0.0.3", "port": 0}})]  # node4 has too few slots
    orders = started(rounds)
    assert [(index, each["ranks"], each["node_rank"], each["restart"]) for index, each in orders.items()] == [
        (3, 2, 0, 1),
        (1, 1, 1, 1),
    ]
    assert all(each["lost_hosts"] == ["host-1"] and each["world_size"] == 3 for each in orders.values())
    assert rounds.notes == ["node1: no answer. The job starts again with 3 ranks on node3, node2: restart 1 of 1."]


@pytest.mark.parametrize(("spares", "world_size"), [([], 2), ([SMALL], 3)])
def test_without_a_fitting_spare_host_the_job_goes_on_smaller(spares: list[RoundHost], world_size: int) -> None:
    hosts = [NODES[1], RoundHost("big", "10.0.0.9", 2), RoundHost("other", "10.0.0.8", 1), *spares]
    rounds = rounds_of(*hosts)
    rounds.begin()
    started(rounds)
    rounds.lose(1, "big: lost.", 1.0, left_trace=True)
    ended(rounds, 0, 4)
    ended(rounds, 2, 75)  # saved, because a launcher has died: the job goes on nevertheless
    orders = started(rounds)
    assert {each["world_size"] for each in orders.values()} == {world_size}
    assert f"with {world_size} instead of 4 ranks" in rounds.notes[0]


def test_after_a_killed_rank_the_same_hosts_start_again() -> None:
    rounds = rounds_of(*NODES, SPARE)
    rounds.begin()
    started(rounds)
    ended(rounds, 1, 4, failure="Rank 2 (process 7) was killed by SIGKILL.", now=3.0)
    assert rounds.deadline == 3.0 + SETTLE_S
    ended(rounds, 0, 4, failure="Rank 0 (process 5) ended with code 4.")
    assert list(started(rounds)) == [0, 1]
    assert rounds.notes[0].startswith(
        "node2: Rank 2 (process 7) was killed by SIGKILL. The job starts again with 3 ranks"
    )


@pytest.mark.parametrize(
    ("codes", "lost"), [((0, 0), []), ((75, 75), []), ((2, 4), []), ((6, 4), []), ((3,), [1]), ((0,), [1])]
)
def test_what_ends_the_job_although_it_could_start_again(codes: tuple[int, ...], lost: list[int]) -> None:
    rounds = rounds_of(*NODES, SPARE)
    rounds.begin()
    started(rounds)
    for index in lost:
        rounds.lose(index, "node2: lost.", 1.0, left_trace=True)
    for index, code in enumerate(codes):
        ended(rounds, index, code)
    assert rounds.is_final
    assert rounds.members == ({0: 2} if codes == (0,) else {0: 2, 1: 1}), "a host lost after the end does not count"


def test_the_number_of_restarts_is_a_limit_and_reports_of_earlier_starts_do_not_count() -> None:
    rounds = rounds_of()
    rounds.begin()
    started(rounds)
    ended(rounds, 0, 4)
    ended(rounds, 1, 4)
    started(rounds)
    assert not rounds.can_lose_hosts
    assert ended(rounds, 0, 4, restart=0) == []
    # Without a restart left the launchers end as soon as their ranks have, and nobody waits here for a host that is cut off.
    assert ended(rounds, 0, 4, restart=1) == [(0, {"finish": True}), (1, {"finish": True})]
    assert rounds.is_final
    assert ended(rounds, 1, 4, restart=1) == []
    assert rounds.end_order == [0, 1]


@pytest.mark.parametrize("code", [0, 75, 4])
def test_without_restarts_the_first_end_is_final_so_that_a_silent_host_is_not_waited_for(code: int) -> None:
    rounds = rounds_of(max_restarts=0)
    rounds.begin()
    started(rounds)
    ended(rounds, 0, code)
    assert rounds.is_final
    assert rounds.deadline == math.inf
    rounds = rounds_of(max_restarts=0)
    rounds.begin()
    started(rounds)
    rounds.lose(1, "node2: lost.", 1.0, left_trace=True)
    assert rounds.is_final


def test_a_launcher_that_does_not_end_its_ranks_is_given_up() -> None:
    rounds = rounds_of(*NODES, SPARE)
    rounds.begin()
    rounds.take(1, {"ready": "host-2"}, 0.0)
    started(rounds)
    ended(rounds, 0, 4, now=0.0)
    assert rounds.tick(SETTLE_S) == [(1, {"stop": 0})]
    assert rounds.tick(SETTLE_S + KILL_TIMEOUT_S) == [(0, {"listen": {"address": "10.0.0.1", "port": 0}})]
    assert list(rounds.members) == [0, 2]
    assert [index for index, _ in rounds.given_up] == [1]


def test_a_launcher_that_still_imports_is_waited_for_and_not_given_up() -> None:
    rounds = rounds_of(*NODES, RoundHost("node3", "10.0.0.3", 1))
    rounds.begin()
    rounds.tick(0.0)
    rounds.lose(1, "node2: lost.", 1.0, left_trace=False)
    assert rounds.tick(2.0) == [(0, {"stop": 0}), (2, {"stop": 0})]
    assert rounds.tick(2.0 + KILL_TIMEOUT_S) == []
    for index in (0, 2):
        rounds.take(index, {"ready": "host"}, 20.0)
    assert not started(rounds), "what it was told before the order to stop is over"
    assert ended(rounds, 0, 4, now=20.0) == []
    assert ended(rounds, 2, 4, now=20.0) == [(0, {"listen": {"address": "10.0.0.1", "port": 0}})]
    assert list(started(rounds)) == [0, 2]


def test_imports_have_a_time_limit_and_are_not_waited_for_once_the_job_has_ended() -> None:
    rounds = rounds_of()
    rounds.begin()
    assert rounds.tick(0.0) == []
    assert rounds.tick(IMPORT_TIMEOUT_S) == []
    rounds.tick(IMPORT_TIMEOUT_S + 1)
    assert rounds.given_up[0][0] == 0
    assert "node1: its launcher has not begun to work" in rounds.given_up[0][1]
    rounds = rounds_of()
    rounds.begin()
    rounds.tick(0.0)
    started(rounds)
    assert ended(rounds, 0, 2, now=0.0) == [(0, {"finish": True}), (1, {"finish": True})]  # a wrong setting
    assert rounds.is_final


def test_a_lost_spare_host_is_named_and_never_used() -> None:
    rounds = rounds_of(*NODES, SPARE)
    rounds.begin()
    started(rounds)
    assert rounds.lose(2, "node3: lost.", 0.0, left_trace=False) == []
    assert rounds.deadline == math.inf
    assert rounds.notes == ["node3: lost. It was a spare host, so the job goes on."]
    rounds.lose(1, "node2: lost.", 0.0, left_trace=False)
    ended(rounds, 0, 4)
    assert list(rounds.members) == [0]


def test_a_stopped_job_does_not_start_again() -> None:
    rounds = rounds_of()
    rounds.begin()
    started(rounds)
    assert [index for index, _ in rounds.stop()] == [0, 1]
    assert ended(rounds, 0, 1) == []
    assert rounds.lose(1, "node2: lost.", 0.0, left_trace=True) == []
    assert rounds.stop() == []
    assert rounds.notes == []
    assert rounds.deadline == math.inf, "else the coordinator would not sleep any more"


def test_a_stopped_job_does_not_say_that_it_starts_again() -> None:
    rounds = rounds_of()
    rounds.begin()
    started(rounds)
    rounds.stop()
    assert ended(rounds, 0, 1) == ended(rounds, 1, 1) == []
    assert rounds.notes == []
    assert rounds.end_order == [0, 1]


def test_no_ranks_start_while_a_host_is_lost() -> None:
    rounds = rounds_of(*NODES, SPARE)
    rounds.begin()
    rounds.lose(1, "node2: lost.", 0.0, left_trace=True)
    assert not started(rounds)


class FakeConnection:
    """A host whose last answer is at a time of the test's choice."""

    def __init__(self, index: int, host: str, last_message_s: float) -> None:
        self.index, self.host, self.last_message_s, self.sent = index, host, last_message_s, list[Any]()
        self.is_local = False

    def send(self, order: Any) -> None:
        self.sent.append(order)


def watched(
    now: float, *silences: float, hosts: Sequence[RoundHost] = NODES, max_restarts: int = 1
) -> tuple[RoundWatch, list[FakeConnection]]:
    connections = [
        FakeConnection(index, host.name, now - silence)
        for index, (host, silence) in enumerate(zip(hosts, silences, strict=True))
    ]
    watch = RoundWatch(connections, RoundPlan(hosts, 0, max_restarts))
    watch._last_look = now - 0.5
    return watch, connections


def test_a_silent_host_is_given_up_and_told_to_end_while_another_answers() -> None:
    watch, connections = watched(1000.0, 0.1, LOST_AFTER_S + 0.1)
    results = watch.look(connections, 1000.0)
    assert [result.host for result in results] == ["node2"]
    assert connections[1].sent == [{"kill": True}]


def test_no_host_is_given_up_if_none_answers_or_this_process_was_stopped_itself() -> None:
    watch, connections = watched(1000.0, 9.0, 9.0)
    assert watch.look(connections, 1000.0) == []
    watch, connections = watched(1000.0, 60.0, 60.1)
    connections[0].last_message_s = 1000.0  # the first answer after the pause
    watch._last_look = 940.0
    assert watch.look(connections, 1000.0) == []


def test_waiting_for_a_ping_is_no_pause_so_that_silence_is_noticed_without_restarts_too() -> None:
    watch, connections = watched(1000.0, 0.1, 20.0)
    watch.rounds.stop()
    for now in (1003.0, 1006.0, 1009.0):
        watch.look(connections, now)
    assert connections[1].last_message_s == 980.0


def test_this_machine_itself_does_not_show_that_its_network_works() -> None:
    watch, connections = watched(1000.0, 0.1, 9.0, 9.0, hosts=[*NODES, SPARE])
    connections[0].is_local = True
    assert watch.look(connections, 1000.0) == []
    assert [each.host for each in watch.look(connections[:2], 1000.0)] == ["node2"], "the only other one"


def test_results_are_those_of_the_last_start_in_the_order_of_its_ends() -> None:
    watch, _ = watched(1000.0, 0.0, 0.0)
    started(watch.rounds)
    watch.take_report(1, {"ended": 0, "code": 2, "failure": "x"}, 1000.0)
    watch.take_report(0, {"ended": 0, "code": 4, "failure": "y"}, 1000.0)
    results = [HostResult("node1", 4), HostResult("node2", 2), HostResult("a spare", 0)]
    assert [result.host for result in watch.of_last_round(results)] == ["node2", "node1"]


def test_a_launcher_that_ends_by_itself_before_its_ranks_start_ends_the_job() -> None:
    watch, connections = watched(1000.0, 0.0, 0.0)
    watch.take_end(1, HostResult("node2", 2), 1000.0)
    assert watch.rounds.is_final
    assert connections[0].sent[-1] == {"order": {"finish": True}}


def test_a_launcher_that_follows_no_orders_is_told_to_end_and_not_waited_for() -> None:
    watch, connections = watched(1000.0, 0.0, 0.0)
    for index in (0, 1):
        watch.take_report(index, {"ready": "host"}, 1000.0)
    started(watch.rounds)
    watch.take_report(0, {"ended": 0, "code": 4, "failure": "x"}, 1000.0)
    assert watch.look([], 1000.0 + SETTLE_S) == []
    results = watch.look([], 1000.0 + SETTLE_S + KILL_TIMEOUT_S)
    assert [(each.host, each.lost) for each in results] == [("node2", "node2: its launcher does not end its ranks.")]
    assert connections[1].sent[-1] == {"kill": True}


@pytest.mark.parametrize("code", [0, 1, 2, -9])
def test_a_spare_host_whose_launcher_ends_does_not_end_the_job(code: int) -> None:
    watch, connections = watched(1000.0, 0.0, 0.0, 0.0, hosts=[*NODES, SPARE])
    started(watch.rounds)
    before = len(connections[0].sent)
    watch.take_end(2, HostResult("node3", code), 1000.0)
    assert not watch.rounds.is_final
    assert len(connections[0].sent) == before
    assert watch.of_last_round([HostResult("node3", code)]) == []

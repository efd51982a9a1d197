"""The doctor's judgement of what is between hosts, by planted answers and rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dtrain.cluster.doctor import link_checks
from dtrain.cluster.doctor.findings import OK, RED, WARN, folded
from dtrain.cluster.doctor.host_checks import Answer
from dtrain.cluster.doctor.network_checks import meeting_place, of_folder, of_ports, of_ways
from tests.support.doctor_answers import answered, bad_of


def _seeing(*addresses: str | None) -> list[Answer]:
    """Hosts of which the second and following ones find these addresses for the first."""
    others = [answered(f"node{at}", addresses={"node1": seen}) for at, seen in enumerate(addresses, 2)]
    return [answered("node1", addresses={"node1": "127.0.1.1"}), *others]


def test_ranks_meet_where_the_others_see_the_first_host() -> None:
    place, found = meeting_place(_seeing("10.0.0.1", "10.0.0.1"))

    assert place == "10.0.0.1"
    assert [(row.state, row.hosts) for row in found] == [(OK, ("node2", "node3"))]


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ("127.0.0.1", "node1, where the ranks meet, is 127.0.0.1 there, which is node2 itself"),
        (None, "node1, where the ranks meet, does not resolve there"),
        ("10.9.9.9", "is 10.9.9.9 there, but 10.0.0.1 on others"),
    ],
)
def test_a_host_that_finds_the_first_one_elsewhere_is_red(seen: str | None, found: str) -> None:
    place, findings = meeting_place(_seeing(seen, "10.0.0.1", "10.0.0.1"))

    (bad,) = bad_of(findings)
    assert place == "10.0.0.1"
    assert (bad.state, bad.hosts) == (RED, ("node2",))
    assert found in bad.found
    assert "/etc/hosts on node2" in bad.fix
    assert meeting_place(_seeing("127.0.0.1"))[0] is None


def _way(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "problem": "",
        "address": f"10.0.0.{number}",
        "interface": "eth0",
        "mtu": 9000,
        "speed_mbit": 1000,
        "network": "10.0.0.0/24",
        "is_line": True,
        "port": 40000 + number,
        **changes,
    }


WAYS = {f"node{number}": _way(number) for number in (1, 2, 3)}


def test_hosts_that_reach_the_master_alike_fold_into_one_row() -> None:
    (row,) = folded(of_ways(WAYS, "10.0.0.1"))

    assert (row.state, row.hosts) == (OK, ("node1", "node2", "node3"))
    assert row.found == "eth0 in 10.0.0.0/24, MTU 9000, 1000 Mbit/s"


@pytest.mark.parametrize(
    ("way", "check", "state", "found", "fix"),
    [
        ({"problem": "Network is unreachable"}, "route", RED, "no way to 10.0.0.1: Network is unreachable", "address"),
        ({"network": "172.17.0.0/16"}, "networks", WARN, "172.17.0.0/16, but 10.0.0.0/24 on most", "one network"),
        ({"mtu": 1500}, "MTU", WARN, "1500, but 9000 on most", "ip link set dev eth0 mtu 9000"),
        ({"speed_mbit": 100}, "line rate", WARN, "100, but 1000 on most", "ethtool eth0"),
        ({"speed_mbit": None}, "line rate", WARN, "not told, but 1000 on most", "ethtool eth0"),
        ({"mtu": 1500, "interface": None}, "MTU", WARN, "1500, but 9000 on most", "dev its interface mtu 9000"),
    ],
)
def test_a_host_with_another_way_to_the_master_is_named(way: Any, check: str, state: str, found: str, fix: str) -> None:
    (bad,) = bad_of(of_ways({**WAYS, "node2": _way(2, **way)}, "10.0.0.1"))

    assert (bad.check, bad.state, bad.hosts, bad.found) == (check, state, ("node2",), found)
    assert fix in bad.fix


def test_what_most_hosts_do_not_tell_is_no_measure() -> None:
    (bad,) = bad_of(
        of_ways({**WAYS, **{f"node{k}": _way(k, mtu=None) for k in (2, 3, 4)}, "node5": _way(5)}, "10.0.0.1")
    )[:1]

    assert (bad.hosts, bad.found) == (("node2",), "not told, but 9000 on others")
    assert "mtu 9000" in bad.fix


def test_a_meeting_place_that_is_not_the_first_hosts_own_is_a_warning() -> None:
    (bad,) = bad_of(of_ways(WAYS, "192.168.7.7"))

    assert (bad.check, bad.state, bad.hosts) == ("route", WARN, ("node1",))


def _reached(**broken: str) -> dict[str, dict[str, str]]:
    """Who reaches whom; node2_node3="..." for a way that is closed."""
    hosts = list(WAYS)
    return {one: {to: broken.get(f"{one}_{to}", "") for to in hosts if to != one} for one in hosts}


def test_open_ports_are_one_row() -> None:
    (row,) = of_ports(_reached(), WAYS)

    assert (row.state, row.hosts, row.found) == (OK, ("node1", "node2", "node3"), "open both ways")


def test_a_port_that_is_closed_one_way_names_both_hosts_and_the_way() -> None:
    clean, bad = of_ports(_reached(node2_node3="no answer within 5 s"), WAYS)

    assert clean.hosts == ("node1",)
    assert (bad.state, bad.hosts) == (RED, ("node2",))
    assert bad.found == "does not reach node3 at 10.0.0.3: no answer within 5 s; the other way is open"
    assert "-s 10.0.0.0/24 -j ACCEPT on node3" in bad.fix
    both = bad_of(of_ports(_reached(node2_node3="refused", node3_node2="refused"), WAYS))
    assert [row.found.endswith("the other way, too") for row in both] == [True, True]


def test_a_host_that_nobody_reaches_is_one_row() -> None:
    found = of_ports(_reached(node1_node3="refused", node2_node3="refused"), WAYS)

    (bad,) = bad_of(found)
    assert (bad.hosts, bad.found) == (("node3",), "no other host reaches it: refused")
    two = {host: WAYS[host] for host in ("node1", "node2")}
    (bad,) = bad_of(of_ports({"node1": {"node2": "refused"}, "node2": {"node1": ""}}, two))
    assert (bad.hosts, bad.found) == (("node1",), "does not reach node2 at 10.0.0.2: refused; the other way is open")


@pytest.mark.parametrize(
    ("sees", "state", "hosts", "found"),
    [
        ({"node2": True, "node3": True}, OK, ("node1", "node2", "node3"), "/w/runs is shared"),
        ({"node2": False, "node3": False}, OK, ("node1", "node2", "node3"), "2 of them keep every checkpoint"),
        ({"node2": True, "node3": False}, WARN, ("node3",), "is not the one of node1, node2"),
    ],
)
def test_a_folder_that_is_shared_or_not_is_told(
    sees: Mapping[str, bool], state: str, hosts: tuple[str, ...], found: str
) -> None:
    (row,) = of_folder({"path": "/w/runs/.mark"}, {host: {"is_there": each} for host, each in sees.items()}, "node1", 2)

    assert (row.state, row.hosts) == (state, hosts)
    assert found in row.found


def test_a_folder_that_cannot_be_looked_at_is_a_warning() -> None:
    seen = {"node2": {"problem": "Permission denied"}, "node3": {"is_there": True}}

    (blind,) = bad_of(of_folder({"path": "/w/runs/.mark"}, seen, "node1", 2))
    (unmarked,) = of_folder({"problem": "/w: Read-only file system"}, {}, "node1", 2)

    assert (blind.state, blind.hosts, blind.found) == (WARN, ("node2",), "it cannot be looked at: Permission denied")
    assert (unmarked.check, unmarked.state, unmarked.hosts) == ("shared folder", WARN, ("node1",))
    assert "/w: Read-only file system" in unmarked.found


# Rates


def _measured(rates: Mapping[tuple[int, int], float], *, backend: str = "gloo") -> dict[str, Any]:
    """rates: bits per second of each pair of hosts, by their numbers."""
    hosts = sorted({f"node{number}" for pair in rates for number in pair})
    pairs = [
        {
            "hosts": [f"node{one}", f"node{two}"],
            "latency_s": 0.01,
            "bandwidth": bits / 8,
        }
        for (one, two), bits in rates.items()
    ]
    every = {"latency_s": 0.02, "bandwidth": min(rates.values()) / 8}
    return {"hosts": hosts, "ranks": len(hosts), "backend": backend, "pairs": pairs, "all": every}


def test_links_at_line_rate_are_green() -> None:
    found = link_checks.of_links(_measured({(1, 2): 950e6, (1, 3): 940e6, (2, 3): 960e6}), WAYS)

    assert bad_of(found) == []
    assert [row.found for row in found] == [
        "3 ranks by gloo: 940 Mbit/s, 20 ms",
        "950 Mbit/s, 10 ms",
        "940 Mbit/s, 10 ms",
        "960 Mbit/s, 10 ms",
    ]
    five = {(one, two): 1e6 * (930 + 10 * one + two) for one in range(1, 6) for two in range(one + 1, 6)}
    ways = {f"node{number}": _way(number) for number in range(1, 6)}
    many = link_checks.of_links(_measured(five), ways)
    assert [row.found for row in many][1:] == ["10 of them: 942 Mbit/s (node1 - node2) to 975 Mbit/s (node4 - node5)"]


def test_a_slow_host_is_named_though_it_is_in_most_pairs() -> None:
    (bad,) = bad_of(link_checks.of_links(_measured({(1, 2): 90e6, (1, 3): 950e6, (2, 3): 95e6}), WAYS))

    assert (bad.check, bad.state, bad.hosts) == ("bandwidth", RED, ("node2",))
    assert bad.found == "95 Mbit/s at best with any other, but 950 Mbit/s is usual"
    assert "ethtool eth0" in bad.fix
    assert "--exclude node2" in bad.fix


def test_a_slow_link_between_two_good_hosts_is_named() -> None:
    (bad,) = bad_of(link_checks.of_links(_measured({(1, 2): 950e6, (1, 3): 950e6, (2, 3): 400e6}), WAYS))

    assert (bad.state, bad.hosts) == (RED, ("node2", "node3"))
    assert "400 Mbit/s between them" in bad.found


def test_a_link_at_a_fraction_of_its_line_rate_is_red_where_the_rate_is_a_lines() -> None:
    ten = {host: {**way, "speed_mbit": 10_000} for host, way in WAYS.items()}
    given = {host: {**way, "is_line": False} for host, way in ten.items()}

    (bad,) = bad_of(link_checks.of_links(_measured({(1, 2): 100e6}), ten))
    (virtual,) = bad_of(link_checks.of_links(_measured({(1, 2): 100e6}), given))

    assert (bad.state, bad.found) == (RED, "100 Mbit/s, 1% of the line's 10 Gbit/s")
    assert "ethtool" in bad.fix
    assert virtual.state == WARN


def test_gloos_own_limit_is_not_told_as_the_lines() -> None:
    fast = {host: {**way, "speed_mbit": 100_000} for host, way in WAYS.items()}

    (bad,) = bad_of(link_checks.of_links(_measured({(1, 2): 5e9}), fast))

    assert (bad.state, bad.found) == (WARN, "5 Gbit/s, though gloo reaches 10 Gbit/s on a line of 100 Gbit/s")


def test_rates_by_nccl_are_not_compared_and_that_is_told() -> None:
    found = link_checks.of_links(_measured({(1, 2): 500e6}, backend="nccl"), WAYS)

    assert [(row.state, row.found.partition(":")[0]) for row in found if row.check == "line rate"] == [
        (OK, "not compared with what was measured")
    ]


def test_a_link_far_below_its_line_rate_is_a_warning() -> None:
    (bad,) = bad_of(link_checks.of_links(_measured({(1, 2): 500e6}), WAYS))

    assert (bad.state, bad.hosts) == (WARN, ("node1", "node2"))
    assert bad.found == "500 Mbit/s, 50% of the line's 1 Gbit/s"
    unknown = {host: {**way, "speed_mbit": None} for host, way in WAYS.items()}
    assert bad_of(link_checks.of_links(_measured({(1, 2): 500e6}), unknown)) == []
    fast = {host: {**way, "speed_mbit": 100_000} for host, way in WAYS.items()}
    assert bad_of(link_checks.of_links(_measured({(1, 2): 9e9}), fast)) == []  # gloo's own limit
    assert bad_of(link_checks.of_links(_measured({(1, 2): 500e6}, backend="nccl"), WAYS)) == []


@pytest.mark.parametrize(("count", "pairs"), [(1, 0), (2, 1), (3, 3), (8, 28), (9, 9), (64, 64)])
def test_all_pairs_are_measured_up_to_eight_hosts_and_the_ring_beyond(count: int, pairs: int) -> None:
    found = link_checks.pairs_of(count)

    assert len({frozenset(pair) for pair in found}) == pairs
    assert all(one != other for one, other in found)
    assert {number for pair in found for number in pair} == (set(range(count)) if count > 1 else set())


def test_a_switch_that_all_share_and_saturate_is_a_warning() -> None:
    measured = _measured({(1, 2): 950e6, (1, 3): 950e6, (2, 3): 950e6})
    measured["all"]["bandwidth"] = 300e6 / 8

    (bad,) = bad_of(link_checks.of_links(measured, WAYS))

    assert (bad.state, bad.hosts) == (WARN, ("node1", "node2", "node3"))
    assert bad.found == "300 Mbit/s among all at once, but 950 Mbit/s or more between any two"


def test_advice_follows_from_what_an_exchange_takes() -> None:
    # 2 ranks send 440 MB each way: 3.52 s at 1 Gbit/s, and 20 ms
    slow = link_checks.advice(_measured({(1, 2): 1e9}))
    fast = link_checks.advice(_measured({(1, 2): 100e9}))

    assert "takes 3.5 s here: engine.gradient_wire=bf16 makes it 1.8 s" in slow
    assert fast.endswith("nothing to set for it.")
    assert link_checks.exchange_s(1e9, 1, latency_s=1.0, bandwidth=1.0) == 0.0

"""The doctor's checks of the network between hosts, with constructed answers and rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dtrain.cluster.doctor import link_checks
from dtrain.cluster.doctor.findings import OK, RED, WARN, Finding, merge_findings
from dtrain.cluster.doctor.host_checks import HostReport
from dtrain.cluster.doctor.network_checks import check_ports, check_routes, check_shared_folder, find_master
from tests.support.doctor_reports import healthy, not_ok


def _reports(*addresses: str | None) -> list[HostReport]:
    """Returns the reports of hosts; the second and following ones resolve the first one's name to these addresses."""
    others = [healthy(f"node{at}", addresses={"node1": address}) for at, address in enumerate(addresses, 2)]
    return [healthy("node1", addresses={"node1": "127.0.1.1"}), *others]


def test_the_master_has_the_address_that_the_others_see() -> None:
    master, found = find_master(_reports("10.0.0.1", "10.0.0.1"))

    assert master == "10.0.0.1"
    assert [(row.state, row.hosts) for row in found] == [(OK, ("node2", "node3"))]


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1", "the master's name node1 resolves to 127.0.0.1 there, which is node2 itself"),
        (None, "the master's name node1 does not resolve there"),
        ("10.9.9.9", "resolves to 10.9.9.9 there, but to 10.0.0.1 on others"),
    ],
)
def test_a_host_that_resolves_the_master_to_another_address_is_red(address: str | None, found: str) -> None:
    master, findings = find_master(_reports(address, "10.0.0.1", "10.0.0.1"))

    (bad,) = not_ok(findings)
    assert master == "10.0.0.1"
    assert (bad.state, bad.hosts) == (RED, ("node2",))
    assert found in bad.found
    assert "/etc/hosts on node2" in bad.fix
    assert find_master(_reports("127.0.0.1"))[0] is None


def _route(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "problem": "",
        "address": f"10.0.0.{number}",
        "interface": "eth0",
        "mtu": 9000,
        "speed_mbit": 1000,
        "network": "10.0.0.0/24",
        "is_physical": True,
        "port": 40000 + number,
        **changes,
    }


ROUTES = {f"node{number}": _route(number) for number in (1, 2, 3)}


def test_hosts_with_equal_routes_are_one_row() -> None:
    (row,) = merge_findings(check_routes(ROUTES, "10.0.0.1"))

    assert (row.state, row.hosts) == (OK, ("node1", "node2", "node3"))
    assert row.found == "eth0 in 10.0.0.0/24, MTU 9000, 1000 Mbit/s"


@pytest.mark.parametrize(
    ("route", "check", "state", "found", "fix"),
    [
        (
            {"problem": "Network is unreachable"},
            "route",
            RED,
            "no route to 10.0.0.1: Network is unreachable",
            "address",
        ),
        ({"network": "172.17.0.0/16"}, "networks", WARN, "172.17.0.0/16, but 10.0.0.0/24 on most", "one network"),
        ({"mtu": 1500}, "MTU", WARN, "1500, but 9000 on most", "ip link set dev eth0 mtu 9000"),
        ({"speed_mbit": 100}, "line rate", WARN, "100, but 1000 on most", "ethtool eth0"),
        ({"speed_mbit": None}, "line rate", WARN, "unknown, but 1000 on most", "ethtool eth0"),
        ({"mtu": 1500, "interface": None}, "MTU", WARN, "1500, but 9000 on most", "dev its interface mtu 9000"),
    ],
)
def test_a_host_with_another_route_to_the_master_is_reported(
    route: Any, check: str, state: str, found: str, fix: str
) -> None:
    (bad,) = not_ok(check_routes({**ROUTES, "node2": _route(2, **route)}, "10.0.0.1"))

    assert (bad.check, bad.state, bad.hosts, bad.found) == (check, state, ("node2",), found)
    assert fix in bad.fix


def test_an_unknown_value_is_never_the_common_one() -> None:
    (bad,) = not_ok(
        check_routes({**ROUTES, **{f"node{k}": _route(k, mtu=None) for k in (2, 3, 4)}, "node5": _route(5)}, "10.0.0.1")
    )[:1]

    assert (bad.hosts, bad.found) == (("node2",), "unknown, but 9000 on others")
    assert "mtu 9000" in bad.fix


def test_a_master_address_that_is_not_the_first_hosts_own_is_a_warning() -> None:
    (bad,) = not_ok(check_routes(ROUTES, "192.168.7.7"))

    assert (bad.check, bad.state, bad.hosts) == ("route", WARN, ("node1",))


def _problems(**broken: str) -> dict[str, dict[str, str]]:
    """Returns the argument of check_ports; node2_node3="..." if node2 does not reach node3."""
    hosts = list(ROUTES)
    return {one: {to: broken.get(f"{one}_{to}", "") for to in hosts if to != one} for one in hosts}


def test_open_ports_are_one_row() -> None:
    (row,) = check_ports(_problems(), ROUTES)

    assert (row.state, row.hosts, row.found) == (OK, ("node1", "node2", "node3"), "open in both directions")


def test_a_port_that_is_closed_in_one_direction_is_reported_with_both_hosts() -> None:
    clean, bad = check_ports(_problems(node2_node3="no answer within 5 s"), ROUTES)

    assert clean.hosts == ("node1",)
    assert (bad.state, bad.hosts) == (RED, ("node2",))
    assert bad.found == "does not reach node3 at 10.0.0.3: no answer within 5 s; the reverse direction works"
    assert "-s 10.0.0.0/24 -j ACCEPT on node3" in bad.fix
    both = not_ok(check_ports(_problems(node2_node3="refused", node3_node2="refused"), ROUTES))
    assert [row.found.endswith("the reverse direction fails too") for row in both] == [True, True]


def test_a_host_that_no_other_reaches_is_one_row() -> None:
    found = check_ports(_problems(node1_node3="refused", node2_node3="refused"), ROUTES)

    (bad,) = not_ok(found)
    assert (bad.hosts, bad.found) == (("node3",), "no other host reaches it: refused")
    two = {host: ROUTES[host] for host in ("node1", "node2")}
    (bad,) = not_ok(check_ports({"node1": {"node2": "refused"}, "node2": {"node1": ""}}, two))
    assert (bad.hosts, bad.found) == (
        ("node1",),
        "does not reach node2 at 10.0.0.2: refused; the reverse direction works",
    )


@pytest.mark.parametrize(
    ("exists", "state", "hosts", "found"),
    [
        ({"node2": True, "node3": True}, OK, ("node1", "node2", "node3"), "/w/runs is shared"),
        ({"node2": False, "node3": False}, OK, ("node1", "node2", "node3"), "2 of them keep every checkpoint"),
        ({"node2": True, "node3": False}, WARN, ("node3",), "is not the same folder as on node1, node2"),
    ],
)
def test_a_shared_or_local_folder_is_reported(
    exists: Mapping[str, bool], state: str, hosts: tuple[str, ...], found: str
) -> None:
    (row,) = check_shared_folder(
        {"path": "/w/runs/.mark"}, {host: {"exists": each} for host, each in exists.items()}, "node1", 2
    )

    assert (row.state, row.hosts) == (state, hosts)
    assert found in row.found


def test_a_folder_that_cannot_be_accessed_is_a_warning() -> None:
    answers = {"node2": {"problem": "Permission denied"}, "node3": {"exists": True}}

    (unknown,) = not_ok(check_shared_folder({"path": "/w/runs/.mark"}, answers, "node1", 2))
    (unmarked,) = check_shared_folder({"problem": "/w: Read-only file system"}, {}, "node1", 2)

    assert (unknown.state, unknown.hosts, unknown.found) == (WARN, ("node2",), "cannot access it: Permission denied")
    assert (unmarked.check, unmarked.state, unmarked.hosts) == ("shared folder", WARN, ("node1",))
    assert "/w: Read-only file system" in unmarked.found


# Rates


def _measured(rates: Mapping[tuple[int, int], float], *, backend: str = "gloo") -> dict[str, Any]:
    """Returns a result of link_test.py.

    Args:
        rates: bits per second of each pair of hosts, by their numbers.
    """
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
    found = link_checks.check_links(_measured({(1, 2): 950e6, (1, 3): 940e6, (2, 3): 960e6}), ROUTES)

    assert not_ok(found) == []
    assert [row.found for row in found] == [
        "3 ranks by gloo: 940 Mbit/s, 20 ms",
        "950 Mbit/s, 10 ms",
        "940 Mbit/s, 10 ms",
        "960 Mbit/s, 10 ms",
    ]
    five = {(one, two): 1e6 * (930 + 10 * one + two) for one in range(1, 6) for two in range(one + 1, 6)}
    routes = {f"node{number}": _route(number) for number in range(1, 6)}
    many = link_checks.check_links(_measured(five), routes)
    assert [row.found for row in many][1:] == ["10 pairs: 942 Mbit/s (node1 - node2) to 975 Mbit/s (node4 - node5)"]


def test_a_slow_host_is_reported_even_if_it_is_in_most_pairs() -> None:
    (bad,) = not_ok(link_checks.check_links(_measured({(1, 2): 90e6, (1, 3): 950e6, (2, 3): 95e6}), ROUTES))

    assert (bad.check, bad.state, bad.hosts) == ("bandwidth", RED, ("node2",))
    assert bad.found == "95 Mbit/s with its fastest peer, but 950 Mbit/s is typical"
    assert "ethtool eth0" in bad.fix
    assert "--exclude node2" in bad.fix


def test_a_slow_link_between_two_good_hosts_is_reported() -> None:
    (bad,) = not_ok(link_checks.check_links(_measured({(1, 2): 950e6, (1, 3): 950e6, (2, 3): 400e6}), ROUTES))

    assert (bad.state, bad.hosts) == (RED, ("node2", "node3"))
    assert "400 Mbit/s between them" in bad.found


def test_a_link_at_a_fraction_of_its_line_rate_is_red_if_the_line_is_physical() -> None:
    ten = {host: {**route, "speed_mbit": 10_000} for host, route in ROUTES.items()}
    virtual_routes = {host: {**route, "is_physical": False} for host, route in ten.items()}

    (bad,) = not_ok(link_checks.check_links(_measured({(1, 2): 100e6}), ten))
    (virtual,) = not_ok(link_checks.check_links(_measured({(1, 2): 100e6}), virtual_routes))

    assert (bad.state, bad.found) == (RED, "100 Mbit/s, 1% of the line's 10 Gbit/s")
    assert "ethtool" in bad.fix
    assert virtual.state == WARN


def test_gloos_limit_is_not_reported_as_the_lines() -> None:
    fast = {host: {**route, "speed_mbit": 100_000} for host, route in ROUTES.items()}

    (bad,) = not_ok(link_checks.check_links(_measured({(1, 2): 5e9}), fast))

    assert (bad.state, bad.found) == (WARN, "5 Gbit/s, but gloo reaches 10 Gbit/s on a line of 100 Gbit/s")


def test_rates_by_nccl_are_not_compared_and_a_row_says_so() -> None:
    found = link_checks.check_links(_measured({(1, 2): 500e6}, backend="nccl"), ROUTES)

    assert [(row.state, row.found.partition(":")[0]) for row in found if row.check == "line rate"] == [
        (OK, "not compared with the measured rates")
    ]


def test_a_link_far_below_its_line_rate_is_a_warning() -> None:
    (bad,) = not_ok(link_checks.check_links(_measured({(1, 2): 500e6}), ROUTES))

    assert (bad.state, bad.hosts) == (WARN, ("node1", "node2"))
    assert bad.found == "500 Mbit/s, 50% of the line's 1 Gbit/s"
    unknown = {host: {**route, "speed_mbit": None} for host, route in ROUTES.items()}
    assert not_ok(link_checks.check_links(_measured({(1, 2): 500e6}), unknown)) == []
    fast = {host: {**route, "speed_mbit": 100_000} for host, route in ROUTES.items()}
    assert not_ok(link_checks.check_links(_measured({(1, 2): 9e9}), fast)) == []  # gloo's own limit
    assert not_ok(link_checks.check_links(_measured({(1, 2): 500e6}, backend="nccl"), ROUTES)) == []


@pytest.mark.parametrize(("count", "pairs"), [(1, 0), (2, 1), (3, 3), (8, 28), (9, 9), (64, 64)])
def test_all_pairs_are_measured_up_to_eight_hosts_and_the_ring_beyond(count: int, pairs: int) -> None:
    found = link_checks.host_pairs(count)

    assert len({frozenset(pair) for pair in found}) == pairs
    assert all(one != other for one, other in found)
    assert {number for pair in found for number in pair} == (set(range(count)) if count > 1 else set())


def test_a_saturated_shared_switch_is_a_warning() -> None:
    measured = _measured({(1, 2): 950e6, (1, 3): 950e6, (2, 3): 950e6})
    measured["all"]["bandwidth"] = 300e6 / 8

    (bad,) = not_ok(link_checks.check_links(measured, ROUTES))

    assert (bad.state, bad.hosts) == (WARN, ("node1", "node2", "node3"))
    assert bad.found == "300 Mbit/s among all hosts, but 950 Mbit/s or more between any two"


def test_the_advice_depends_on_the_duration_of_an_all_reduce() -> None:
    # 2 ranks send 440 MB each way: 3.52 s at 1 Gbit/s, and 20 ms
    slow = link_checks.recommend(_measured({(1, 2): 1e9}))
    fast = link_checks.recommend(_measured({(1, 2): 100e9}))

    assert "takes 3.5 s here: engine.gradient_wire=bf16 reduces it to 1.8 s" in slow
    assert fast.endswith("no settings needed.")
    assert link_checks.ring_all_reduce_s(1e9, 1, latency_s=1.0, bandwidth=1.0) == 0.0


def test_the_gain_of_bf16_is_a_finding_of_each_host_that_computes_on_its_cpu() -> None:
    measured = {"precision": [{"host": "node1", "fp32_s": 0.2, "bf16_s": 0.1, "found": "bf16 is 2.0x faster"}]}

    assert link_checks.check_precision(measured) == [Finding("precision", ("node1",), OK, "bf16 is 2.0x faster")]
    assert link_checks.check_precision({}) == []

"""Evaluates the network between hosts: names, routes, ports, the shared folder. Answers in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.cluster.doctor.findings import OK, RED, WARN, Finding, format_hosts
from dtrain.cluster.doctor.host_checks import HostReport

NAMES_FIX = "fix /etc/hosts on {host}, or use addresses in the hostfile"

PORTS_FIX = (
    "allow all TCP ports between the hosts, since ranks use random ones: iptables -I INPUT -s {network} -j ACCEPT on "
    "{host}, or the cloud's security group"
)


def find_master(good: Sequence[HostReport]) -> tuple[str | None, list[Finding]]:
    """Returns the master's address, as launch/ chooses it, and findings about the name of the master.

    Returns:
        The first host's address as most other hosts see it: None if no other host sees a usable one, 127.0.0.1 for a
        single host.
    """
    if len(good) < 2:
        return "127.0.0.1", []
    first, others = good[0], good[1:]
    addresses = {report.host: report.facts["addresses"].get(first.host) for report in others}
    usable = [address for address in addresses.values() if address is not None and not address.startswith("127.")]
    master = max(usable, key=usable.count) if usable else None
    findings = []
    for host, address in addresses.items():
        name = f"the master's name {first.host}"
        if address is None:
            found = f"{name} does not resolve there"
        elif address.startswith("127."):
            found = f"{name} resolves to {address} there, which is {host} itself"
        elif address != master:
            found = f"{name} resolves to {address} there, but to {master} on others"
        else:
            continue
        findings.append(Finding("names", (host,), RED, found, NAMES_FIX.format(host=host)))
    right = tuple(host for host in addresses if host not in {finding.hosts[0] for finding in findings})
    if right:
        findings.insert(0, Finding("names", right, OK, f"the master's name {first.host} resolves to {master}"))
    return master, findings


def check_routes(routes: Mapping[str, Mapping[str, Any]], master: str) -> list[Finding]:
    """Returns findings about each host's route to the master.

    Args:
        routes: by host, the answer of agent.open_listener; the first one is the master's own.
    """
    findings = [
        Finding(
            "route", (host,), RED, f"no route to {master}: {route['problem']}", "give it an address in that network"
        )
        for host, route in routes.items()
        if route.get("problem")
    ]
    good = {host: route for host, route in routes.items() if not route.get("problem")}
    if not good:
        return findings
    first, first_route = next(iter(good.items()))
    if first_route["address"] != master and next(iter(routes)) == first:
        found = f"{master} is not an address of the host itself (it has {first_route['address']}): NAT or a proxy in between?"
        findings.append(Finding("route", (first,), WARN, found, "use the host's own address in the hostfile"))
    findings = [*(Finding("route", (host,), OK, _format_route(route)) for host, route in good.items()), *findings]
    for check, key, fix in (
        ("networks", "network", "use one network for all hosts; if routing is intended, see the rates below"),
        ("MTU", "mtu", "use one MTU on every host and on the switch: ip link set dev {interface} mtu {common}"),
        ("line rate", "speed_mbit", "check its cable, its port and its network card: ethtool {interface}"),
    ):
        findings += _find_outliers(check, key, fix, good)
    return findings


def _format_route(route: Mapping[str, Any]) -> str:
    if route["interface"] is None:
        return "unknown interface"
    rate = f"{route['speed_mbit']} Mbit/s" if route["speed_mbit"] else "unknown line rate"
    return f"{route['interface']} in {route['network']}, MTU {route['mtu']}, {rate}"


def _find_outliers(check: str, key: str, fix: str, good: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Returns a finding for each host whose value differs from the most common known value."""
    values = [route[key] for route in good.values() if route[key] is not None]
    if not values:
        return []
    common = max(values, key=values.count)
    share = "most" if 2 * values.count(common) > len(good) else "others"
    return [
        Finding(
            check,
            (host,),
            WARN,
            f"{route[key] or 'unknown'}, but {common} on {share}",
            fix.format(common=common, interface=route["interface"] or "its interface"),
        )
        for host, route in good.items()
        if route[key] != common
    ]


def check_ports(problems: Mapping[str, Mapping[str, str]], routes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Returns findings about which hosts reach which.

    Args:
        problems: by host, for each other host why it cannot be reached; an empty text if it can.
        routes: by host, as in check_routes.
    """
    broken = {(host, to): reason for host, targets in problems.items() for to, reason in targets.items() if reason}
    findings, reported = [], set[tuple[str, str]]()
    for to in routes:
        sources = [host for host in problems if to in problems[host]]
        if len(sources) > 1 and all((host, to) in broken for host in sources):
            reported |= {(host, to) for host in sources}
            found = f"no other host reaches it: {broken[sources[0], to]}"
            findings.append(Finding("ports", (to,), RED, found, _ports_fix(to, routes)))
    for (host, to), reason in broken.items():
        if (host, to) not in reported:
            reverse = problems.get(to, {}).get(host)
            note = (
                ""
                if reverse is None
                else "; the reverse direction fails too"
                if reverse
                else "; the reverse direction works"
            )
            found = f"does not reach {to} at {routes[to]['address']}: {reason}{note}"
            findings.append(Finding("ports", (host,), RED, found, _ports_fix(to, routes)))
    clean = tuple(host for host in problems if not any(host in pair for pair in broken))
    if clean:
        findings.insert(0, Finding("ports", clean, OK, "open in both directions"))
    return findings


def _ports_fix(to: str, routes: Mapping[str, Mapping[str, Any]]) -> str:
    return PORTS_FIX.format(network=routes[to]["network"] or "NETWORK", host=to)


def check_shared_folder(
    marker: Mapping[str, Any], answers: Mapping[str, Any], first: str, replicas: int
) -> list[Finding]:
    """Returns findings about whether all hosts write their runs to one shared folder.

    Args:
        marker: the answer of agent.create_marker on the first host.
        answers: by other host, the answer of agent.find_marker.
        first: the first host.
        replicas: checkpoint.replicas of the config.
    """
    if "path" not in marker:
        found = f"cannot test whether hosts share the run folder: {marker['problem']}"
        return [Finding("shared folder", (first,), WARN, found, "fix that, or set run.output_dir")]
    sees_marker = {host: bool(answer["exists"]) for host, answer in answers.items() if "exists" in answer}
    unknown = [
        Finding("shared folder", (host,), WARN, f"cannot access it: {answer['problem']}", "fix that there")
        for host, answer in answers.items()
        if host not in sees_marker
    ]
    return [*(_check_sharing(marker, sees_marker, first, replicas) if sees_marker else []), *unknown]


def _check_sharing(
    marker: Mapping[str, Any], sees_marker: Mapping[str, bool], first: str, replicas: int
) -> list[Finding]:
    hosts = (first, *sees_marker)
    folder = marker["path"].rpartition("/")[0] or "/"
    without = [host for host, sees in sees_marker.items() if not sees]
    if not without:
        return [Finding("shared folder", hosts, OK, f"{folder} is shared: each checkpoint is written once")]
    if len(without) == len(sees_marker):
        copies = min(replicas, len(hosts))
        found = (
            f"{folder} is local to each host: {copies} of them keep every checkpoint (checkpoint.replicas={replicas})"
        )
        return [Finding("shared folder", hosts, OK, found)]
    sharing = [host for host in hosts if host not in without]
    fix = "mount it there too if it should be shared; dtrain detects by itself which hosts share it"
    found = f"{folder} is not the same folder as on {format_hosts(sharing)}"
    return [Finding("shared folder", tuple(without), WARN, found, fix)]

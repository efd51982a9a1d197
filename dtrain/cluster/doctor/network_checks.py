"""What is between hosts, judged: names, routes, ports, a shared folder. Answers in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.cluster.doctor.findings import OK, RED, WARN, Finding, named
from dtrain.cluster.doctor.host_checks import Answer

NAMES_FIX = "mend /etc/hosts on {hosts}, or write addresses into the hostfile"

PORTS_FIX = (
    "let the hosts talk to each other on every TCP port, since ranks choose theirs: iptables -I INPUT -s {network} -j "
    "ACCEPT on {host}, or the cloud's security group"
)


def meeting_place(good: Sequence[Answer]) -> tuple[str | None, list[Finding]]:
    """The first host's address as the others see it, as launch/ uses it, and what is wrong with its name.

    Returns:
        None for the address where no other host sees one; 127.0.0.1 for a single host.
    """
    if len(good) < 2:
        return "127.0.0.1", []
    first, others = good[0], good[1:]
    seen = {answer.host: answer.look["addresses"].get(first.host) for answer in others}
    usable = [address for address in seen.values() if address is not None and not address.startswith("127.")]
    place = max(usable, key=usable.count) if usable else None
    found = []
    for host, address in seen.items():
        fix = NAMES_FIX.format(hosts=host)
        what = f"{first.host}, where the ranks meet,"
        if address is None:
            found.append(Finding("names", (host,), RED, f"{what} does not resolve there", fix))
        elif address.startswith("127."):
            found.append(Finding("names", (host,), RED, f"{what} is {address} there, which is {host} itself", fix))
        elif address != place:
            found.append(Finding("names", (host,), RED, f"{what} is {address} there, but {place} on others", fix))
    right = tuple(host for host in seen if host not in {each.hosts[0] for each in found})
    if right:
        found.insert(0, Finding("names", right, OK, f"{first.host}, where the ranks meet, is {place}"))
    return place, found


def of_ways(ways: Mapping[str, Mapping[str, Any]], place: str) -> list[Finding]:
    """How each host talks to the meeting place.

    Args:
        ways: by host, what agent.listen gave; the first is the meeting place's own.
    """
    found = [
        Finding("route", (host,), RED, f"no way to {place}: {way['problem']}", "give it an address in that network")
        for host, way in ways.items()
        if way.get("problem")
    ]
    good = {host: way for host, way in ways.items() if not way.get("problem")}
    if not good:
        return found
    first, own = next(iter(good.items()))
    if own["address"] != place and next(iter(ways)) == first:
        told = f"{place} is none of its own addresses (it has {own['address']}): a NAT or a proxy is between"
        found.append(Finding("route", (first,), WARN, told, "write its own address into the hostfile"))
    found = [*(Finding("route", (host,), OK, _way(way)) for host, way in good.items()), *found]
    for what, key, fix in (
        ("networks", "network", "take one network for all; where it is routed on purpose, see its rates below"),
        ("MTU", "mtu", "the same on every host and on the switch: ip link set dev {interface} mtu {usual}"),
        ("line rate", "speed_mbit", "see to its cable, its port and its card: ethtool {interface}"),
    ):
        found += _unlike(what, key, fix, good)
    return found


def _way(way: Mapping[str, Any]) -> str:
    if way["interface"] is None:
        return "through an interface that cannot be told"
    rate = f", {way['speed_mbit']} Mbit/s" if way["speed_mbit"] else ", line rate not told"
    return f"{way['interface']} in {way['network']}, MTU {way['mtu']}{rate}"


def _unlike(what: str, key: str, fix: str, good: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A row for each host that is unlike most of those that tell."""
    values = [way[key] for way in good.values() if way[key] is not None]
    if not values:
        return []
    usual = max(values, key=values.count)
    return [
        Finding(
            what,
            (host,),
            WARN,
            f"{way[key] or 'not told'}, but {usual} on {'most' if 2 * values.count(usual) > len(good) else 'others'}",
            fix.format(usual=usual, interface=way["interface"] or "its interface"),
        )
        for host, way in good.items()
        if way[key] != usual
    ]


def of_ports(reached: Mapping[str, Mapping[str, str]], ways: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Who reaches whom.

    Args:
        reached: by host, for each other one why it is not reached; empty where it is.
        ways: by host, as in of_ways.
    """
    broken = {(host, to): why for host, tos in reached.items() for to, why in tos.items() if why}
    found, told = [], set[tuple[str, str]]()
    for to in ways:
        froms = [host for host in reached if to in reached[host]]
        if len(froms) > 1 and all((host, to) in broken for host in froms):
            told |= {(host, to) for host in froms}
            why = broken[froms[0], to]
            found.append(Finding("ports", (to,), RED, f"no other host reaches it: {why}", _open(to, ways)))
    for (host, to), why in broken.items():
        if (host, to) not in told:
            other_way = reached.get(to, {}).get(host)
            back = "" if other_way is None else "; the other way, too" if other_way else "; the other way is open"
            text = f"does not reach {to} at {ways[to]['address']}: {why}{back}"
            found.append(Finding("ports", (host,), RED, text, _open(to, ways)))
    clean = tuple(host for host in reached if not any(host in pair for pair in broken))
    if clean:
        found.insert(0, Finding("ports", clean, OK, "open both ways"))
    return found


def _open(to: str, ways: Mapping[str, Mapping[str, Any]]) -> str:
    return PORTS_FIX.format(network=ways[to]["network"] or "NETWORK", host=to)


def of_folder(marker: Mapping[str, Any], seen: Mapping[str, Any], first: str, replicas: int) -> list[Finding]:
    """Whether runs are written to one folder that all hosts share.

    Args:
        marker: what agent.mark gave on the first host. seen: by other host, what agent.see gave.
        replicas: as in checkpoint.replicas.
    """
    if "path" not in marker:
        told = f"it cannot be told whether hosts share the run folder: {marker['problem']}"
        return [Finding("shared folder", (first,), WARN, told, "mend that, or set run.output_dir")]
    sees = {host: bool(said["is_there"]) for host, said in seen.items() if "is_there" in said}
    blind = [
        Finding("shared folder", (host,), WARN, f"it cannot be looked at: {said['problem']}", "mend that there")
        for host, said in seen.items()
        if host not in sees
    ]
    return [*(_sharing(marker, sees, first, replicas) if sees else []), *blind]


def _sharing(marker: Mapping[str, Any], sees: Mapping[str, bool], first: str, replicas: int) -> list[Finding]:
    hosts = (first, *sees)
    folder = marker["path"].rpartition("/")[0] or "/"
    without = [host for host, is_there in sees.items() if not is_there]
    if not without:
        return [Finding("shared folder", hosts, OK, f"{folder} is shared: a checkpoint is written once")]
    if len(without) == len(sees):
        kept = min(replicas, len(hosts))
        told = f"{folder} is each host's own: {kept} of them keep every checkpoint (checkpoint.replicas={replicas})"
        return [Finding("shared folder", hosts, OK, told)]
    fix = "mount it there as well, if it is meant to be one; dtrain finds out by itself who shares it"
    shares = [host for host in hosts if host not in without]
    return [Finding("shared folder", tuple(without), WARN, f"{folder} is not the one of {named(shares)}", fix)]

"""Evaluates the rates that link_test.py measures, and recommends settings for them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.cluster.doctor.findings import OK, RED, WARN, Finding

SLOW_SHARE = 0.5
"""A pair with less than this share of its hosts' or the typical rate is red."""

GOOD_SHARE, MIN_SHARE = 0.7, 0.2
"""Shares of the line rate: the expected one, and one that a working line never stays below."""

GLOO_LIMIT = 10e9
"""Bits per second: about the maximum of gloo over one connection, on a line of any rate."""

EXAMPLE_BYTES, EXAMPLE = 440e6, "440 MB of gradients (BERT-base in fp32)"

FAST_S = 0.1
"""A faster all-reduce needs no advice, since a step of such a model takes longer."""

SLOW_FIX = "check its cable, port, network card and other traffic: ethtool {interface}; or remove it: --exclude {host}"

LINE_FIX = "check for other traffic, the duplex mode and errors: ethtool -S on both"

SWITCH_FIX = "check the switch that all share: it is the bottleneck"

MAX_PAIR_ROWS = 6
"""Pairs that get a row each: those of four hosts."""

PAIR_FIX = "check the switches between the two hosts and other traffic on them"


def host_pairs(count: int) -> list[tuple[int, int]]:
    """Returns the pairs of host indices to measure: all pairs up to 8 hosts, else neighbors in a ring."""
    if count <= 8:
        return [(first, second) for first in range(count) for second in range(first + 1, count)]
    return [(first, (first + 1) % count) for first in range(count)]


def check_precision(measured: Mapping[str, Any]) -> list[Finding]:
    """Returns what engine.precision=bf16 would gain on each host that computes on its CPU. It stays the user's choice.

    Args:
        measured: as in check_links.
    """
    return [Finding("precision", (timed["host"],), OK, timed["found"]) for timed in measured.get("precision", [])]


def check_links(measured: Mapping[str, Any], routes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Returns findings about each pair of hosts and about all hosts together.

    Args:
        measured: the result of link_test.py: `hosts`, `backend`, `pairs` and `all`; rates in bytes per second each way.
        routes: by host, as in network_checks.check_routes.
    """
    hosts, pairs, total = tuple(measured["hosts"]), measured["pairs"], measured["all"]
    group = f"{measured['ranks']} ranks by {measured['backend']}"
    if len(hosts) == 1:
        return [Finding("process group", hosts, OK, group)]
    findings = []
    slow = find_slow_hosts(hosts, pairs)
    for host, (best, typical) in slow.items():
        found = f"{format_rate(best)} with its fastest peer, but {format_rate(typical)} is typical"
        fix = SLOW_FIX.format(interface=routes[host].get("interface") or "its interface", host=host)
        findings.append(Finding("bandwidth", (host,), RED, found, fix))
    good = []
    for pair in pairs:
        if slow.keys() & set(pair["hosts"]):
            continue
        if _is_slow_pair(pair, hosts, pairs):
            found = f"{format_rate(pair['bandwidth'])} between them, although each reaches twice that with others"
            findings.append(Finding("bandwidth", tuple(pair["hosts"]), RED, found, PAIR_FIX))
        elif measured["backend"] != "nccl" and (finding := _check_line_rate(pair, routes)):
            findings.append(finding)
        else:
            good.append(pair)
    if measured["backend"] == "nccl" and any(route.get("speed_mbit") for route in routes.values()):
        found = "not compared with the measured rates: NCCL may use another path (InfiniBand, NVLink)"
        findings.append(Finding("line rate", hosts, OK, found))
    slowest = min(map(_bandwidth, pairs))
    if len(hosts) > 2 and total["bandwidth"] < SLOW_SHARE * slowest:
        found = f"{format_rate(total['bandwidth'])} among all hosts, but {format_rate(slowest)} or more between any two"
        findings.append(Finding("bandwidth", hosts, WARN, found, SWITCH_FIX))
    found = f"{group}: {format_rate(total['bandwidth'])}, {format_ms(total['latency_s'])}"
    return [Finding("process group", hosts, OK, found), *_pair_rows(good), *findings]


def _pair_rows(good: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Returns a row for each pair; if there are many, one row with the slowest and the fastest."""
    if len(good) <= MAX_PAIR_ROWS:
        return [
            Finding(
                "pair", tuple(pair["hosts"]), OK, f"{format_rate(pair['bandwidth'])}, {format_ms(pair['latency_s'])}"
            )
            for pair in good
        ]
    slowest, fastest = min(good, key=_bandwidth), max(good, key=_bandwidth)
    low, high = (f"{format_rate(pair['bandwidth'])} ({' - '.join(pair['hosts'])})" for pair in (slowest, fastest))
    hosts = dict.fromkeys(host for pair in good for host in pair["hosts"])
    return [Finding("pairs", tuple(hosts), OK, f"{len(good)} pairs: {low} to {high}")]


def find_slow_hosts(hosts: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Returns hosts that are slow with every other host, with their best rate and the typical best rate.

    The median over pairs would not show them: a slow host of three is in most of the pairs.
    """
    best = _best_rates(hosts, pairs)
    typical = statistics.median(best.values())
    return {host: (rate, typical) for host, rate in best.items() if rate < SLOW_SHARE * typical}


def _best_rates(hosts: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {host: max(pair["bandwidth"] for pair in pairs if host in pair["hosts"]) for host in hosts}


def _is_slow_pair(pair: Mapping[str, Any], hosts: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> bool:
    best = _best_rates(hosts, pairs)
    typical = statistics.median(map(_bandwidth, pairs))
    return bool(pair["bandwidth"] < SLOW_SHARE * max(typical, min(best[host] for host in pair["hosts"])))


def _check_line_rate(pair: Mapping[str, Any], routes: Mapping[str, Mapping[str, Any]]) -> Finding | None:
    """Returns a finding if a pair is far below its interfaces' line rate; None if it is not, or a rate is unknown."""
    both = [routes[host] for host in pair["hosts"]]
    speeds = [route["speed_mbit"] * 1e6 for route in both if route.get("speed_mbit") is not None]
    bits = 8 * pair["bandwidth"]
    if len(speeds) < 2:
        return None
    line, expected = min(speeds), min(*speeds, GLOO_LIMIT)
    if bits >= GOOD_SHARE * expected:
        return None
    found = f"{format_rate(pair['bandwidth'])}, {bits / line:.0%} of the line's {format_rate(line / 8)}"
    if expected < line:
        found = f"{format_rate(pair['bandwidth'])}, but gloo reaches {format_rate(expected / 8)} on a line of {format_rate(line / 8)}"
    # The rate of a virtual interface is a configured number, so it proves nothing.
    is_broken = bits < MIN_SHARE * expected and all(route.get("is_physical") for route in both)
    return Finding("bandwidth", tuple(pair["hosts"]), RED if is_broken else WARN, found, LINE_FIX)


def _bandwidth(pair: Mapping[str, Any]) -> float:
    return float(pair["bandwidth"])


def ring_all_reduce_s(num_bytes: float, ranks: int, *, latency_s: float, bandwidth: float) -> float:
    """Returns the shortest time of a ring all-reduce, in seconds; `bandwidth` in bytes per second."""
    return 0.0 if ranks < 2 else latency_s + 2 * (ranks - 1) / ranks * num_bytes / bandwidth


def recommend(measured: Mapping[str, Any]) -> str:
    """Returns how long an all-reduce of gradients takes here and which settings help; empty for a single host."""
    if len(measured["hosts"]) == 1:
        return ""
    link, ranks = measured["all"], measured["ranks"]
    link_rates = {"latency_s": link["latency_s"], "bandwidth": link["bandwidth"]}
    seconds = ring_all_reduce_s(EXAMPLE_BYTES, ranks, **link_rates)
    duration = f"An all-reduce of {EXAMPLE} takes {seconds:.2g} s here"
    if seconds < FAST_S:
        return f"{duration}: no settings needed."
    half = ring_all_reduce_s(EXAMPLE_BYTES / 2, ranks, **link_rates)
    return (
        f"{duration}: engine.gradient_wire=bf16 reduces it to {half:.2g} s, and a larger train.global_batch_size makes it "
        "less frequent. If steps still wait for it, train.local_steps averages only every few steps (another algorithm)."
    )


def format_rates(measured: Mapping[str, Any]) -> str:
    """Returns the rates for the summary line."""
    if len(measured["hosts"]) == 1:
        return f"{measured['ranks']} ranks communicate"
    slowest = min(measured["pairs"], key=_bandwidth)
    latency_s = max(pair["latency_s"] for pair in measured["pairs"])
    return f"{format_rate(slowest['bandwidth'])} or more between any two, {format_ms(latency_s)} or less"


def format_rate(bandwidth: float) -> str:
    """Returns bytes per second as text, in bits, the unit of line rates."""
    bits = 8 * bandwidth
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def format_ms(seconds: float) -> str:
    """Returns seconds as text, in milliseconds."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{1000 * seconds:.0f} ms"

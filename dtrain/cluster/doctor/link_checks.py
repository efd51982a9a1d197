"""What the process group measured, judged, and what to set for it. Pure: wire_test.py measures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.cluster.doctor.findings import OK, RED, WARN, Finding

HALF = 0.5
"""A pair below this share of what its hosts or the usual pair reach is red."""

GOOD_SHARE, LEAST_SHARE = 0.7, 0.2
"""Of the line rate: what is to be expected, and what no line in order stays below."""

MOST_BY_GLOO = 10e9
"""Bits per second: over one connection gloo moves about so much, whatever the line carries."""

EXAMPLE_BYTES, EXAMPLE = 440e6, "440 MB of gradients (BERT-base in fp32)"

NOTABLE_S = 0.1
"""An exchange that takes less needs no advice: a step of such a model takes longer."""

SLOW_FIX = "see to its cable, port, card and what else uses them: ethtool {interface}; leave it out: --exclude {host}"

LINE_FIX = "see what else uses the line, and its duplex and errors: ethtool -S on both"

SWITCH_FIX = "see to the switch that all share: it is the bottleneck"

MOST_ROWS = 6
"""Pairs that are shown one by one: those of four hosts."""

PAIR_FIX = "see to the switches between the two, and to what else uses them"


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Which of so many hosts are measured together: all pairs up to 8 hosts, else neighbours in the ring."""
    if count <= 8:
        return [(one, other) for one in range(count) for other in range(one + 1, count)]
    return [(one, (one + 1) % count) for one in range(count)]


def of_links(measured: Mapping[str, Any], ways: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Pairs and all together.

    Args:
        measured: as wire_test.py gives it: `hosts`, `backend`, `pairs` and `all`; rates in bytes per second each way.
        ways: by host, as in network_checks.of_ways.
    """
    hosts, pairs, every = measured["hosts"], measured["pairs"], measured["all"]
    if len(hosts) == 1:
        return [Finding("process group", tuple(hosts), OK, f"{measured['ranks']} ranks by {measured['backend']}")]
    told = f"{measured['ranks']} ranks by {measured['backend']}: {rate(every['bandwidth'])}, {ms(every['latency_s'])}"
    found = [Finding("process group", tuple(hosts), OK, told)]
    slow = slow_hosts(hosts, pairs)
    for host, (own, usual) in slow.items():
        text = f"{rate(own)} at best with any other, but {rate(usual)} is usual"
        fix = SLOW_FIX.format(interface=ways[host].get("interface") or "its interface", host=host)
        found.append(Finding("bandwidth", (host,), RED, text, fix))
    good = []
    for pair in pairs:
        if slow.keys() & set(pair["hosts"]):
            continue
        if _is_slow(pair, hosts, pairs):
            text = f"{rate(pair['bandwidth'])} between them, though each reaches twice that with others"
            found.append(Finding("bandwidth", tuple(pair["hosts"]), RED, text, PAIR_FIX))
        elif measured["backend"] != "nccl" and (below := _below_line_rate(pair, ways)):
            found.append(below)
        else:
            good.append(pair)
    if measured["backend"] == "nccl" and any(way.get("speed_mbit") for way in ways.values()):
        told = "not compared with what was measured: NCCL may take another way (InfiniBand, NVLink)"
        found.append(Finding("line rate", tuple(hosts), OK, told))
    least = min(map(_bandwidth, pairs))
    if len(hosts) > 2 and every["bandwidth"] < HALF * least:
        text = f"{rate(every['bandwidth'])} among all at once, but {rate(least)} or more between any two"
        found.append(Finding("bandwidth", tuple(hosts), WARN, text, SWITCH_FIX))
    return [*found[:1], *_pairs(good), *found[1:]]


def _pairs(good: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A row for each; of many pairs, one from the slowest to the fastest."""
    if len(good) <= MOST_ROWS:
        return [
            Finding("pair", tuple(pair["hosts"]), OK, f"{rate(pair['bandwidth'])}, {ms(pair['latency_s'])}")
            for pair in good
        ]
    low, high = min(good, key=_bandwidth), max(good, key=_bandwidth)
    text = f"{rate(low['bandwidth'])} ({' - '.join(low['hosts'])}) to {rate(high['bandwidth'])} ({' - '.join(high['hosts'])})"
    hosts = dict.fromkeys(host for pair in good for host in pair["hosts"])
    return [Finding("pairs", tuple(hosts), OK, f"{len(good)} of them: {text}")]


def slow_hosts(hosts: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Hosts that are slow with every other, with their best rate and the usual best one.

    The median of pairs would not tell: one slow host of three is in most of the pairs.
    """
    best = _best(hosts, pairs)
    usual = statistics.median(best.values())
    return {host: (own, usual) for host, own in best.items() if own < HALF * usual}


def _best(hosts: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {host: max(pair["bandwidth"] for pair in pairs if host in pair["hosts"]) for host in hosts}


def _is_slow(pair: Mapping[str, Any], hosts: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> bool:
    best = _best(hosts, pairs)
    usual = statistics.median(map(_bandwidth, pairs))
    return bool(pair["bandwidth"] < HALF * max(usual, min(best[host] for host in pair["hosts"])))


def _below_line_rate(pair: Mapping[str, Any], ways: Mapping[str, Mapping[str, Any]]) -> Finding | None:
    """How far a pair is below what its interfaces say; None where it is not, or they say nothing."""
    both = [ways[host] for host in pair["hosts"]]
    speeds = [way["speed_mbit"] * 1e6 for way in both if way.get("speed_mbit") is not None]
    bits = 8 * pair["bandwidth"]
    if len(speeds) < 2:
        return None
    line, most = min(speeds), min(*speeds, MOST_BY_GLOO)
    if bits >= GOOD_SHARE * most:
        return None
    text = f"{rate(pair['bandwidth'])}, {bits / line:.0%} of the line's {rate(line / 8)}"
    if most < line:
        text = f"{rate(pair['bandwidth'])}, though gloo reaches {rate(most / 8)} on a line of {rate(line / 8)}"
    # What a virtual interface says is a number that somebody has put there.
    is_broken = bits < LEAST_SHARE * most and all(way.get("is_line") for way in both)
    return Finding("bandwidth", tuple(pair["hosts"]), RED if is_broken else WARN, text, LINE_FIX)


def _bandwidth(pair: Mapping[str, Any]) -> float:
    return float(pair["bandwidth"])


def exchange_s(num_bytes: float, ranks: int, *, latency_s: float, bandwidth: float) -> float:
    """Seconds in which ranks in a ring sum so many bytes: the least that it takes."""
    return 0.0 if ranks < 2 else latency_s + 2 * (ranks - 1) / ranks * num_bytes / bandwidth


def advice(measured: Mapping[str, Any]) -> str:
    """What an exchange of gradients costs here, and what to set; empty for a single host."""
    if len(measured["hosts"]) == 1:
        return ""
    link, count = measured["all"], measured["ranks"]
    seconds = exchange_s(EXAMPLE_BYTES, count, latency_s=link["latency_s"], bandwidth=link["bandwidth"])
    said = f"An exchange of {EXAMPLE} takes {seconds:.2g} s here"
    if seconds < NOTABLE_S:
        return f"{said}: nothing to set for it."
    half = exchange_s(EXAMPLE_BYTES / 2, count, latency_s=link["latency_s"], bandwidth=link["bandwidth"])
    return (
        f"{said}: engine.gradient_wire=bf16 makes it {half:.2g} s, a larger train.global_batch_size makes it rarer. If steps "
        "still wait, train.local_steps exchanges only every so many of them (another algorithm)."
    )


def rates_in_words(measured: Mapping[str, Any]) -> str:
    """For the last line."""
    if len(measured["hosts"]) == 1:
        return f"{measured['ranks']} ranks talk"
    low = min(measured["pairs"], key=_bandwidth)
    slowest = max(pair["latency_s"] for pair in measured["pairs"])
    return f"{rate(low['bandwidth'])} or more between any two, {ms(slowest)} or less"


def rate(bandwidth: float) -> str:
    """Bytes per second, in the bits that lines are sold by."""
    bits = 8 * bandwidth
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{1000 * seconds:.0f} ms"

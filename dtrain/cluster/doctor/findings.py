"""What the doctor found: one state for each thing looked at, and how it is shown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

OK, WARN, RED = "ok", "warn", "red"

COLOURS = {OK: "32", WARN: "33", RED: "31"}

MOST_NAMED = 4
"""Hosts that a row names before it counts them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, on the hosts that agree in it.

    state: ok, warn (a job will run, but not as well as it could) or red (it will not run, or not give the same answer).
    found: what was found. fix: what mends it, where it is not ok.
    """

    check: str
    hosts: tuple[str, ...]
    state: str
    found: str
    fix: str = ""


def folded(findings: Sequence[Finding]) -> list[Finding]:
    """Those that say the same of one host each as one row, at the place of the first."""
    hosts: dict[tuple[Finding, tuple[str, ...]], list[str]] = {}
    for finding in findings:
        together = finding.hosts if len(finding.hosts) > 1 else ()  # a pair stays a pair
        hosts.setdefault((replace(finding, hosts=()), together), []).extend(finding.hosts)
    return [replace(alike, hosts=tuple(names)) for (alike, _), names in hosts.items()]


def side_by_side(check: str, values: Mapping[str, str], *, state: str, fix: str) -> list[Finding]:
    """One finding where all hosts say the same; else one more for each that is unlike the most of them.

    Args:
        values: by host, in the order of the hostfile; of two values as frequent as each other the first host's counts.
        state: of a host that differs.
    """
    if not values:
        return []
    said = list(values.values())
    usual = max(said, key=said.count)
    found = [Finding(check, tuple(host for host, value in values.items() if value == usual), OK, usual)]
    others = {host: value for host, value in values.items() if value != usual}
    return found + [
        Finding(check, (host,), state, f"{value}, but {usual} on {named(found[0].hosts)}", fix)
        for host, value in others.items()
    ]


def named(hosts: Sequence[str]) -> str:
    """Hosts in words."""
    if len(hosts) <= MOST_NAMED:
        return ", ".join(hosts)
    return f"{', '.join(hosts[: MOST_NAMED - 1])} and {len(hosts) - MOST_NAMED + 1} more"


def table(findings: Sequence[Finding], hosts: Sequence[str], *, is_tty: bool) -> str:
    """A row for each, red and warn with the fix below.

    Args:
        hosts: all that were looked at.
        is_tty: people watch: the state has its colour.
    """
    rows = folded(findings)
    wheres = [_where(row.hosts, hosts) for row in rows]
    width = max((len(row.check) for row in rows), default=0)
    wide = max(map(len, wheres), default=0)
    lines = []
    for row, where in zip(rows, wheres, strict=True):
        state = f"{row.state:4s}"
        if is_tty:
            state = f"\x1b[{COLOURS[row.state]}m{state}\x1b[0m"
        lines.append(f"{state}  {row.check:{width}s}  {where:{wide}s}  {row.found}".rstrip())
        if row.fix and row.state != OK:
            lines.append(f"      fix: {row.fix}")
    return "\n".join(lines)


def _where(some: Sequence[str], hosts: Sequence[str]) -> str:
    if len(hosts) > 1 and set(some) == set(hosts):
        return f"all {len(hosts)} hosts"
    return named(some)


def last_line(findings: Sequence[Finding], hosts: Sequence[str], rates: str = "") -> str:
    """The whole in one line.

    Args:
        rates: what the process group measured, in words; empty where there was none.
    """
    rows = folded(findings)
    red, warn = ([row for row in rows if row.state == state] for state in (RED, WARN))
    count = "1 host" if len(hosts) == 1 else f"{len(hosts)} hosts"
    warned = f", {len(warn)} {'warning' if len(warn) == 1 else 'warnings'}" if warn else ""
    if red:
        return f"{len(red)} red: {', '.join(f'{row.check} ({named(row.hosts)})' for row in red)}{warned}"
    return f"All green: {count}{', ' + rates if rates else ''}{warned}"


def as_json(findings: Sequence[Finding], hosts: Sequence[str], measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """One JSON object; commands/doctor.py documents it."""
    rows = folded(findings)
    counts = {state: sum(row.state == state for row in rows) for state in (OK, WARN, RED)}
    return {
        "green": not counts[RED],
        "hosts": list(hosts),
        **counts,
        "findings": [asdict(row) for row in rows],
        "links": measured,
    }

"""The doctor's findings: one state for each check, and how findings are shown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

OK, WARN, RED = "ok", "warn", "red"

COLORS = {OK: "32", WARN: "33", RED: "31"}

MAX_NAMED_HOSTS = 4
"""A row names up to this many hosts; of more hosts it names the first ones and counts the rest."""


@dataclass(frozen=True)
class Finding:
    """The result of one check, for the hosts that share it.

    Attributes:
        check: the name of the check.
        hosts: the hosts.
        state: `ok`; `warn`, a job runs, but not as well as it could; or `red`, it does not run, or its results differ.
        found: what was found.
        fix: how to fix it; empty if the state is `ok`.
    """

    check: str
    hosts: tuple[str, ...]
    state: str
    found: str
    fix: str = ""


def merge_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Returns the findings with equal ones of single hosts merged into one, at the position of the first."""
    hosts: dict[tuple[Finding, tuple[str, ...]], list[str]] = {}
    for finding in findings:
        group = finding.hosts if len(finding.hosts) > 1 else ()  # findings of pairs are not merged
        hosts.setdefault((replace(finding, hosts=()), group), []).extend(finding.hosts)
    return [replace(finding, hosts=tuple(names)) for (finding, _), names in hosts.items()]


def compare_values(check: str, values: Mapping[str, str], *, state: str, fix: str) -> list[Finding]:
    """Returns one finding for the hosts with the most common value, and one for each host that differs.

    Args:
        values: by host, in the order of the hostfile. If two values are equally common, the first host's counts.
        state: the state of a host that differs.
        fix: the fix for a host that differs.
    """
    if not values:
        return []
    all_values = list(values.values())
    common = max(all_values, key=all_values.count)
    agreeing = tuple(host for host, value in values.items() if value == common)
    others = {host: value for host, value in values.items() if value != common}
    return [Finding(check, agreeing, OK, common)] + [
        Finding(check, (host,), state, f"{value}, but {common} on {format_hosts(agreeing)}", fix)
        for host, value in others.items()
    ]


def format_hosts(hosts: Sequence[str]) -> str:
    """Returns the hosts' names as text."""
    if len(hosts) <= MAX_NAMED_HOSTS:
        return ", ".join(hosts)
    return f"{', '.join(hosts[: MAX_NAMED_HOSTS - 1])} and {len(hosts) - MAX_NAMED_HOSTS + 1} more"


def format_table(findings: Sequence[Finding], hosts: Sequence[str], *, is_tty: bool) -> str:
    """Returns a row for each finding, with the fix below it unless its state is `ok`.

    Args:
        hosts: all hosts that were checked.
        is_tty: the output is a terminal: states are colored.
    """
    rows = merge_findings(findings)
    host_texts = [_format_row_hosts(row.hosts, hosts) for row in rows]
    check_width = max((len(row.check) for row in rows), default=0)
    host_width = max(map(len, host_texts), default=0)
    lines = []
    for row, host_text in zip(rows, host_texts, strict=True):
        state = f"{row.state:4s}"
        if is_tty:
            state = f"\x1b[{COLORS[row.state]}m{state}\x1b[0m"
        lines.append(f"{state}  {row.check:{check_width}s}  {host_text:{host_width}s}  {row.found}".rstrip())
        if row.fix and row.state != OK:
            lines.append(f"      fix: {row.fix}")
    return "\n".join(lines)


def _format_row_hosts(row_hosts: Sequence[str], hosts: Sequence[str]) -> str:
    if len(hosts) > 1 and set(row_hosts) == set(hosts):
        return f"all {len(hosts)} hosts"
    return format_hosts(row_hosts)


def format_summary(findings: Sequence[Finding], hosts: Sequence[str], rates: str = "") -> str:
    """Returns the last line, which summarizes all findings.

    Args:
        rates: rates that the process group measured, as text; empty if there was none.
    """
    rows = merge_findings(findings)
    red, warn = ([row for row in rows if row.state == state] for state in (RED, WARN))
    count = "1 host" if len(hosts) == 1 else f"{len(hosts)} hosts"
    warnings = f", {len(warn)} {'warning' if len(warn) == 1 else 'warnings'}" if warn else ""
    if red:
        return f"{len(red)} red: {', '.join(f'{row.check} ({format_hosts(row.hosts)})' for row in red)}{warnings}"
    return f"All green: {count}{', ' + rates if rates else ''}{warnings}"


def as_json(findings: Sequence[Finding], hosts: Sequence[str], measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the JSON object that commands/doctor.py documents, without `advice`."""
    rows = merge_findings(findings)
    counts = {state: sum(row.state == state for row in rows) for state in (OK, WARN, RED)}
    return {
        "green": not counts[RED],
        "hosts": list(hosts),
        **counts,
        "findings": [asdict(row) for row in rows],
        "links": measured,
    }

"""Probes every host in parallel before anything starts, and reports each host that cannot take part with the reason.

Launchers check one host or none. Without this, an unreachable host shows only as ranks that wait.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.cluster.remote_source import CPU, PROBE, join_sources
from dtrain.cluster.ssh import CONNECT_TIMEOUT_S, NO_SSH, explain_exit, python_command, start_on
from dtrain.errors import TopologyError

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds dtrain here. It must be at the same path on every host."""

ANSWER_TIMEOUT_S = 30.0
"""Time from the connection to the host's answer; its disk may be slow."""

CLOCK_WARNING_S = 2.0
"""Difference of two clocks, beyond the duration of the question itself, that makes times in logs and files misleading."""

MAX_CLOCK_OFFSET_S = 60.0
"""With a larger difference no job starts: the age of a shared file would confuse a restart with a new start."""

MAX_PARALLEL_PROBES = 32


@dataclass(frozen=True)
class HostProbe:
    """One host's answer.

    Attributes:
        host: the host's name in the hostfile.
        facts: the JSON object of probe.py; empty if the probe failed.
        problem: why the probe failed; empty if it did not.
        sent: when the question was sent, by this machine's clock, in seconds since 1970.
        received: when the answer arrived, by the same clock.
    """

    host: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    sent: float = 0.0
    received: float = 0.0

    @property
    def clock_offset_s(self) -> float:
        """Smallest possible offset of its clock from this machine's, in seconds; positive if its clock is ahead."""
        at = float(self.facts["time"])
        return max(at - self.received, 0.0) + min(at - self.sent, 0.0)


def probe_hosts(
    hosts: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    request: Mapping[str, Any] | None = None,
) -> list[HostProbe]:
    """Probes all hosts in parallel.

    Args:
        folder: the working folder of a job there.
        env: variables that the job will have; the probe's Python uses the same search paths.
        request: additional fields of the probe's request.
    """
    complete = {"root": str(ROOT), "folder": str(folder), "hosts": list(hosts), **(request or {})}
    first_line, rest = join_sources([CPU, PROBE]).split("\n", 1)
    source = f"{first_line}\nREQUEST = {complete!r}\n{rest}"
    pool = ThreadPoolExecutor(MAX_PARALLEL_PROBES)
    try:
        return list(pool.map(lambda host: _probe_host(host, source, env or {}), hosts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C some threads may still wait for their host


def _probe_host(host: str, source: str, env: Mapping[str, str]) -> HostProbe:
    sent = time.time()
    try:
        process = start_on(host, [*python_command(env), "-"])
    except FileNotFoundError:
        return HostProbe(host, problem=f"{host}: {NO_SSH}")
    timeout_s = CONNECT_TIMEOUT_S + ANSWER_TIMEOUT_S
    try:
        stdout, stderr = process.communicate(source.encode(), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return HostProbe(host, problem=f"{host}: no answer within {timeout_s:g} s, although ssh connects to it.")
    received = time.time()
    if process.returncode in (126, 127):
        problem = f"{host}: there is no Python at {sys.executable}: create the same .venv there as here."
        return HostProbe(host, problem=problem)
    lines = stdout.decode("utf-8", "replace").strip().splitlines()
    try:
        facts = json.loads(lines[-1]) if process.returncode == 0 and lines else None
    except ValueError:
        facts = None
    if facts is None:
        problem = explain_exit(host, process.returncode, stderr.decode("utf-8", "replace"))
        return HostProbe(host, problem=problem)
    return HostProbe(host, facts, sent=sent, received=received)


def check_hosts(probes: Sequence[HostProbe], *, folder: Path) -> list[str]:
    """Returns warnings if all hosts can take part.

    Raises:
        TopologyError: some hosts cannot take part, or would not compute the same results; all problems are listed.
    """
    problems = [probe.problem for probe in probes if probe.problem]
    good = [probe for probe in probes if not probe.problem]
    for probe in good:
        problems += _missing_parts(probe, folder)
    problems += _duplicate_machines(good)
    problems += [line for probe in good[1:] for line in _software_differences(good[0], probe)]
    problems += [_clock_message(probe) for probe in good if abs(probe.clock_offset_s) > MAX_CLOCK_OFFSET_S]
    if problems:
        raise TopologyError("Nothing was started:\n" + "\n".join(problems))
    return [_clock_message(probe) for probe in good if abs(probe.clock_offset_s) > CLOCK_WARNING_S]


def _clock_message(probe: HostProbe) -> str:
    offset = probe.clock_offset_s
    side = "ahead of" if offset > 0 else "behind"
    return (
        f"{probe.host}: its clock is {abs(offset):.0f} s {side} this machine's: synchronize both over the network "
        "(chrony, ntpd)."
    )


def _duplicate_machines(probes: Sequence[HostProbe]) -> list[str]:
    """Returns a message for each name of a machine that has another name already, by a typo or a wrong /etc/hosts."""
    problems, first_names = [], dict[str, str]()
    for probe in probes:
        machine = probe.facts.get("machine")
        if machine in first_names:
            problems.append(
                f"{probe.host}: this is the same machine as {first_names[machine]} ({probe.facts['host']}): list it once "
                "with all its slots, or fix /etc/hosts if it should be another machine."
            )
        elif machine is not None:
            first_names[machine] = probe.host
    return problems


def _missing_parts(probe: HostProbe, folder: Path) -> list[str]:
    facts, problems = probe.facts, []
    if facts["code"] is None:
        problems.append(f"{probe.host}: dtrain is not at {ROOT}: copy it there, or share the folder between the hosts.")
    elif "torch" not in facts["versions"]:
        problems.append(f"{probe.host}: {sys.executable} has no torch: install dtrain there as here.")
    if not facts["folder"]:
        problems.append(f"{probe.host}: the job's working folder {folder} does not exist there.")
    return problems


def _software_differences(first: HostProbe, other: HostProbe) -> list[str]:
    """Returns a message for each difference that may change results."""
    first_versions, other_versions = first.facts["versions"], other.facts["versions"]
    rows = [("python", first.facts["python"], other.facts["python"])]
    rows += [
        (name, first_versions.get(name, "none"), other_versions.get(name, "none"))
        for name in {**first_versions, **other_versions}
    ]
    problems = [
        f"{other.host}: {name} {other_version}, but {first_version} on {first.host}: install the same version with "
        "constraints.txt."
        for name, first_version, other_version in rows
        if first_version != other_version and "torch" in other_versions
    ]
    hashes = first.facts["code"], other.facts["code"]
    if None not in hashes and hashes[0] != hashes[1]:
        problems.append(f"{other.host}: dtrain's code differs from {first.host}: check out the same commit on both.")
    return problems


def choose_master(probes: Sequence[HostProbe]) -> tuple[str, int]:
    """Returns the master's address and port: the first host's address as the others see it, and a free port there.

    Raises:
        TopologyError: another host cannot resolve the first host's name, or resolves it to itself.
    """
    first = probes[0]
    if len(probes) == 1:
        return "127.0.0.1", int(first.facts["port"])
    for probe in probes[1:]:
        address = probe.facts["addresses"].get(first.host)
        if address is None or address.startswith("127."):
            problem = f"resolves to {address} there" if address else "does not resolve there"
            raise TopologyError(
                f"{probe.host}: the master's name {first.host} {problem}. Fix /etc/hosts on {probe.host}, or use "
                "addresses in the hostfile."
            )
    return str(probes[1].facts["addresses"][first.host]), int(first.facts["port"])


def host_addresses(probes: Sequence[HostProbe]) -> list[str]:
    """Returns the address of each host as another one sees it; its name where that one cannot resolve it."""
    addresses = []
    for probe in probes:
        seen = [str(other.facts["addresses"].get(probe.host) or "") for other in probes if other is not probe]
        found = next((address for address in seen if address and not address.startswith("127.")), probe.host)
        addresses.append(found)
    return addresses

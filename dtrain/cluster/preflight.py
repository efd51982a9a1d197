"""A look at every host before anything starts: all at once, and each that cannot take part is named with the reason.

Launchers look at one host or at none, and a host that is off shows only as ranks that wait.
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

from dtrain.cluster.remote_source import CORES, PROBE, as_one_text
from dtrain.cluster.ssh import CONNECT_S, python_with, start_on, why_not
from dtrain.errors import TopologyError

ROOT = Path(__file__).resolve().parents[2]
"""Where dtrain lies here, and has to lie on every host."""

ANSWER_S = 30.0
"""How long a host may take from the connection to its answer; its disk may be slow."""

LARGEST_OFFSET_S = 2.0
"""Between two clocks, beyond what the question itself took; more, and a time in a log or on a file misleads."""

WORST_OFFSET_S = 60.0
"""With more no job starts: the age of a shared file would tell a restart from a new start wrongly."""

AT_ONCE = 32
"""Hosts that are asked at the same time."""


@dataclass(frozen=True)
class Look:
    """One host's answer.

    found: what probe.py says; empty where it could not.
    problem: why it could not.
    sent, received: when the question left and the answer came, by this machine's clock.
    """

    host: str
    found: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    sent: float = 0.0
    received: float = 0.0

    @property
    def clock_offset_s(self) -> float:
        """How far its clock is off this machine's, at least, in seconds; positive where it is ahead."""
        at = float(self.found["time"])
        return max(at - self.received, 0.0) + min(at - self.sent, 0.0)


def look_at(
    hosts: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    wants: Mapping[str, Any] | None = None,
) -> list[Look]:
    """Asks all hosts at once.

    Args:
        folder: the working folder that a job has there.
        env: what will be set there for a job; where Python finds packages and libraries, it is so here as well.
        wants: further arguments of the probe.
    """
    asked = {"root": str(ROOT), "folder": str(folder), "hosts": list(hosts), **(wants or {})}
    begin, rest = as_one_text([CORES, PROBE]).split("\n", 1)
    source = f"{begin}\nASKED = {asked!r}\n{rest}"
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(lambda host: _ask(host, source, env or {}), hosts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C some may still wait for their host


def _ask(host: str, source: str, env: Mapping[str, str]) -> Look:
    sent = time.time()
    try:
        process = start_on(host, [*python_with(env), "-"])
    except FileNotFoundError:
        return Look(
            host, problem=f"{host}: there is no ssh on this machine. Install it: apt-get install openssh-client"
        )
    try:
        said, complaints = process.communicate(source.encode(), timeout=CONNECT_S + ANSWER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Look(host, problem=f"{host}: no answer within {CONNECT_S + ANSWER_S:g} s, though ssh connects to it.")
    received, told = time.time(), complaints.decode("utf-8", "replace")
    if process.returncode in (126, 127):
        return Look(host, problem=f"{host}: there is no Python at {sys.executable}: make the same .venv there as here.")
    lines = said.decode("utf-8", "replace").strip().splitlines()
    try:
        found = json.loads(lines[-1]) if process.returncode == 0 and lines else None
    except ValueError:
        found = None
    if found is None:
        return Look(host, problem=why_not(host, process.returncode, told))
    return Look(host, found, sent=sent, received=received)


def check(looks: Sequence[Look], *, folder: Path) -> list[str]:
    """Warnings, where all hosts can take part.

    Raises:
        TopologyError: some cannot, or they would not compute the same: all of them are listed.
    """
    problems = [look.problem for look in looks if look.problem]
    good = [look for look in looks if not look.problem]
    for look in good:
        problems += _lacks(look, folder)
    problems += _twice(good)
    problems += [line for look in good[1:] for line in differences(good[0], look)]
    problems += [_clock_told(look) for look in good if abs(look.clock_offset_s) > WORST_OFFSET_S]
    if problems:
        raise TopologyError("Nothing was started:\n" + "\n".join(problems))
    return [_clock_told(look) for look in good if abs(look.clock_offset_s) > LARGEST_OFFSET_S]


def _clock_told(look: Look) -> str:
    off = look.clock_offset_s
    way = "ahead of" if off > 0 else "behind"
    return f"{look.host}: its clock is {abs(off):.0f} s {way} this machine's: set both by the network (chrony, ntpd)."


def _twice(looks: Sequence[Look]) -> list[str]:
    """Where two names are one machine: a typing error, or a wrong line in /etc/hosts."""
    problems, first = [], dict[str, str]()
    for look in looks:
        machine = look.found.get("machine")
        if machine in first:
            problems.append(
                f"{look.host}: the same machine as {first[machine]} ({look.found['host']}): give it one line with all its "
                "slots, or mend /etc/hosts if it should be another."
            )
        elif machine is not None:
            first[machine] = look.host
    return problems


def _lacks(look: Look, folder: Path) -> list[str]:
    found, problems = look.found, []
    if found["code"] is None:
        problems.append(f"{look.host}: dtrain is not at {ROOT}: put it there, or share the folder between the hosts.")
    elif "torch" not in found["versions"]:
        problems.append(f"{look.host}: {sys.executable} has no torch: install dtrain there as here.")
    if not found["folder"]:
        problems.append(f"{look.host}: the folder {folder}, where the job is to run, is not there.")
    return problems


def differences(one: Look, other: Look) -> list[str]:
    """Where two hosts would not compute the same."""
    mine, its = one.found["versions"], other.found["versions"]
    rows = [("python", one.found["python"], other.found["python"])]
    rows += [(name, mine.get(name, "none"), its.get(name, "none")) for name in {**mine, **its}]
    told = [
        f"{other.host}: {name} {theirs}, but {ours} on {one.host}: install the same with constraints.txt."
        for name, ours, theirs in rows
        if ours != theirs and "torch" in its
    ]
    codes = one.found["code"], other.found["code"]
    if None not in codes and codes[0] != codes[1]:
        told.append(f"{other.host}: dtrain's code is another than on {one.host}: bring both to one commit.")
    return told


def master_of(looks: Sequence[Look]) -> tuple[str, int]:
    """The first host's address as the others see it, and a port that is free there.

    Raises:
        TopologyError: the second host cannot resolve the first one's name, or takes it for itself.
    """
    first = looks[0]
    if len(looks) == 1:
        return "127.0.0.1", int(first.found["port"])
    for look in looks[1:]:
        address = look.found["addresses"].get(first.host)
        if address is None or address.startswith("127."):
            seen = f"resolves to {address} there" if address else "does not resolve there"
            raise TopologyError(
                f"{look.host}: {first.host}, where the ranks meet, {seen}. Mend /etc/hosts on {look.host}, or write "
                "addresses into the hostfile."
            )
    return str(looks[1].found["addresses"][first.host]), int(first.found["port"])

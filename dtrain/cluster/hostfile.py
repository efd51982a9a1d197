"""Hostfiles: which hosts take part, and how many ranks each runs. DeepSpeed's format; the only place that reads it.

    python -m dtrain.cluster hostfiles/cluster --exclude node2     # for shell scripts: a line "host slots" each

A name may be passed to ssh and to a remote shell, so it has to look like one: letters, digits, dots, hyphens.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dtrain.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
"""A host name, an alias of the ssh config, or an IPv4 address. No hyphen first: ssh would take it for an option."""

LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\S+)")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile.

    devices: the numbers of the slots that take part, where --include or --exclude leave some out.
    """

    name: str
    slots: int
    devices: tuple[int, ...] | None = None


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in the order of the file, which is the order of ranks.

    Raises:
        ConfigError: the file cannot be read or has no hosts; or lines are wrong: all of them are listed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"the hostfile {path} cannot be read: {error.strerror}.{_near(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the hostfile {path} is not text: save it as UTF-8.") from None
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = _read_line(content)
        if isinstance(found, str):
            problems.append(f"{path}, line {number}: {found}")
        elif found.name in hosts:
            problems.append(f"{path}, line {number}: {found.name} is there twice (first: line {lines[found.name]}).")
        else:
            hosts[found.name], lines[found.name] = found, number
    if problems:
        raise ConfigError("\n".join(problems))
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no host. A line looks like this: node1 slots=4")
    return list(hosts.values())


def _read_line(content: str) -> Host | str:
    """The host of a line, or what is wrong with it."""
    name = content.split()[0]
    if not NAME.fullmatch(name):
        return f"{name!r} is not a host name: letters, digits, dots and hyphens only."
    match = LINE.fullmatch(content)
    if match is None:
        return f"{content!r} is not <host> slots=<ranks>, such as: {name} slots=4"
    slots = match["slots"]
    if not re.fullmatch(r"[0-9]{1,4}", slots) or int(slots) == 0:
        return f"slots={slots}: the number of ranks on {name}, from 1 on."
    return Host(name, int(slots))


def _near(path: Path) -> str:
    here = [found.name for found in path.parent.glob("*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, here, 1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def choose(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> list[Host]:
    """The hosts that take part, by DeepSpeed's filters: `node1@node2:0,2` is all of node1 and two slots of node2.

    Raises:
        ConfigError: both filters at once, an unknown host or slot, or nothing is left.
    """
    if include and exclude:
        raise ConfigError("give --include or --exclude, not both.")
    known = {host.name: host for host in hosts}
    if include:
        wanted = _read_filter("--include", include, known)
        return [_with(host, wanted[host.name] or _all(host)) for host in hosts if host.name in wanted]
    unwanted = _read_filter("--exclude", exclude, known) if exclude else {}
    left = [(host, _left(host, unwanted)) for host in hosts]
    found = [_with(host, slots) for host, slots in left if slots]
    if not found:
        raise ConfigError(f"--exclude {exclude} leaves no slot of {', '.join(known)}.")
    return found


def _read_filter(option: str, text: str, known: dict[str, Host]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, colon, slots = part.partition(":")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else f" It has {', '.join(known)}."
            raise ConfigError(f"{option}: the hostfile has no host {name!r}.{hint}")
        if colon and not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", slots):
            raise ConfigError(f"{option}: {part!r} is not HOST:SLOT,SLOT, such as {name}:0,2")
        numbers = tuple(sorted({int(slot) for slot in slots.split(",")})) if colon else ()
        if numbers and numbers[-1] >= known[name].slots:
            raise ConfigError(f"{option}: {name} has slots 0 to {known[name].slots - 1}, not {numbers[-1]}.")
        all_of_it = not numbers or found.get(name) == ()
        found[name] = () if all_of_it else tuple(sorted({*found.get(name, ()), *numbers}))
    return found


def _all(host: Host) -> tuple[int, ...]:
    return tuple(range(host.slots))


def _left(host: Host, unwanted: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if host.name not in unwanted:
        return _all(host)
    return tuple(slot for slot in _all(host) if unwanted[host.name] and slot not in unwanted[host.name])


def _with(host: Host, slots: tuple[int, ...]) -> Host:
    return host if slots == _all(host) else replace(host, slots=len(slots), devices=slots)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See python -m dtrain.cluster --help.")


def main(argv: Sequence[str]) -> int:
    """Prints a line `host slots` for each host; for shell scripts."""
    parser = _Parser(prog="python -m dtrain.cluster", description="Checks a hostfile and prints its hosts and slots.")
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("--include", default="", metavar="HOST[:SLOT,...][@HOST...]")
    parser.add_argument("--exclude", default="", metavar="HOST[:SLOT,...][@HOST...]")
    try:
        given: Any = parser.parse_args(argv)
        hosts = choose(read_hostfile(given.hostfile), include=given.include, exclude=given.exclude)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{host.name} {host.slots}\n" for host in hosts))
    return 0

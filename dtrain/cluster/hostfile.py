"""Reads hostfiles: which hosts take part and how many ranks each runs. The format is DeepSpeed's, and a host may be spare.

    python -m dtrain.cluster hostfiles/cluster --exclude node2     # for shell scripts: prints a line "host slots" each

A host name may be passed to ssh and to a remote shell, so only letters, digits, dots and hyphens are allowed.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dtrain.config.option_parser import OptionParser
from dtrain.errors import ConfigError

HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
"""A host name, an alias of the ssh config, or an IPv4 address. It must not begin with a hyphen, as ssh options do."""

HOST_LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\S+)(?P<spare>\s+spare)?")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile.

    Attributes:
        name: the host's name or address.
        slots: number of ranks on this host.
        devices: the slot numbers to use if --include or --exclude left some out; None for all.
        is_spare: it waits, and takes the place of a host that is lost.
    """

    name: str
    slots: int
    devices: tuple[int, ...] | None = None
    is_spare: bool = False


def read_hostfile(path: Path) -> list[Host]:
    """Returns the hosts in the order of the file, which is the order of ranks.

    Raises:
        ConfigError: the file cannot be read, names no host, or has invalid lines (all of them are listed).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the hostfile {path}: {error.strerror}.{_suggest_path(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the hostfile {path} is not a text file: save it as UTF-8.") from None
    hosts: dict[str, Host] = {}
    line_numbers: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        host = _parse_line(content)
        if isinstance(host, str):
            problems.append(f"{path}, line {number}: {host}")
        elif host.name in hosts:
            problems.append(
                f"{path}, line {number}: {host.name} is listed twice (first: line {line_numbers[host.name]})."
            )
        else:
            hosts[host.name], line_numbers[host.name] = host, number
    if problems:
        raise ConfigError("\n".join(problems))
    if not hosts:
        raise ConfigError(f"the hostfile {path} lists no host. A line looks like this: node1 slots=4")
    if all(host.is_spare for host in hosts.values()):
        raise ConfigError(f"the hostfile {path} has spare hosts only. Remove `spare` from those that run the job.")
    return list(hosts.values())


def _parse_line(content: str) -> Host | str:
    """Returns the host of a line, or an error message."""
    name = content.split()[0]
    if not HOST_NAME.fullmatch(name):
        return f"{name!r} is not a host name: use only letters, digits, dots and hyphens."
    match = HOST_LINE.fullmatch(content)
    if match is None:
        return f"{content!r} is not <host> slots=<ranks> or <host> slots=<ranks> spare. Example: {name} slots=4"
    slots = match["slots"]
    if not re.fullmatch(r"[0-9]{1,4}", slots) or int(slots) == 0:
        return f"slots={slots} is not a number of ranks on {name}: it must be from 1 to 9999."
    return Host(name, int(slots), is_spare=match["spare"] is not None)


def _suggest_path(path: Path) -> str:
    siblings = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, siblings, 1)
    return f" Did you mean {path.parent / matches[0]}?" if matches else ""


def select_hosts(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> list[Host]:
    """Returns the hosts that take part.

    Filters have DeepSpeed's syntax: `node1@node2:0,2` means all slots of node1 and two slots of node2.

    Raises:
        ConfigError: both filters are set, a host or slot is unknown, or no host remains.
    """
    if include and exclude:
        raise ConfigError("use --include or --exclude, not both.")
    known = {host.name: host for host in hosts}
    if include:
        included = _parse_filter("--include", include, known)
        return [_restrict(host, included[host.name] or _all_slots(host)) for host in hosts if host.name in included]
    excluded = _parse_filter("--exclude", exclude, known) if exclude else {}
    remaining = [(host, _remaining_slots(host, excluded)) for host in hosts]
    selected = [_restrict(host, slots) for host, slots in remaining if slots]
    if not selected:
        raise ConfigError(f"--exclude {exclude} leaves no slot of {', '.join(known)}.")
    return selected


def _parse_filter(option: str, text: str, known: dict[str, Host]) -> dict[str, tuple[int, ...]]:
    """Returns the slots of each host in a filter; an empty tuple means all slots."""
    slots_by_host: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, colon, slots = part.partition(":")
        if name not in known:
            matches = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {matches[0]}?" if matches else f" Its hosts are {', '.join(known)}."
            raise ConfigError(f"{option}: the hostfile has no host {name!r}.{hint}")
        if colon and not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", slots):
            raise ConfigError(f"{option}: {part!r} is not HOST:SLOT,SLOT. Example: {name}:0,2")
        numbers = tuple(sorted({int(slot) for slot in slots.split(",")})) if colon else ()
        if numbers and numbers[-1] >= known[name].slots:
            raise ConfigError(f"{option}: {name} has slots 0 to {known[name].slots - 1}, not {numbers[-1]}.")
        has_all_slots = not numbers or slots_by_host.get(name) == ()
        slots_by_host[name] = () if has_all_slots else tuple(sorted({*slots_by_host.get(name, ()), *numbers}))
    return slots_by_host


def _all_slots(host: Host) -> tuple[int, ...]:
    return tuple(range(host.slots))


def _remaining_slots(host: Host, excluded: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if host.name not in excluded:
        return _all_slots(host)
    return tuple(slot for slot in _all_slots(host) if excluded[host.name] and slot not in excluded[host.name])


def _restrict(host: Host, slots: tuple[int, ...]) -> Host:
    return host if slots == _all_slots(host) else replace(host, slots=len(slots), devices=slots)


class _HostfileParser(OptionParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See python -m dtrain.cluster --help.")


def main(argv: Sequence[str]) -> int:
    """Prints a line `host slots` for each host; for shell scripts."""
    parser = _HostfileParser(
        prog="python -m dtrain.cluster", description="Checks a hostfile and prints its hosts and slots."
    )
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("--include", default="", metavar="HOST[:SLOT,...][@HOST...]")
    parser.add_argument("--exclude", default="", metavar="HOST[:SLOT,...][@HOST...]")
    try:
        options: Any = parser.parse_args(argv)
        hosts = select_hosts(read_hostfile(options.hostfile), include=options.include, exclude=options.exclude)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{host.name} {host.slots}\n" for host in hosts if not host.is_spare))
    return 0

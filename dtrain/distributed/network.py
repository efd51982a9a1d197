"""Addresses and network interfaces of this machine, and the master's socket. Nothing is sent."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from dtrain.console import log
from dtrain.errors import TopologyError

SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""

ELSEWHERE = "192.0.2.1"
"""An address kept for documentation (RFC 5737): the route to it is the route to the outside."""


def resolve(host: str, port: int) -> tuple[int, str]:
    """The address family and the first address of a host, IPv4 first, since gloo and NCCL prefer it.

    Raises:
        socket.gaierror: the name does not resolve.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def is_loopback(address: str) -> bool:
    """Whether an address (not a name) stays on this machine."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_literally_local(host: str) -> bool:
    """Whether a host means "this machine" on every machine: localhost, 127.x, ::1."""
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def address_towards(host: str, port: int) -> str:
    """The local address from which this machine talks to `host`. Connecting a datagram socket sends nothing.

    Raises:
        OSError: the name does not resolve, or there is no route.
    """
    family, address = resolve(host, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def outward_address() -> str | None:
    """The address that others are likely to reach: on the default route, else of the only interface that has one."""
    try:
        return address_towards(ELSEWHERE, 9)
    except OSError:
        others = [a for a in map(_ipv4_of, interfaces()) if a is not None and not is_loopback(a)]
        return others[0] if len(others) == 1 else None


def choose_interface(env: MutableMapping[str, str], master: str, port: int, *, serves_other_nodes: bool) -> None:
    """Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where not set, to the interface on the route to the master.

    Left alone, gloo resolves the host's own name, and where that gives 127.0.0.1 two nodes never connect.
    """
    wanted = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not env.get(name)]
    try:
        address: str | None = address_towards(master, port)
    except OSError:  # whoever connects to the master waits for the name or the route, and says so if neither comes
        return
    if address is not None and is_loopback(address) and serves_other_nodes:
        address = outward_address()  # the master's own name means 127.0.1.1 to itself on many systems
    interface = interface_of(address) if address is not None else None
    if interface is None and wanted:
        log.warning("No interface is known for address %s. If ranks cannot connect, set GLOO_SOCKET_IFNAME.", address)
        return
    for name in wanted:
        # "=" asks NCCL for exactly this name; it would take a prefix otherwise.
        env[name] = f"={interface}" if name.startswith("NCCL") else str(interface)


def interfaces() -> list[str]:
    """Names of all network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def interface_of(address: str) -> str | None:
    """The interface that has this local address; None where that cannot be told (second addresses, not Linux)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        return _interface_of_ipv6(ip.packed.hex())
    for name in interfaces():
        own = _ipv4_of(name)
        if own == address or (own is not None and ip.is_loopback and is_loopback(own)):
            return name
    return None


def _interface_of_ipv6(digits: str) -> str | None:
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return next((row[5] for row in rows if row[0] == digits), None)


def _ipv4_of(interface: str) -> str | None:
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # the interface has no IPv4 address
            return None
    return socket.inet_ntoa(answer[20:24])


def listen(address: str, port: int) -> socket.socket:
    """A listening socket on one address only (torch's own listens on all interfaces); port 0 takes a free one.

    Raises:
        TopologyError: the port is taken.
        OSError: the address is not this machine's.
    """
    family, _ = resolve(address, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise TopologyError(
            f"Port {port} on {address} is in use, so rank 0 cannot open the meeting point there. Is another job, or an "
            "old one, still running? Choose another port (MASTER_PORT, --master-port)."
        ) from error
    return listener


def listen_as_master(address: str, port: int, *, serves_other_nodes: bool) -> socket.socket:
    """The master's listening socket, on the interface of MASTER_ADDR; on all where that address cannot be bound.

    Args:
        serves_other_nodes: other machines may come, so a name that means 127.0.1.1 here must not be taken at its word.

    Raises:
        TopologyError: the name does not resolve, or the port is taken.
    """
    try:
        _, own = resolve(address, port)
    except socket.gaierror as error:
        here = socket.gethostname()
        raise TopologyError(
            f"MASTER_ADDR={address} does not resolve on {here}: {error}. Use its IP address."
        ) from error
    if serves_other_nodes and is_loopback(own):
        return listen("0.0.0.0", port)
    try:
        return listen(own, port)
    except OSError:  # an address in front of this machine (a service, a NAT)
        return listen("::" if ":" in own else "0.0.0.0", port)


def reach(address: str, port: int, *, rank: int, deadline: float, timeout_s: float) -> None:
    """Waits until the master answers.

    Raises:
        TopologyError: nobody answered until the deadline.
    """
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((address, port), timeout=min(left, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TopologyError(
                    f"Rank {rank} on {socket.gethostname()} found no master at {address}:{port} within {timeout_s:g} s "
                    f"({error}). Rank 0 opens it: is it running there, with the same MASTER_ADDR and MASTER_PORT, "
                    "and does no firewall close the port?"
                ) from error
            time.sleep(0.1)

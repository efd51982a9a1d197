"""Addresses and network interfaces of this machine, and the master's socket. Sends nothing."""

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
"""Linux ioctl that returns the IPv4 address of an interface."""

OUTSIDE_ADDRESS = "192.0.2.1"
"""An address reserved for documentation (RFC 5737): the route to it is the default route."""


def resolve(host: str, port: int) -> tuple[int, str]:
    """Returns the address family and the first address of a host, IPv4 first, since gloo and NCCL prefer it.

    Raises:
        socket.gaierror: the name does not resolve.
    """
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(entries, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def is_loopback(address: str) -> bool:
    """Returns whether an address (not a name) stays on this machine."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_literally_local(host: str) -> bool:
    """Returns whether a host means "this machine" on every machine: localhost, 127.x, ::1."""
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def address_towards(host: str, port: int) -> str:
    """Returns the local address on the route to `host`. Connecting a datagram socket sends nothing.

    Raises:
        OSError: the name does not resolve, or there is no route.
    """
    family, address = resolve(host, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def outward_address() -> str | None:
    """Returns the address that others can probably reach: on the default route, else the only one not on loopback."""
    try:
        return address_towards(OUTSIDE_ADDRESS, 9)
    except OSError:
        others = [a for a in map(_ipv4_of, interfaces()) if a is not None and not is_loopback(a)]
        return others[0] if len(others) == 1 else None


def choose_interface(env: MutableMapping[str, str], master: str, port: int, *, serves_other_nodes: bool) -> None:
    """Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if unset, to the interface on the route to the master.

    By default gloo resolves the name of its host. If that gives 127.0.0.1, two nodes never connect.
    """
    unset = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not env.get(name)]
    try:
        address: str | None = address_towards(master, port)
    except OSError:  # connecting to the master will wait for the name or the route, and report if neither appears
        return
    if address is not None and is_loopback(address) and serves_other_nodes:
        address = outward_address()  # on many systems the master resolves its own name to 127.0.1.1
    interface = interface_of(address) if address is not None else None
    if interface is None and unset:
        log.warning(
            "No network interface found for address %s. If ranks cannot connect, set GLOO_SOCKET_IFNAME.", address
        )
        return
    for name in unset:
        # "=" makes NCCL match the exact name; otherwise it would match a prefix.
        env[name] = f"={interface}" if name.startswith("NCCL") else str(interface)


def interfaces() -> list[str]:
    """Returns the names of all network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def interface_of(address: str) -> str | None:
    """Returns the interface that has this local address; None if unknown (second addresses, not Linux)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        return _interface_of_ipv6(ip.packed.hex())
    for name in interfaces():
        ipv4 = _ipv4_of(name)
        if ipv4 == address or (ipv4 is not None and ip.is_loopback and is_loopback(ipv4)):
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
            request = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # the interface has no IPv4 address
            return None
    return socket.inet_ntoa(request[20:24])


BACKLOG = 4096
"""Connections that may wait to be accepted: all ranks connect at the same moment. The kernel has a limit of its own."""


def listen(address: str, port: int) -> socket.socket:
    """Opens a listening socket on one address only (torch's listens on all interfaces); port 0 takes a free one.

    Raises:
        TopologyError: the port is taken.
        OSError: this machine does not have the address.
    """
    family, _ = resolve(address, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise TopologyError(
            f"Port {port} on {address} is in use, so rank 0 cannot open the rendezvous there. Is another job, or an "
            "old one, still running? Choose another port (MASTER_PORT, --master-port)."
        ) from error
    return listener


def listen_as_master(address: str, port: int, *, serves_other_nodes: bool) -> socket.socket:
    """Opens the master's listening socket on the interface of MASTER_ADDR, or on all if it cannot bind that address.

    Args:
        serves_other_nodes: other machines may connect, so a name that resolves to 127.0.1.1 here must not be bound.

    Raises:
        TopologyError: the name does not resolve, or the port is taken.
    """
    try:
        _, resolved = resolve(address, port)
    except socket.gaierror as error:
        raise TopologyError(
            f"MASTER_ADDR={address} does not resolve on {socket.gethostname()}: {error}. Use its IP address."
        ) from error
    if serves_other_nodes and is_loopback(resolved):
        return listen("0.0.0.0", port)
    try:
        return listen(resolved, port)
    except OSError:  # the address belongs to something in front of this machine (a service, a NAT)
        return listen("::" if ":" in resolved else "0.0.0.0", port)


def wait_for_master(address: str, port: int, *, rank: int, deadline: float, timeout_s: float) -> None:
    """Waits until the master accepts connections.

    Raises:
        TopologyError: it did not until the deadline.
    """
    while True:
        try:
            remaining_s = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((address, port), timeout=min(remaining_s, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TopologyError(
                    f"Rank {rank} on {socket.gethostname()} found no master at {address}:{port} within {timeout_s:g} s "
                    f"({error}). Rank 0 opens it. Is it running there, with the same MASTER_ADDR and MASTER_PORT? "
                    "Does a firewall block the port?"
                ) from error
            time.sleep(0.1)

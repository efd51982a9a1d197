"""System calls that are missing in Python's library before 3.12: namespaces, mounts, TUN devices, parent-death signals."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

NAMESPACES = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}
"""Flags by names in /proc/PID/ns. The mount namespace is last, because /proc changes when it is entered."""

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
VNET_HEADER = struct.Struct("=BBHHHH")
"""The header of each packet on a TUN device: flags, kind, header bytes, segment bytes, start and offset of the checksum."""

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_SIOCETHTOOL, _ETHTOOL_SSET, _DUPLEX_FULL = 0x8946, 2, 1
_SPEED_UNKNOWN = 0xFFFFFFFF
_ETHTOOL_CMD = struct.Struct("=IIIHBBBBBBIIHBBIII")

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(*names: str) -> None:
    """Moves this process to new namespaces of these kinds; "pid" takes effect for its children only."""
    flags = 0
    for name in names:
        flags |= NAMESPACES[name]
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(descriptor: int, name: str) -> None:
    """Enters a namespace.

    Args:
        descriptor: an open file of /proc/PID/ns.
        name: the kind of the namespace.
    """
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(NAMESPACES[name])), f"setns {name}")


def mount(source: Path | str, target: Path | str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Calls mount(2). For a bind mount: flags=MS_BIND."""
    words = [str(word).encode() or None for word in (source, target, kind)]
    failed = _libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None)
    _check(failed, f"mount {kind or source} on {target}")


def die_with_parent() -> None:
    """Makes the kernel send SIGKILL to this process when its parent ends. Children do not inherit this."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl")


def name_process(name: str) -> None:
    """Sets the name that `ps` and `top` show, 15 characters at most."""
    _check(_libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0), "prctl")


def open_tun(name: str) -> int:
    """Creates a TUN device in this process's network namespace; it exists until the descriptor is closed.

    Reads and writes move TCP chunks of up to 64 KiB with a VNET_HEADER in front, as for a network card that does the
    segmentation: single packets of 1500 bytes would be too many for Python.
    """
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(device, _TUNSETIFF, request)
        fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
    except OSError:
        os.close(device)
        raise
    return device


def set_link_speed(name: str, rate_mbit: float | None) -> None:
    """Sets /sys/class/net/NAME/speed, in whole Mbit/s; -1 for None.

    Raises:
        OSError: the kernel is older than 4.20.
    """
    speed = _SPEED_UNKNOWN if rate_mbit is None else max(round(rate_mbit), 1)
    low, high = speed & 0xFFFF, speed >> 16
    # Fields: command, supported, advertised; speed, duplex, 5 of the port; 2 packet counts; speed's upper half; the rest.
    command = ctypes.create_string_buffer(
        _ETHTOOL_CMD.pack(_ETHTOOL_SSET, 0, 0, low, _DUPLEX_FULL, 0, 0, 0, 0, 0, 0, 0, high, 0, 0, 0, 0, 0)
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, struct.pack("16sP16x", name.encode(), ctypes.addressof(command)))


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")

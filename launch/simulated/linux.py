"""System calls that Python's library lacks before 3.12: namespaces, mounts, TUN devices, signals at a parent's death."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

NAMESPACES = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}
"""By their names in /proc/PID/ns. The mount namespace is last: /proc is another one after it is entered."""

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
VNET_HEADER = struct.Struct("=BBHHHH")
"""Before each packet on a TUN device: flags, kind, bytes of headers, bytes of a segment, checksum's start and offset."""

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_SIOCETHTOOL, _ETHTOOL_SSET, _DUPLEX_FULL = 0x8946, 2, 1
_SPEED_UNKNOWN = 0xFFFFFFFF
_ETHTOOL_CMD = struct.Struct("=IIIHBBBBBBIIHBBIII")

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(*names: str) -> None:
    """Gives this process new namespaces of these kinds; "pid" counts for its children only."""
    flags = 0
    for name in names:
        flags |= NAMESPACES[name]
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(descriptor: int, name: str) -> None:
    """Enters the namespace that a file of /proc/PID/ns opened as `descriptor` stands for."""
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(NAMESPACES[name])), f"setns {name}")


def mount(source: Path | str, target: Path | str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). For a bind mount: flags=MS_BIND."""
    words = [str(word).encode() or None for word in (source, target, kind)]
    failed = _libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None)
    _check(failed, f"mount {kind or source} on {target}")


def die_with_parent() -> None:
    """This process gets SIGKILL when its parent ends. Not passed on to its own children."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl")


def name_process(name: str) -> None:
    """What `ps` and `top` show, 15 characters at most."""
    _check(_libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0), "prctl")


def open_tun(name: str) -> int:
    """Makes a TUN device in this process's network namespace; it is there until the descriptor is closed.

    Reads and writes move whole TCP chunks of up to 64 KiB with a VNET_HEADER before them, as a network card that
    segments by itself would get them: packets of 1500 bytes one by one are more than Python can carry.
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
    """What /sys/class/net/NAME/speed says, in whole Mbit/s; -1 for None. Raises OSError on kernels before 4.20."""
    speed = _SPEED_UNKNOWN if rate_mbit is None else max(round(rate_mbit), 1)
    low, high = speed & 0xFFFF, speed >> 16
    # command, supported, advertised; speed, duplex, 5 of the port; 2 packet counts; speed's upper half; the rest.
    command = ctypes.create_string_buffer(
        _ETHTOOL_CMD.pack(_ETHTOOL_SSET, 0, 0, low, _DUPLEX_FULL, 0, 0, 0, 0, 0, 0, 0, high, 0, 0, 0, 0, 0)
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, struct.pack("16sP16x", name.encode(), ctypes.addressof(command)))


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")

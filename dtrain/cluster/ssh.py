"""Commands on other hosts by ssh, as the user's own ssh is set up: keys, known hosts, aliases. Nothing is switched off."""

from __future__ import annotations

import ctypes
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

CONNECT_S = 6
"""How long a host may take to answer before it counts as off: TCP asks at 0, 1 and 3 s, and a start is refused within 10."""

ALIVE_S, ALIVE_TIMES = 15, 20
"""ssh asks a silent host this often, and gives it up after so many times: a job's own watch is to find it first."""

PR_SET_PDEATHSIG = 1

CURES = (
    ("Permission denied", "its sshd does not take your key. Put it there: ssh-copy-id {host}."),
    ("IDENTIFICATION HAS CHANGED", "its host key is another than known_hosts has. If it is new: ssh-keygen -R {host}."),
    ("Host key verification failed", "its host key is not known here. Log in once and compare it: ssh {host}."),
    ("Could not resolve hostname", "its name does not resolve here. Mend the hostfile, /etc/hosts or the ssh config."),
    ("Connection refused", "it is there, but no sshd answers. Start one, or name its port in the ssh config."),
    ("timed out", "it does not answer. Is it on, and is the network up?"),
    ("No route to host", "there is no way to it. Is it on, and is the network up?"),
    ("Network is unreachable", "there is no way to it: this machine has no route there."),
)
"""What ssh says on its standard error, and what that means."""


def is_here(host: str) -> bool:
    """Whether a host is this machine, so that no ssh is needed: only an own address can be bound."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def command_on(host: str, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` on a host: as it is here, by ssh elsewhere. Only quoted words reach the far shell."""
    if is_here(host):
        return list(argv)
    options = {
        "BatchMode": "yes",  # never asks for a password
        "ConnectTimeout": CONNECT_S,
        "ServerAliveInterval": ALIVE_S,
        "ServerAliveCountMax": ALIVE_TIMES,
    }
    given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-T", *given, host, f"exec {shlex.join(argv)}"]


def python_with(env: Mapping[str, str]) -> list[str]:
    """The command of this Python on another host, finding libraries and packages as a job with that environment does."""
    given = [f"{name}={env[name]}" for name in ("LD_LIBRARY_PATH", "PYTHONPATH") if env.get(name)]
    return ["env", *given, sys.executable] if given else [sys.executable]


def start_on(host: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a command on a host, with pipes to all its streams.

    It is in a session of its own: Ctrl-C is for us to pass on, not for ssh to die of.

    Raises:
        FileNotFoundError: there is no ssh on this machine.
    """
    return subprocess.Popen(
        command_on(host, argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=None if is_here(host) else _die_with_parent,
    )


def why_not(host: str, code: int, said: str) -> str:
    """What it means that ssh ended like this.

    Args:
        code: ssh's exit code; 255 is its own, every other the remote command's.
        said: its standard error.
    """
    for words, cure in CURES:
        if code == 255 and words in said:
            return f"{host}: {cure.format(host=host)}"
    last = said.strip().splitlines()[-1:] or ["without a word"]
    if code == 255:
        return f"{host}: ssh failed: {last[0]}"
    return f"{host}: the command there ended with {code}: {last[0]}"


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

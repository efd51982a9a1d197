"""Runs commands on other hosts through the user's own ssh setup: keys, known hosts, aliases. No check is disabled."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from dtrain.distributed import linux_process

CONNECT_TIMEOUT_S = 6
"""A host that does not answer within this time is unreachable. TCP retries at 1 and 3 s; a launch must fail within 10 s."""

KEEPALIVE_S, KEEPALIVE_COUNT = 15, 20
"""ssh probes a silent host at this interval and disconnects after this many probes. The limit is long because the
job's own monitoring must detect the loss first."""

NO_SSH = "there is no ssh program on this machine. Install it: apt-get install openssh-client"

SSH_ERRORS = (
    ("Permission denied", "its sshd rejects your key. Copy the key to the host: ssh-copy-id {host}."),
    (
        "IDENTIFICATION HAS CHANGED",
        "its host key differs from known_hosts. If the new key is right: ssh-keygen -R {host}.",
    ),
    ("Host key verification failed", "its host key is not known here. Log in once and compare it: ssh {host}."),
    ("Could not resolve hostname", "its name does not resolve here. Fix the hostfile, /etc/hosts or the ssh config."),
    ("Connection refused", "the host is up, but no sshd answers. Start sshd, or set its port in the ssh config."),
    ("timed out", "it does not answer. Is it on, and is the network up?"),
    ("No route to host", "there is no route to it. Is it on, and is the network up?"),
    ("Network is unreachable", "there is no route to it from this machine. Is the network up?"),
)
"""Texts that ssh writes to standard error, and an explanation with a fix for each."""


def is_local(host: str) -> bool:
    """Returns whether a host is this machine, so that no ssh is needed: only a local address can be bound."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def command_on(host: str, argv: Sequence[str]) -> list[str]:
    """Returns the command that runs `argv` on a host: unchanged on this machine, over ssh elsewhere.

    The remote shell receives every word quoted.
    """
    if is_local(host):
        return list(argv)
    options = {
        "BatchMode": "yes",  # never asks for a password
        "ConnectTimeout": CONNECT_TIMEOUT_S,
        "ServerAliveInterval": KEEPALIVE_S,
        "ServerAliveCountMax": KEEPALIVE_COUNT,
    }
    option_words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-T", *option_words, host, f"exec {shlex.join(argv)}"]


def python_command(env: Mapping[str, str]) -> list[str]:
    """Returns the command of this Python, with the search paths for libraries and packages that are set in `env`."""
    paths = [f"{name}={env[name]}" for name in ("LD_LIBRARY_PATH", "PYTHONPATH") if env.get(name)]
    return ["env", *paths, sys.executable] if paths else [sys.executable]


def start_on(host: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a command on a host, with pipes to all its streams.

    It runs in a new session, so that Ctrl-C reaches only this process, which forwards it, and does not kill ssh.

    Raises:
        FileNotFoundError: this machine has no ssh.
    """
    return subprocess.Popen(
        command_on(host, argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=None if is_local(host) else partial(linux_process.send_on_parent_death, signal.SIGTERM),
    )


def explain_exit(host: str, code: int, stderr: str) -> str:
    """Returns why a command on a host failed, with a fix where ssh's message is a known one.

    Args:
        code: the exit code; 255 comes from ssh itself, any other from the remote command.
        stderr: the text that the command wrote to standard error.
    """
    for text, explanation in SSH_ERRORS:
        if code == 255 and text in stderr:
            return f"{host}: {explanation.format(host=host)}"
    last = stderr.strip().splitlines()[-1:] or ["no error message"]
    if code == 255:
        return f"{host}: ssh failed: {last[0]}"
    return f"{host}: the remote command exited with code {code}: {last[0]}"

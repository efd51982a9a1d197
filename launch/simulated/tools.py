"""The programs that a simulated cluster needs, and the Debian packages that have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simulated.cluster import Problem

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "ip": "iproute2"}
FOR_LAUNCHERS = {"pdsh": "pdsh"}
"""What `deepspeed` needs on top; a cluster comes up without it."""

POLICY = Path("/usr/sbin/policy-rc.d")
NO_SERVICE = "#!/bin/sh\n# Of launch/simulate-cluster while it installs: Debian is to start no service. May be removed.\nexit 101\n"

SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
INSTALL_S = 900


def program(name: str) -> str | None:
    """Its full path. Those of the superuser are found also where PATH leaves them out."""
    return shutil.which(name) or shutil.which(name, path=SYSTEM_PATH)


def missing(needed: dict[str, str]) -> list[str]:
    """Packages to install, each once."""
    return sorted({package for name, package in needed.items() if program(name) is None})


def check() -> None:
    """Raises Problem if a cluster cannot come up on this machine."""
    check_root()
    if not Path("/dev/net/tun").exists():
        raise Problem("/dev/net/tun is missing: `modprobe tun`, or start the container with `--device /dev/net/tun`.")
    if packages := missing(PACKAGES):
        raise Problem(
            f"Not installed: {', '.join(packages)}. On Debian and Ubuntu: "
            f"apt-get install -y --no-install-recommends {' '.join(packages)}"
        )


def check_root() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        found = f"user {os.geteuid()}" if sys.platform == "linux" else sys.platform
        raise Problem(f"A simulated cluster needs Linux and root, and this is {found}. Try sudo.")


def install() -> None:
    """Installs with apt-get what is missing. Raises Problem where it cannot."""
    check_root()
    packages = missing({**PACKAGES, **FOR_LAUNCHERS})
    if not packages:
        return
    apt = shutil.which("apt-get")
    if apt is None:
        raise Problem(f"Not installed: {', '.join(packages)}; there is no apt-get here. Install what holds them.")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = [apt, "install", "-y", "--no-install-recommends", *packages]
    sys.stdout.write(f"{' '.join(command)}  # no service of theirs is started\n")
    sys.stdout.flush()
    # A fresh container has no lists; where they cannot be had, older ones may do.
    subprocess.run([apt, "update", "-qq"], env=environment, stdin=subprocess.DEVNULL, check=False, timeout=INSTALL_S)
    with no_service_starts():
        ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False, timeout=INSTALL_S)
    if ended.returncode != 0:
        raise Problem("apt-get could not install them: see above.")


@contextmanager
def no_service_starts(policy: Path = POLICY) -> Iterator[None]:
    """Inside, an installed package starts no service, such as an ssh server for everybody. A policy that is there stays."""
    with suppress(OSError), policy.open("x") as file:
        file.write(NO_SERVICE)
        policy.chmod(0o755)
    try:
        yield
    finally:
        # Also one that an interrupted install left.
        with suppress(OSError, UnicodeDecodeError):
            if policy.read_text() == NO_SERVICE:
                policy.unlink()

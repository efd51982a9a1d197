"""The programs that a simulated cluster needs, and the Debian packages that contain them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simulated.cluster import ClusterError

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "ip": "iproute2"}
FOR_LAUNCHERS = {"pdsh": "pdsh"}
"""Additional programs for `deepspeed`. A cluster starts without them."""

POLICY = Path("/usr/sbin/policy-rc.d")
NO_SERVICE = "#!/bin/sh\n# Of launch/simulate-cluster: no service starts while it installs packages. This file may be removed.\nexit 101\n"

SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
INSTALL_S = 900


def program(name: str) -> str | None:
    """Returns a program's full path. Also searches the folders of system programs, which PATH may not include."""
    return shutil.which(name) or shutil.which(name, path=SYSTEM_PATH)


def missing(needed: dict[str, str]) -> list[str]:
    """Returns the packages to install, each once."""
    return sorted({package for name, package in needed.items() if program(name) is None})


def check() -> None:
    """Checks that this machine can run a cluster.

    Raises:
        ClusterError: it cannot.
    """
    check_root()
    if not Path("/dev/net/tun").exists():
        raise ClusterError(
            "/dev/net/tun is missing: `modprobe tun`, or start the container with `--device /dev/net/tun`."
        )
    if packages := missing(PACKAGES):
        raise ClusterError(
            f"Not installed: {', '.join(packages)}. On Debian and Ubuntu: "
            f"apt-get install -y --no-install-recommends {' '.join(packages)}"
        )


def check_root() -> None:
    """Checks that this is Linux and the user is root.

    Raises:
        ClusterError: it is not.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        current = f"user {os.geteuid()}" if sys.platform == "linux" else sys.platform
        raise ClusterError(f"A simulated cluster needs Linux and root, but this is {current}. Try sudo.")


def install() -> None:
    """Installs missing packages with apt-get.

    Raises:
        ClusterError: they cannot be installed.
    """
    check_root()
    packages = missing({**PACKAGES, **FOR_LAUNCHERS})
    if not packages:
        return
    apt = shutil.which("apt-get")
    if apt is None:
        raise ClusterError(
            f"Not installed: {', '.join(packages)}; this machine has no apt-get. Install the programs of these packages."
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = [apt, "install", "-y", "--no-install-recommends", *packages]
    sys.stdout.write(f"{' '.join(command)}  # starts none of their services\n")
    sys.stdout.flush()
    # A fresh container has no package lists. If they cannot be downloaded, older ones may be enough.
    subprocess.run([apt, "update", "-qq"], env=environment, stdin=subprocess.DEVNULL, check=False, timeout=INSTALL_S)
    with no_service_starts():
        ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False, timeout=INSTALL_S)
    if ended.returncode != 0:
        raise ClusterError("apt-get could not install them: see above.")


@contextmanager
def no_service_starts(policy: Path = POLICY) -> Iterator[None]:
    """Prevents that packages start a service when they are installed, such as an ssh server. An existing policy is kept."""
    with suppress(OSError), policy.open("x") as file:
        file.write(NO_SERVICE)
        policy.chmod(0o755)
    try:
        yield
    finally:
        # Also removes the file of an interrupted installation.
        with suppress(OSError, UnicodeDecodeError):
            if policy.read_text() == NO_SERVICE:
                policy.unlink()

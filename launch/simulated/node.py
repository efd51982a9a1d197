"""One node: a set of namespaces that one process holds. When it is killed, everything on the node ends.

`simulate-cluster up` starts it as `node.py FOLDER NAME SOCKET_FD`. Over the socket it sends JSON messages: the process ID
of its init; its network device, as a descriptor; and that it is ready, or an error. The socket stays open as long as the
init runs: the switch holds the other end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulated import linux
from simulated.cluster import NODE_FOLDER, TMPDIR, Cluster, Node, read
from simulated.tools import program

DEVICE = "eth0"
MTU = 9000
SSHD_START_S = 15.0
SYSCTL = {
    # The kernel's defaults, so that the cluster is the same on a machine with other settings.
    "net/ipv4/tcp_congestion_control": "cubic",
    "net/ipv4/tcp_rmem": "4096 131072 6291456",
    "net/ipv4/tcp_wmem": "4096 16384 4194304",
    f"net/ipv6/conf/{DEVICE}/disable_ipv6": "1",  # the switch supports IPv4 only
}


def main() -> None:
    """Forks. The child is process 1 of the node. The parent is outside the PID namespace, so it knows the child's real ID."""
    folder, name, descriptor = sys.argv[1:]
    cluster = read(Path(folder))
    node = cluster.node(name)
    to_up = socket.socket(fileno=int(descriptor))
    to_up.set_inheritable(False)
    try:
        linux.unshare("ipc", "uts", "net", "pid", "mnt")
    except OSError as error:
        _send(
            to_up, error=f"{error.strerror}: root may not create namespaces here (a container without CAP_SYS_ADMIN?)."
        )
        sys.exit(1)
    init = os.fork()
    if init:
        _send(to_up, pid=init)
        os._exit(0)
    try:
        _boot(cluster, node, to_up)
    except BaseException as error:  # noqa: BLE001  # the caller needs every error
        traceback.print_exc()
        _send(to_up, error=f"{type(error).__name__}: {error}")
        os._exit(1)
    _send(to_up, ready=True)
    _reap()


def _send(to_up: socket.socket, **message: object) -> None:
    to_up.send(json.dumps(message).encode())


def _boot(cluster: Cluster, node: Node, to_up: socket.socket) -> None:
    linux.name_process(f"init-{node.name}")
    socket.sethostname(node.name)
    device = linux.open_tun(DEVICE)
    _mount(cluster, node)
    _connect(cluster, node)
    socket.send_fds(to_up, [b'{"device": true}'], [device])
    os.close(device)  # only the switch keeps it, so that the link ends with the switch
    _start_sshd()


def _mount(cluster: Cluster, node: Node) -> None:
    """Mounts the node's files over those of this machine. The mounts are visible on the node only."""
    part = cluster.part(node)
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("proc", "/proc", "proc")
    linux.mount("tmpfs", "/dev/shm", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=1777")
    _mount_network_folders(part)
    for name, target in (
        ("hosts", "/etc/hosts"),
        ("hostname", "/etc/hostname"),
        ("passwd", "/etc/passwd"),
        ("shadow", "/etc/shadow"),
        ("boot_id", "/proc/sys/kernel/random/boot_id"),  # differs between machines
    ):
        if Path(target).exists():
            linux.mount(part / name, target, flags=linux.MS_BIND)
    for index, target in enumerate(cluster.private):
        linux.mount(part / "private" / str(index), target, flags=linux.MS_BIND)
    # /run is last: the cluster's folder is usually in it, and is no longer visible after this mount.
    run = part / "run"
    run.mkdir()
    linux.mount("tmpfs", run, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    for name in ("sshd", "lock", Path(NODE_FOLDER).name, Path(TMPDIR).name):
        (run / name).mkdir()
    (run / Path(TMPDIR).name).chmod(0o1777)
    linux.mount(part, run / Path(NODE_FOLDER).name, flags=linux.MS_BIND)
    linux.mount(run, "/run", flags=linux.MS_BIND | linux.MS_REC)


def _mount_network_folders(part: Path) -> None:
    """Mounts the network folders of /sys, which show the devices of the namespace in which /sys was mounted.

    Mounting a complete new /sys would hide the control groups in it.
    """
    system = part / "sys"
    system.mkdir()
    linux.mount("sysfs", system, "sysfs")
    for folder in ("class/net", "devices/virtual/net"):
        linux.mount(system / folder, f"/sys/{folder}", flags=linux.MS_BIND)


def _connect(cluster: Cluster, node: Node) -> None:
    for name, value in SYSCTL.items():
        with suppress(OSError):  # a kernel without IPv6, or with another default
            Path("/proc/sys", name).write_text(value)
    for arguments in (
        ["link", "set", "lo", "up"],
        ["address", "add", f"{node.address}/24", "dev", DEVICE],
        ["link", "set", DEVICE, "mtu", str(MTU), "up"],
    ):
        subprocess.run(["ip", *arguments], check=True, timeout=30)
    with suppress(OSError):  # only for display; kernels before 4.20 do not support it
        linux.set_link_speed(DEVICE, cluster.rate_mbit)


def _start_sshd() -> None:
    """Starts the ssh server.

    Raises:
        RuntimeError: it does not listen within SSHD_START_S.
    """
    config, log = f"{NODE_FOLDER}/sshd_config", f"{NODE_FOLDER}/sshd.log"
    # Started by its full path, because it executes itself for each connection.
    server = subprocess.Popen(
        [program("sshd") or "sshd", "-D", "-f", config, "-E", log],
        stdin=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": os.environ["PATH"]},
    )
    deadline = time.monotonic() + SSHD_START_S
    while True:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", 22), timeout=1.0).close()
            return
        if server.poll() is not None or time.monotonic() > deadline:
            output = Path(log).read_text() if Path(log).exists() else ""
            raise RuntimeError(f"its ssh server does not start: {output.strip() or 'no error message'}")
        time.sleep(0.02)


def _reap() -> NoReturn:
    """Reaps ended processes of the node, which is the duty of process 1."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # so that no SIGCHLD between the two calls is lost
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait({signal.SIGCHLD})


if __name__ == "__main__":
    main()

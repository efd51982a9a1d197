"""One node: namespaces of its own, held by one process. When that is killed, everything on the node is gone.

Started by `simulate-cluster up` as `node.py FOLDER NAME SOCKET_FD`. Over the socket it says, as JSON, its init's
process number, then hands over its network device, then says that it is ready, or what went wrong. The socket stays
open as long as the init lives: the switch holds the other end.
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
    # The kernel's own defaults, whatever this machine is tuned to: the same cluster everywhere.
    "net/ipv4/tcp_congestion_control": "cubic",
    "net/ipv4/tcp_rmem": "4096 131072 6291456",
    "net/ipv4/tcp_wmem": "4096 16384 4194304",
    f"net/ipv6/conf/{DEVICE}/disable_ipv6": "1",  # the switch knows IPv4 only
}


def main() -> None:
    """Forks: the parent, still outside, can see the init's number; the child is process 1 of the node."""
    folder, name, descriptor = sys.argv[1:]
    cluster = read(Path(folder))
    node = cluster.node(name)
    to_up = socket.socket(fileno=int(descriptor))
    to_up.set_inheritable(False)
    try:
        linux.unshare("ipc", "uts", "net", "pid", "mnt")
    except OSError as error:
        _say(to_up, error=f"{error.strerror}. Root here may not make namespaces (a container without CAP_SYS_ADMIN?).")
        sys.exit(1)
    init = os.fork()
    if init:
        _say(to_up, pid=init)
        os._exit(0)
    try:
        _boot(cluster, node, to_up)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the caller must hear of it
        traceback.print_exc()
        _say(to_up, error=f"{type(error).__name__}: {error}")
        os._exit(1)
    _say(to_up, ready=True)
    _reap()


def _say(to_up: socket.socket, **words: object) -> None:
    to_up.send(json.dumps(words).encode())


def _boot(cluster: Cluster, node: Node, to_up: socket.socket) -> None:
    linux.name_process(f"init-{node.name}")
    socket.sethostname(node.name)
    device = linux.open_tun(DEVICE)
    _mount(cluster, node)
    _connect(cluster, node)
    socket.send_fds(to_up, [b'{"device": true}'], [device])
    os.close(device)  # the switch's alone: when it ends, so does the link
    _start_sshd()


def _mount(cluster: Cluster, node: Node) -> None:
    """The node's own files in the places of this machine's. Seen on the node only."""
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
        ("boot_id", "/proc/sys/kernel/random/boot_id"),  # another machine has another
    ):
        if Path(target).exists():
            linux.mount(part / name, target, flags=linux.MS_BIND)
    for index, target in enumerate(cluster.private):
        linux.mount(part / "private" / str(index), target, flags=linux.MS_BIND)
    # /run comes last: the cluster's folder usually lies in it, and is out of sight from then on.
    run = part / "run"
    run.mkdir()
    linux.mount("tmpfs", run, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    for name in ("sshd", "lock", Path(NODE_FOLDER).name, Path(TMPDIR).name):
        (run / name).mkdir()
    (run / Path(TMPDIR).name).chmod(0o1777)
    linux.mount(part, run / Path(NODE_FOLDER).name, flags=linux.MS_BIND)
    linux.mount(run, "/run", flags=linux.MS_BIND | linux.MS_REC)


def _mount_network_folders(part: Path) -> None:
    """/sys/class/net shows the devices of the namespace in which /sys was mounted: only that part is put in its place.

    A whole new /sys would hide the control groups below it.
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
    for words in (
        ["link", "set", "lo", "up"],
        ["address", "add", f"{node.address}/24", "dev", DEVICE],
        ["link", "set", DEVICE, "mtu", str(MTU), "up"],
    ):
        subprocess.run(["ip", *words], check=True, timeout=30)
    with suppress(OSError):  # shown only; kernels before 4.20 cannot
        linux.set_link_speed(DEVICE, cluster.rate_mbit)


def _start_sshd() -> None:
    """Raises RuntimeError if it does not listen within SSHD_START_S."""
    config, log = f"{NODE_FOLDER}/sshd_config", f"{NODE_FOLDER}/sshd.log"
    # By its full path: it starts itself again for each connection.
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
            said = Path(log).read_text() if Path(log).exists() else ""
            raise RuntimeError(f"its ssh server does not start: {said.strip() or 'it says nothing'}")
        time.sleep(0.02)


def _reap() -> NoReturn:
    """Collects what ends on the node, as process 1 has to."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # an end between the two calls is not missed
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait({signal.SIGCHLD})


if __name__ == "__main__":
    main()

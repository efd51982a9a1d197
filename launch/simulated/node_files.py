"""Creates each node's files: home, keys, hosts file, accounts, and the settings of its ssh server."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path

from simulated.cluster import HOME, NODE_FOLDER, TMPDIR, Cluster, Node

SSHD = f"""\
Port 22
HostKey {NODE_FOLDER}/host_key
PidFile {NODE_FOLDER}/sshd.pid
AuthorizedKeysFile .ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
AcceptEnv LANG LC_*
SetEnv TMPDIR={TMPDIR} OMP_NUM_THREADS=%d
MaxStartups 200
MaxSessions 200
Subsystem sftp internal-sftp
"""
"""Like the servers of a real cluster, except the number of threads per rank and the two limits, which a launcher that
opens many sessions in parallel might reach."""


def create_files(cluster: Cluster) -> None:
    """Writes every node's part of the cluster's folder."""
    for node in cluster.nodes:
        part = cluster.part(node)
        (part / "home" / ".ssh").mkdir(parents=True, mode=0o700)
        for index, _ in enumerate(cluster.private):
            (part / "private" / str(index)).mkdir(parents=True)
        _create_key(part / "host_key", node.name)
        _create_key(part / "home" / ".ssh" / "id_ed25519", f"root@{node.name}")
        (part / "hosts").write_text(_hosts_file(cluster))
        (part / "hostname").write_text(f"{node.name}\n")
        (part / "passwd").write_text(_passwd_file())
        (part / "shadow").write_text(_shadow_file())
        (part / "boot_id").write_text(f"{uuid.uuid4()}\n")
        (part / "sshd_config").write_text(SSHD % cluster.threads)
        for secret in ("shadow", "home", "host_key"):
            (part / secret).chmod(0o700 if secret == "home" else 0o600)
    for node in cluster.nodes:
        _write_ssh_files(cluster, cluster.part(node) / "home" / ".ssh")


def _create_key(path: Path, comment: str) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)


def _write_ssh_files(cluster: Cluster, folder: Path) -> None:
    """Writes a node's ssh files. All nodes accept each other's keys and host keys, so that ssh asks no questions."""
    user_keys = [(cluster.part(node) / "home" / ".ssh" / "id_ed25519.pub").read_text() for node in cluster.nodes]
    (folder / "authorized_keys").write_text("".join(user_keys))
    (folder / "known_hosts").write_text("".join(_known_hosts_line(cluster, node) for node in cluster.nodes))
    names = " ".join(node.name for node in cluster.nodes)
    # A node uses its own key and no agent, even if `exec` passes on SSH_AUTH_SOCK.
    config = ("User root", "IdentityFile ~/.ssh/id_ed25519", "IdentitiesOnly yes", "IdentityAgent none")
    (folder / "config").write_text("".join([f"Host {names}\n", *(f"    {line}\n" for line in config)]))
    for path in folder.iterdir():
        path.chmod(0o600)


def _known_hosts_line(cluster: Cluster, node: Node) -> str:
    kind, key, *_ = (cluster.part(node) / "host_key.pub").read_text().split()
    return f"{node.name},{node.address} {kind} {key}\n"


def _hosts_file(cluster: Cluster) -> str:
    nodes = "".join(f"{node.address} {node.name}\n" for node in cluster.nodes)
    return f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{nodes}"


def _passwd_file() -> str:
    """Returns this machine's accounts, but root's home is the node's: ssh looks there, regardless of $HOME."""
    lines = []
    for line in Path("/etc/passwd").read_text().splitlines():
        name, *fields = line.split(":")
        if name == "root" and len(fields) == 6:
            fields[4] = HOME
            fields[5] = "/bin/bash" if shutil.which("bash", path="/bin") else "/bin/sh"
        lines.append(":".join([name, *fields]))
    return "\n".join(lines) + "\n"


def _shadow_file() -> str:
    """Returns accounts without passwords. If root is locked ("!") on this machine, it must not be locked on the nodes."""
    return "root:*:19000:0:99999:7:::\n"

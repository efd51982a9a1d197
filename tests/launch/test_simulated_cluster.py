"""launch/simulate-cluster: nodes on one machine that are similar to real ones, and their links."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.jobs import until
from tests.support.simulated import SimulatedCluster, gone, needs_cluster, simulated_cluster

pytestmark = pytest.mark.launchers

PYTHON = sys.executable
LIMIT_S = 30.0
DEBIAN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LISTEN = """
import socket
server = socket.socket()
server.bind((socket.gethostbyname(socket.gethostname()), 0))
server.listen()
print(server.getsockname()[1], flush=True)
peer, _ = server.accept()
"""
ECHO = LISTEN + "while data := peer.recv(65536):\n    peer.sendall(data)\n"
COUNT = (
    LISTEN
    + "got, start = 0, None\n"
    + (
        "while data := peer.recv(1 << 20):\n    start = start or time.monotonic()\n    got += len(data)\n"
        "print(got, time.monotonic() - start)\n"
    )
)
CONNECT = "import socket, sys, time\npeer = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def three_nodes(shared: Path) -> Iterator[SimulatedCluster]:
    with simulated_cluster(3, slots=[1, 2, 3], private=[shared / "private"]) as up:
        yield up


@pytest.fixture
def cluster(three_nodes: SimulatedCluster) -> Iterator[SimulatedCluster]:
    """Three nodes for tests that do not change them; each node has its own copy of `private` in `shared`."""
    yield three_nodes
    three_nodes.end_started()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Each node behaves like a separate machine


@needs_cluster
def test_nodes_reach_each_other_by_name_over_ssh_without_questions(cluster: SimulatedCluster) -> None:
    for node, other in (("node1", "node2"), ("node2", "node3"), ("node3", "node1"), ("node2", "node2")):
        result = cluster.exec(node, ["ssh", "-o", "BatchMode=yes", other, "hostname; echo $HOME $PATH; exit 7"])

        assert (result.returncode, result.stderr) == (7, "")
        # As on a real node, the PATH does not include .venv.
        assert result.stdout == f"{other}\n/run/node/home {DEBIAN_PATH}\n"


@needs_cluster
def test_an_unknown_host_key_is_refused(cluster: SimulatedCluster) -> None:
    command = ["ssh", "-o", "BatchMode=yes", "-o", "UserKnownHostsFile=/dev/null", "node2", "hostname"]

    result = cluster.exec("node1", command)

    assert (result.returncode, result.stdout) == (255, "")
    assert "Host key verification failed" in result.stderr


@needs_cluster
def test_a_node_has_its_own_name_address_and_processes(cluster: SimulatedCluster) -> None:
    script = (
        "hostname; cat /etc/hostname; getent hosts $(hostname); hostname -I; cat /proc/sys/kernel/random/boot_id; ps ax"
    )
    outputs = [cluster.exec(node, ["sh", "-c", script]).stdout.splitlines() for node in cluster.names]

    for number, (node, lines) in enumerate(zip(cluster.names, outputs, strict=True), start=1):
        assert lines[:2] == [node, node]
        assert lines[2].split() == [f"10.77.0.{number}", node]
        assert lines[3].split() == [f"10.77.0.{number}"] == [cluster.address(node)]
        assert len(lines[5:]) < 10  # ps, sh, its init, its ssh server
    assert len({lines[4] for lines in outputs}) == 3
    assert socket.gethostname() not in cluster.names


@needs_cluster
def test_private_folders_are_separate_and_everything_else_is_shared(cluster: SimulatedCluster, shared: Path) -> None:
    for node in cluster.names:
        cluster.exec(node, ["sh", "-c", f"echo {node} >{shared}/private/mine; echo {node} >>{shared}/all"], check=True)

    for node in cluster.names:
        assert cluster.exec(node, ["cat", f"{shared}/private/mine"]).stdout == f"{node}\n"
        assert cluster.exec(node, ["cat", f"{shared}/all"]).stdout.split() == cluster.names
    assert list((shared / "private").iterdir()) == []


@needs_cluster
def test_the_hostfile_has_the_slots_of_each_node(cluster: SimulatedCluster) -> None:
    lines = cluster.hostfile.read_text().splitlines()

    assert [line for line in lines if not line.startswith("#")] == ["node1 slots=1", "node2 slots=2", "node3 slots=3"]


# exec


@needs_cluster
def test_exec_passes_on_code_streams_folder_and_environment(cluster: SimulatedCluster, tmp_path: Path) -> None:
    script = "cat; pwd; echo $WORD $HOME $HOSTNAME; echo bad >&2; exit 3"

    result = cluster.exec("node2", ["sh", "-c", script], input="in\n", cwd=tmp_path, env={"WORD": "a b"})

    assert (result.returncode, result.stderr) == (3, "bad\n")
    assert result.stdout == f"in\n{tmp_path}\na b /run/node/home node2\n"


@needs_cluster
@pytest.mark.parametrize("through", [[], ["ssh", "node3"]])
def test_ranks_share_the_machines_cores(
    cluster: SimulatedCluster, through: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    result = cluster.exec("node2", [*through, "printenv", "OMP_NUM_THREADS", "TMPDIR"], check=True)

    assert result.stdout == f"{max(1, len(os.sched_getaffinity(0)) // 6)}\n/run/tmp\n"  # slots: 1, 2 and 3


@needs_cluster
@pytest.mark.parametrize(
    ("command", "code"), [(["no-such-command"], 127), (["/etc/hosts"], 126), (["sh", "-c", "kill -9 $$"], 137)]
)
def test_exec_has_the_exit_codes_of_a_shell(cluster: SimulatedCluster, command: list[str], code: int) -> None:
    assert cluster.exec("node1", command).returncode == code


@needs_cluster
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_exec_reaches_the_command_once(cluster: SimulatedCluster, sent: signal.Signals) -> None:
    script = (
        f"import signal, sys, time\nseen = []\nsignal.signal({sent.value}, lambda *_: seen.append(1))\n"
        "print('ready', flush=True)\nwhile not seen: time.sleep(0.01)\ntime.sleep(0.2)\nsys.exit(40 + len(seen))"
    )
    process = cluster.start("node1", [PYTHON, "-c", script], start_new_session=True)
    assert line_of(process) == "ready"

    os.killpg(process.pid, sent)  # like a terminal or a batch system; the command must not get the signal twice

    assert process.wait(LIMIT_S) == 41


@needs_cluster
@pytest.mark.parametrize("is_hung_up", [False, True])
def test_a_terminal_ends_a_command_that_does_not_read_from_it(
    cluster: SimulatedCluster, is_hung_up: bool, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    script = (
        "import signal, sys, time\nfor number in (signal.SIGINT, signal.SIGHUP):\n"
        f"    signal.signal(number, lambda got, _: (open({str(seen)!r}, 'w').write(str(int(got))), sys.exit(3)))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\ntime.sleep(60)"
    )
    command = cluster.command("node1", [PYTHON, "-c", script])

    def has_ended() -> bool:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    child, terminal = pty.fork()
    if child == 0:
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.execve(command[0], command, {**os.environ, **cluster.env})
    try:
        assert until((tmp_path / "ready").exists, LIMIT_S)
        if not is_hung_up:
            os.write(terminal, b"\x03")  # Ctrl-C
            assert until(has_ended, LIMIT_S)
        os.close(terminal)
        assert until(has_ended, LIMIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert int(seen.read_text()) == (signal.SIGHUP if is_hung_up else signal.SIGINT)


@needs_cluster
def test_nodes_do_not_use_the_callers_ssh_agent(cluster: SimulatedCluster, tmp_path: Path) -> None:
    result = cluster.exec("node1", ["ssh", "-G", "node2"], env={"SSH_AUTH_SOCK": str(tmp_path / "agent")})

    lines = result.stdout.splitlines()
    assert {"identityagent none", "identitiesonly yes"} <= set(lines)


@needs_cluster
def test_a_process_name_that_is_truncated_within_a_character_does_no_harm(cluster: SimulatedCluster) -> None:
    name = "ctypes.CDLL(None).prctl(15, b'x' * 14 + b'\\xc3', 0, 0, 0)"
    other = cluster.start(
        "node1", [PYTHON, "-c", f"import ctypes; {name}; print('ready', flush=True); input()"], stdin=-1
    )
    assert line_of(other) == "ready"

    result = cluster.exec("node2", ["true"])

    assert (result.returncode, result.stderr) == (0, "")


@needs_cluster
def test_a_killed_exec_ends_the_command(cluster: SimulatedCluster) -> None:
    process = cluster.start("node1", [PYTHON, "-c", "print('ready', flush=True); import time; time.sleep(4321)"])
    assert line_of(process) == "ready"

    process.kill()

    assert gone("time.sleep(4321)")


@needs_cluster
def test_the_error_for_an_unknown_node_lists_the_nodes(cluster: SimulatedCluster) -> None:
    for command in (["exec", "node4", "true"], ["cut", "node4"]):
        result = cluster.run(*command)

        assert result.returncode == 2
        assert result.stderr == "node4 is not a node of this cluster: node1 to node3.\n"


# Links


def connection(
    cluster: SimulatedCluster, server: str, client: str
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Starts a server on one node and its client on another; both scripts begin with `import time`."""
    listening = cluster.start("node2", [PYTHON, "-c", "import time\n" + server])
    port = line_of(listening)
    return listening, cluster.start("node1", [PYTHON, "-c", CONNECT + client, "node2", port], stdin=subprocess.PIPE)


ASK = """
print("connected", flush=True)
for line in sys.stdin:
    peer.settimeout(float(line))
    peer.sendall(b"x")
    try:
        print(peer.recv(100), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


def ask(client: subprocess.Popen[str], seconds: float) -> str:
    """Sends a byte and returns what arrives within this time."""
    assert client.stdin is not None
    client.stdin.write(f"{seconds}\n")
    client.stdin.flush()
    return line_of(client)


@needs_cluster
def test_a_cut_causes_no_error_and_a_connection_survives_it(cluster: SimulatedCluster) -> None:
    _, client = connection(cluster, ECHO, ASK)
    assert line_of(client) == "connected"
    assert ask(client, 10.0) == "b'x'"

    cluster.cut("node2")
    during = ask(client, 0.5)
    state, carrier = cluster.status("node2")["state"], cluster.exec("node2", ["cat", "/sys/class/net/eth0/carrier"])
    refused = cluster.exec("node3", ["ssh", "-o", "ConnectTimeout=1", "node2", "true"])
    cluster.heal("node2")
    after = ask(client, 20.0)

    assert during == "TimeoutError"
    assert (state, carrier.stdout) == ("cut", "1\n")
    assert "timed out" in refused.stderr
    assert set(after) == set("b'xx'")  # the two answers may arrive separately
    assert cluster.status("node2")["state"] == "up"
    assert cluster.status("node3")["dropped_packets"] > 0


@needs_cluster
def test_rate_and_delay_are_as_requested() -> None:
    with simulated_cluster(2, rate_mbit=200, delay_ms=5) as shaped:
        latency = (
            "peer.setsockopt(6, 1, 1)\ntook = []\nfor _ in range(30):\n    start = time.perf_counter()\n"
            "    peer.sendall(b'x')\n    peer.recv(1)\n    took.append(time.perf_counter() - start)\nprint(min(took))\n"
        )
        _, client = connection(shaped, ECHO, latency)
        seconds = float(line_of(client))
        speeds = []
        for _ in range(3):  # a delayed switch has a lower rate, never a higher one
            server, client = connection(shaped, COUNT, "for _ in range(20): peer.sendall(bytes(1 << 20))\n")
            got, took = map(float, line_of(server).split())
            speeds.append(8 * got / took / 1e6)
        speed = shaped.exec("node1", ["cat", "/sys/class/net/eth0/speed"])

        assert 0.010 <= seconds < 0.013
        assert max(speeds) == pytest.approx(200, rel=0.1)
        assert speed.stdout == "200\n"
        assert shaped.status("node1")["sent_bytes"] == pytest.approx(3 * got, rel=0.1)


@needs_cluster
def test_a_node_without_power_ends_and_the_others_get_no_signal() -> None:
    with simulated_cluster(2) as cluster:
        _, client = connection(cluster, ECHO, ASK)
        assert line_of(client) == "connected"
        detached = cluster.exec("node2", ["sh", "-c", "setsid sleep 54321 >/dev/null 2>&1 & sleep 0"])
        assert detached.returncode == 0

        cluster.kill_node("node2")

        assert gone("sleep 54321", seconds=1.0)
        assert ask(client, 0.5) == "TimeoutError"
        assert cluster.status("node2")["state"] == "killed"
        result = cluster.exec("node2", ["true"])
        assert result.returncode == 4
        assert "node2 is not running" in result.stderr


# A process group


RANK = """
import datetime, os, sys
import torch, torch.distributed as dist
os.environ.update(MASTER_ADDR="10.77.0.1", MASTER_PORT=sys.argv[2], GLOO_SOCKET_IFNAME="eth0")
dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, timeout=datetime.timedelta(seconds=60))
value = torch.tensor([float(sys.argv[1]) + 1])
dist.all_reduce(value)
print(os.uname().nodename, value.item(), flush=True)
dist.barrier()
os._exit(0)
"""


@needs_cluster
def test_a_process_group_forms_over_ssh(cluster: SimulatedCluster, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    port = "29411"  # free: the address belongs to this node only
    first = cluster.start("node1", [PYTHON, str(script), "0", port])

    second = cluster.exec("node1", ["ssh", "node2", PYTHON, str(script), "1", port], timeout=120)

    assert second.stdout == "node2 3.0\n", second.stderr
    assert first.communicate(timeout=60)[0] == "node1 3.0\n"
    assert cluster.status("node1")["sent_bytes"] > 0

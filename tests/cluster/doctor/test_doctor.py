"""The doctor on simulated clusters: each planted fault is reported with its fix, and a healthy cluster is green."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import until
from tests.support.simulated import ROOT, SimulatedCluster, needs_cluster, simulated_cluster

pytestmark = pytest.mark.launchers

PYTHON = sys.executable
LIMIT_S = 240.0
AGENT = "agent['follow_orders']()"
"""Part of the command line of the doctor's agent on a host."""

LINK_TEST = "dtrain.commands.link_test"
"""Part of the command lines of the doctor's ranks."""


def on_a_cluster(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a simulated cluster. All are slow: together they take more than a minute."""
    marked: Callable[..., None] = needs_cluster(pytest.mark.slow(test))
    return marked


def doctor(cluster: SimulatedCluster, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command on node1."""
    command = [PYTHON, "dtrain/main.py", "doctor", "--hostfile", str(cluster.hostfile), *words]
    return cluster.exec("node1", command, cwd=ROOT, timeout=LIMIT_S)


def examined(cluster: SimulatedCluster, *words: str) -> tuple[int, dict[str, Any]]:
    """Returns its exit code and its JSON output."""
    ended = doctor(cluster, "--json", *words)
    assert ended.stdout.startswith("{"), ended.stdout + ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return ended.returncode, found


def rows(found: dict[str, Any], host: str, state: str = "red") -> dict[str, tuple[str, str]]:
    """Returns what was found on a host and the fix, by check."""
    return {
        row["check"]: (row["found"], row["fix"])
        for row in found["findings"]
        if host in row["hosts"] and row["state"] == state
    }


def on(cluster: SimulatedCluster, node: str, *command: str) -> str:
    """Runs a command on a node; it must succeed."""
    ended = cluster.exec(node, command)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def shell(cluster: SimulatedCluster, node: str, script: str) -> None:
    on(cluster, node, "sh", "-c", script)


def replace_python(cluster: SimulatedCluster, node: str, folder: Path, env: str | None) -> None:
    """Makes Python on this node start with another variable in its environment; without `env`, removes it."""
    bin_folder = folder / f"bin-{node}"
    bin_folder.mkdir()
    if env is not None:
        wrapper = bin_folder / Path(PYTHON).name
        wrapper.write_text(f'#!/bin/bash\nexport {env}\nexec -a {PYTHON} {Path(PYTHON).resolve()} "$@"\n')
        wrapper.chmod(0o755)
    on(cluster, node, "mount", "--bind", str(bin_folder), str(Path(PYTHON).parent))


def left_on(cluster: SimulatedCluster, node: str, *words: str) -> list[str]:
    """Returns the command lines on a node that contain one of the words."""
    output = on(
        cluster, node, "sh", "-c", "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f; echo; done 2>/dev/null; true"
    )
    return [line for line in output.splitlines() if any(word in line for word in words) and "for f in" not in line]


@on_a_cluster
def test_a_healthy_cluster_is_green_and_its_rate_is_measured_correctly(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with simulated_cluster(3, rate_mbit=100, delay_ms=5, private=[runs]) as cluster:
        ended = doctor(cluster, f"run.output_dir={runs}")
        code, found = examined(cluster, f"run.output_dir={tmp_path}")
        left = [line for node in cluster.names for line in left_on(cluster, node, AGENT, LINK_TEST)]

    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert lines[-1].startswith("All green: 3 hosts, ")
    assert any(
        "all 3 hosts" in line and "local to each host: 2 of them keep every checkpoint" in line for line in lines
    )
    assert "engine.gradient_wire=bf16" in lines[-2]
    assert ended.stderr == ""
    assert (code, found["green"], found["red"]) == (0, True, 0)
    assert "is shared" in rows(found, "node1", "ok")["shared folder"][0]
    assert sorted(pair["hosts"] for pair in found["links"]["pairs"]) == [
        ["node1", "node2"], ["node1", "node3"], ["node2", "node3"],
    ]  # fmt: skip
    for pair in found["links"]["pairs"]:
        assert 8 * pair["bandwidth"] / 1e6 == pytest.approx(100, rel=0.15)
        assert pair["latency_s"] >= 0.01
    assert left == []
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@on_a_cluster
def test_unreachable_hosts_are_reported_with_the_fix(tmp_path: Path) -> None:
    with simulated_cluster(6) as cluster:
        shell(cluster, "node1", "grep -v ^node2, ~/.ssh/known_hosts >/tmp/k; cat /tmp/k >~/.ssh/known_hosts")
        shell(cluster, "node3", ": >~/.ssh/authorized_keys")
        cluster.kill_node("node4")
        shell(cluster, "node5", "kill $(cat /run/node/sshd.pid)")
        other = "$(grep ^node1, ~/.ssh/known_hosts | cut -d' ' -f2-)"
        shell(
            cluster,
            "node1",
            f'(grep -v ^node6, ~/.ssh/known_hosts; echo "node6,10.77.0.6 {other}") >/tmp/k; cat /tmp/k >~/.ssh/known_hosts',
        )

        code, found = examined(cluster)

    assert code == 4
    for node, what, fix in (
        ("node2", "its host key is not known here", "ssh node2"),
        ("node3", "its sshd rejects your key", "ssh-copy-id node3"),
        ("node4", "it does not answer", "Is it on"),
        ("node5", "no sshd answers", "Start sshd"),
        ("node6", "its host key differs from known_hosts", "ssh-keygen -R node6"),
    ):
        red = rows(found, node)
        assert list(red) == ["ssh"]
        assert what in red["ssh"][0]
        assert fix in red["ssh"][1]
    assert rows(found, "node1") == {}
    assert found["links"] is None


@on_a_cluster
def test_hosts_with_other_software_or_time_are_reported(tmp_path: Path) -> None:
    shim, clock, code_there = tmp_path / "shim", tmp_path / "clock", tmp_path / "dtrain"
    (shim / "torch-9.9.9.dist-info").mkdir(parents=True)
    (shim / "torch-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    clock.mkdir()
    (clock / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 3600\n")
    shutil.copytree(ROOT / "dtrain", code_there)
    (code_there / "training" / "loop.py").write_text("# another commit\n")
    with simulated_cluster(5) as cluster:
        replace_python(cluster, "node2", tmp_path, None)
        replace_python(cluster, "node3", tmp_path, f"PYTHONPATH={shim}")
        on(cluster, "node4", "mount", "--bind", str(code_there), str(ROOT / "dtrain"))
        replace_python(cluster, "node5", tmp_path, f"PYTHONPATH={clock}")

        code, found = examined(cluster)

    assert code == 4
    expected = {
        "node2": ("python", "there is no Python at", "same .venv"),
        "node3": ("torch", "9.9.9, but ", "constraints.txt"),
        "node4": ("dtrain", "but ", "same commit"),
        "node5": ("clock", "3600 s ahead of", "chrony"),
    }
    for node, (check, what, fix) in expected.items():
        red = rows(found, node)
        assert list(red) == [check], red
        assert what in red[check][0]
        assert fix in red[check][1]
    assert rows(found, "node1") == {}


@on_a_cluster
def test_hosts_with_few_resources_or_blocked_ports_are_reported(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with simulated_cluster(5) as cluster:
        shell(cluster, "node2", "echo 127.0.0.1 localhost node1 >/etc/hosts")
        on(cluster, "node3", "mount", "-t", "tmpfs", "-o", "size=64m", "none", "/dev/shm")
        shell(cluster, "node3", "prlimit --nofile=512:512 --pid $(cat /run/node/sshd.pid)")
        on(cluster, "node4", "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(runs))
        shell(cluster, "node4", "echo 127.0.1.1 node4 >/tmp/h; cat /etc/hosts >>/tmp/h; cat /tmp/h >/etc/hosts")
        ports = f"ip rule add to {cluster.address('node3')} ipproto tcp dport 1024-65000 unreachable"
        shell(cluster, "node5", ports)

        code, found = examined(cluster, f"run.output_dir={runs}")
        text = doctor(cluster, f"run.output_dir={runs}").stdout

    assert code == 4
    for node, check, what, fix in (
        ("node2", "names", "the master's name node1 resolves to 127.0.0.1 there", "/etc/hosts on node2"),
        ("node3", "/dev/shm", "64 MiB of 64 MiB free", "--shm-size"),
        ("node3", "open files", "limit 512", "ulimit -n"),
        ("node4", "run folder", f"free in {runs}", "run.output_dir"),
        ("node5", "ports", "does not reach node3 at 10.77.0.3", "ACCEPT on node3"),
        ("node3", "ports", "does not reach node5 at 10.77.0.5", "ACCEPT on node5"),
    ):
        red = rows(found, node)
        assert what in red[check][0]
        assert fix in red[check][1]
    assert "node4 resolves to 127.0.1.1 there" in rows(found, "node4", "warn")["host name"][0]
    assert "is not the same folder as on" in rows(found, "node4", "warn")["shared folder"][0]
    assert rows(found, "node1") == {}
    assert text.splitlines()[-1].startswith("6 red: ")
    assert sum(line.startswith("      fix: ") for line in text.splitlines()) >= 6


@on_a_cluster
def test_a_host_on_a_slow_link_is_reported(tmp_path: Path) -> None:
    with simulated_cluster(3) as cluster:
        shell(cluster, "node2", "tc qdisc add dev eth0 root tbf rate 40mbit burst 256k latency 50ms")

        code, found = examined(cluster)

    assert code == 4, found
    red = rows(found, "node2")
    assert list(red) == ["bandwidth"], found["links"]
    assert "with its fastest peer" in red["bandwidth"][0]
    assert "ethtool eth0" in red["bandwidth"][1]
    assert rows(found, "node1") == rows(found, "node3") == {}


@on_a_cluster
def test_a_killed_doctor_leaves_no_process_on_the_hosts() -> None:
    with simulated_cluster(2) as cluster:
        command = [PYTHON, "dtrain/main.py", "doctor", "--hostfile", str(cluster.hostfile)]
        process = cluster.start("node1", command, cwd=ROOT)
        assert until(lambda: bool(left_on(cluster, "node2", LINK_TEST)), 60)

        process.kill()

        assert until(
            lambda: not [*left_on(cluster, "node1", LINK_TEST, AGENT), *left_on(cluster, "node2", LINK_TEST, AGENT)],
            15,
        )


@on_a_cluster
def test_a_link_that_is_lost_while_it_is_measured_is_reported_in_time() -> None:
    with simulated_cluster(2, rate_mbit=5) as cluster:
        command = [PYTHON, "dtrain/main.py", "doctor", "--hostfile", str(cluster.hostfile), "--json"]
        process = cluster.start("node1", command, cwd=ROOT)
        # The orders and answers before the measurement are smaller than this.
        assert until(lambda: cluster.status("node2")["sent_bytes"] > 1_000_000, 90)

        cluster.cut("node2")
        out, err = process.communicate(timeout=120)

    assert out.startswith("{"), out + err
    red = rows(json.loads(out), "node1")
    assert list(red) == ["process group"]
    assert red["process group"][0].startswith("between node1 and node2: ")


@on_a_cluster
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_doctor_that_is_stopped_while_it_measures_reports_only_that(number: int) -> None:
    with simulated_cluster(2, rate_mbit=5) as cluster:
        command = [PYTHON, "dtrain/main.py", "doctor", "--hostfile", str(cluster.hostfile)]
        process = cluster.start("node1", command, cwd=ROOT)
        assert until(lambda: cluster.status("node2")["sent_bytes"] > 1_000_000, 90)

        process.send_signal(number)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, err) == (1, ""), out
    assert out == "error: Interrupted. Nothing of the doctor is left on the hosts.\n"


def alone(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "dtrain/main.py", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=LIMIT_S)


def test_without_a_hostfile_this_machine_is_checked() -> None:
    ended = alone(["--json"])

    found = json.loads(ended.stdout)
    assert found["hosts"] == ["localhost"]
    assert ended.returncode == (0 if found["green"] else 4)
    # Disk and memory depend on what is free on this machine now.
    good = {**rows(found, "localhost", "ok"), **rows(found, "localhost", "warn")}
    assert {"versions", "dtrain", "run folder", "memory", "process group"} <= set(good)
    assert found["links"]["ranks"] >= 2

"""How a simulated cluster ends, that it leaves nothing on this machine, and which arguments it refuses."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.jobs import until
from tests.support.simulated import ROOT, SIMULATE, gone, needs_cluster, processes_with, simulate, simulated_cluster

pytestmark = pytest.mark.launchers

LIMIT_S = 30.0


@pytest.fixture
def state(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a cluster that the test starts itself."""
    environment = {**os.environ, "DTRAIN_CLUSTER_DIR": str(tmp_path / "state")}
    yield environment
    simulate("down", env=environment)  # if the test failed


@needs_cluster
def test_killing_the_init_of_a_node_ends_everything_on_it() -> None:
    with simulated_cluster(2) as cluster:
        process = cluster.start("node1", ["ssh", "-o", "ServerAliveInterval=1", "node2", "sleep 65432"])
        assert until(lambda: any("ssh" not in command for command in processes_with("sleep 65432").values()), LIMIT_S)
        (init,) = processes_with(f"node.py {cluster.folder} node2")

        os.kill(init, signal.SIGKILL)

        assert gone("sleep 65432", but="ssh", seconds=1.0)
        assert process.wait(LIMIT_S) == 255


def namespaces(word: str) -> set[str]:
    """Returns the namespaces of processes with a word in their command lines, without those of this process."""
    names = {str(each.readlink()) for pid in processes_with(word) for each in Path(f"/proc/{pid}/ns").iterdir()}
    return names - {str(each.readlink()) for each in Path("/proc/self/ns").iterdir()}


def is_held(namespace: str) -> bool:
    """Returns whether a process is in a namespace."""
    for path in Path("/proc").glob("[0-9]*/ns/*"):
        with suppress(OSError):
            if str(path.readlink()) == namespace:
                return True
    return False


def outside() -> list[object]:
    """Returns the state of this machine that a cluster must not change."""
    files = [Path(name).read_text() for name in ("/proc/self/mounts", "/etc/hosts", "/etc/passwd")]
    folders = [ROOT / "launch", ROOT / "hostfiles", Path.home() / ".ssh"]
    stamps = sorted((str(path), path.lstat().st_mtime_ns) for folder in folders for path in folder.rglob("*"))
    return [files, stamps, sorted(Path("/sys/class/net").iterdir()), socket.gethostname()]


@needs_cluster
def test_down_leaves_nothing_behind(tmp_path: Path, state: dict[str, str]) -> None:
    # An existing cache would not be written again.
    shutil.rmtree(ROOT / "launch" / "simulated" / "__pycache__", ignore_errors=True)
    before = outside()
    hostfile, private = tmp_path / "hostfile", tmp_path / "private"
    up = ["up", "2", "--hostfile", str(hostfile), "--private", str(private)]
    assert simulate(*up, env=state).returncode == 0
    assert outside() == before
    simulate("exec", "node1", "sh", "-c", f"touch {private}/file; setsid sleep 76543 >/dev/null 2>&1 &", env=state)
    assert processes_with("sleep 76543")
    spaces = namespaces("sleep 76543")
    assert {space.partition(":")[0] for space in spaces} >= {"ipc", "mnt", "net", "pid", "uts"}

    ended = simulate("down", env=state)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert gone("sleep 76543")
    assert gone(str(tmp_path))
    assert outside() == before
    assert until(lambda: not any(map(is_held, spaces)), 10.0)  # this machine's process 1 may be slow to reap them
    assert list(tmp_path.iterdir()) == []
    again = simulate("down", env=state)
    assert (again.returncode, again.stdout) == (0, f"No simulated cluster is up ({tmp_path}/state does not exist).\n")


@needs_cluster
def test_a_second_cluster_is_refused_with_the_fix(state: dict[str, str]) -> None:
    with simulated_cluster(1) as cluster:
        second = cluster.run("up", "2")
        other = simulate("up", "2", "--hostfile", str(cluster.hostfile), env=state)

        assert second.returncode == other.returncode == 4
        assert "simulate-cluster down" in second.stderr
        assert f"belongs to the cluster in {cluster.folder}" in other.stderr
        assert not Path(state["DTRAIN_CLUSTER_DIR"]).exists()
        assert cluster.exec("node1", ["true"]).returncode == 0


@needs_cluster
def test_an_up_that_fails_at_its_end_leaves_nothing(tmp_path: Path, state: dict[str, str]) -> None:
    private = tmp_path / "a" / "b"

    ended = simulate("up", "2", "--hostfile", "/proc/hostfile", "--private", str(private), env=state)

    assert ended.returncode == 4
    assert "/proc/hostfile" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert processes_with(str(tmp_path)) == {}
    assert list(tmp_path.rglob("*")) == []


@needs_cluster
def test_down_removes_everything_after_a_crash(tmp_path: Path, state: dict[str, str]) -> None:
    hostfile = tmp_path / "hostfile"
    assert simulate("up", "2", "--hostfile", str(hostfile), env=state).returncode == 0
    for pid in processes_with(state["DTRAIN_CLUSTER_DIR"]):
        os.kill(pid, signal.SIGKILL)

    status = simulate("status", env=state)
    ended = simulate("down", env=state)

    assert status.returncode == 4
    assert "does not answer" in status.stderr
    assert ended.returncode == 0
    assert list(tmp_path.iterdir()) == []


@needs_cluster
@pytest.mark.parametrize("record", [None, "", "{", "[]", '{"folder": "/x"}', '{"nodes": [1]}'])
def test_down_removes_everything_after_an_up_that_was_killed_at_its_first_step(
    record: str | None, tmp_path: Path, state: dict[str, str]
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    if record is not None:
        (folder / "cluster.json").write_text(record)
        (folder / "cluster.json.new").write_text(record)

    status = simulate("status", env=state)
    ended = simulate("down", env=state)

    assert (status.returncode, ended.returncode, ended.stderr) == (4, 0, "")
    assert "contains no complete cluster" in status.stderr
    assert not folder.exists()


@needs_cluster
def test_down_removes_only_the_folder_of_a_cluster(tmp_path: Path, state: dict[str, str]) -> None:
    kept = tmp_path / "state" / "precious"
    kept.parent.mkdir()
    kept.touch()

    ended = simulate("down", env=state)

    assert ended.returncode == 4
    assert kept.exists()


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["up"], "N"),
        (["up", "0"], "'0' is not a number from 1 to 64"),
        (["up", "many"], "'many' is not a number"),
        (["up", "2", "--rate", "0"], "'0' is not a number"),
        (["up", "2", "--rate", "nan"], "'nan' is not a number"),
        (["up", "2", "--delay", "-1"], "'-1' is not a number"),
        (["up", "3", "--slots", "1,2"], "--slots has 2 numbers for 3 nodes"),
        (["up", "3", "--slots", "1,,2"], "'' is not a number"),
        (["exec", "node1"], "the command is missing"),
        (["mend", "node1"], "mend"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], message: str, state: dict[str, str]) -> None:
    ended = simulate(*arguments, env=state)

    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]


@needs_cluster
@pytest.mark.parametrize("option", ["--hostfile", "--private"])
def test_an_unsuitable_path_is_refused_before_anything_starts(
    option: str, tmp_path: Path, state: dict[str, str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine\n")
    paths = ["--hostfile", str(tmp_path / "hosts"), option, str(file)]  # the last --hostfile counts

    ended = simulate("up", "2", *paths, env=state)

    assert ended.returncode == 2
    assert str(file) in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine\n"


@pytest.mark.parametrize("command", [["up", "2"], ["down"], ["exec", "node1", "true"]])
def test_without_root_the_error_is_one_line(command: list[str], state: dict[str, str]) -> None:
    script = "import os, runpy, sys; os.geteuid = lambda: 1000; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

    ended = subprocess.run(
        [sys.executable, "-c", script, SIMULATE, *command], env=state, capture_output=True, text=True
    )

    assert ended.returncode == 4
    assert re.fullmatch(r"A simulated cluster needs Linux and root.*\n", ended.stderr)


def test_the_hostfile_is_not_part_of_the_repository() -> None:
    assert "hostfiles/simulated" in (ROOT / ".gitignore").read_text().splitlines()

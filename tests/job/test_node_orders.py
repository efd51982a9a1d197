"""Ranks that a coordinator orders: what the launcher of a node answers, without a second node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import jobs

pytestmark = pytest.mark.launchers

RANK = """
import json, os, sys, threading, time
from pathlib import Path
from dtrain.job.rank_launcher import RankLaunch, run_ranks
def preload():
    if "WITH_THREAD" in os.environ:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
def run_rank():
    names = "RANK LOCAL_RANK WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_PORT TORCHELASTIC_RESTART_COUNT DTRAIN_LOST_HOSTS"
    print(json.dumps({name: os.environ[name] for name in names.split()}), flush=True)
    assert "DTRAIN_ORDERS_FD" not in os.environ
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "5":
        if os.fork() == 0:
            os.setsid()  # a helper that has a copy of the socket
            time.sleep(600)
        return 4
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "0" and os.fork() == 0:
            os.setsid()  # a monitor that outlives its rank and would report its end too late
        time.sleep(600)
    return 0
if "RANK" in os.environ:
    sys.exit(run_rank())
sys.exit(run_ranks(RankLaunch(1, 0, None, preload, run_rank), os.environ))
"""


class Node:
    """A launcher, and the coordinator's end of its socket."""

    def __init__(self, process: subprocess.Popen[str], end: socket.socket) -> None:
        self.process, self._end = process, end
        self._lines = end.makefile(encoding="utf-8")

    def order(self, **fields: Any) -> None:
        self.send(json.dumps(fields) + "\n")

    def send(self, lines: str) -> None:
        self._end.sendall(lines.encode())

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._lines.readline())
        return found

    def rank(self) -> dict[str, str]:
        """What the next rank says about itself."""
        assert self.process.stdout is not None
        found: dict[str, str] = json.loads(self.process.stdout.readline())
        return found


@contextmanager
def launcher(folder: Path, **variables: str) -> Iterator[Node]:
    script = folder / "launches.py"
    script.write_text(RANK)
    end, theirs = socket.socketpair()
    end.settimeout(jobs.LIMIT_S)
    env = {**os.environ, **variables, "PYTHONPATH": str(jobs.ROOT), "DTRAIN_ORDERS_FD": str(theirs.fileno())}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=env, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True
    )
    theirs.close()
    try:
        with end, process:
            yield Node(process, end)
            end.shutdown(socket.SHUT_RDWR)
            process.wait(jobs.LIMIT_S)
    finally:
        process.kill()


def start(restart: int, port: int, **more: Any) -> dict[str, Any]:
    place = {"ranks": 1, "first_rank": 0, "world_size": 1, "node_rank": 0, "num_nodes": 1}
    meeting = {"address": "127.0.0.1", "port": port, "restart": restart, "max_restarts": 3, "lost_hosts": []}
    return {**place, **meeting, **more}


def test_a_node_starts_its_ranks_as_ordered_kills_them_and_starts_others_in_another_place(tmp_path: Path) -> None:
    with launcher(tmp_path) as node:
        assert node.report() == {"ready": socket.gethostname()}
        node.order(stop=0)  # before there are ranks
        assert node.report() == {"ended": 0, "code": 4, "failure": ""}
        node.order(listen={"address": "127.0.0.1", "port": 0})
        port = node.report()["listening"]
        node.order(start=start(0, port, ranks=2, world_size=3, num_nodes=2))
        assert sorted(
            (each["RANK"], each["WORLD_SIZE"], each["MASTER_PORT"]) for each in (node.rank(), node.rank())
        ) == [
            ("0", "3", str(port)),
            ("1", "3", str(port)),
        ]
        node.order(stop=0)
        report = node.report()
        assert (report["ended"], report["code"]) == (0, 4)
        assert "was killed by SIGKILL" in report["failure"]
        node.order(start=start(1, port, first_rank=4, world_size=5, node_rank=1, num_nodes=2, lost_hosts=["a", "b"]))
        found = node.rank()
        assert (found["RANK"], found["LOCAL_RANK"], found["GROUP_RANK"], found["DTRAIN_LOST_HOSTS"]) == (
            "4",
            "0",
            "1",
            "a,b",
        )
        assert node.report() == {"ended": 1, "code": 0, "failure": ""}
        node.order(finish=True)
        assert node.process.wait(jobs.LIMIT_S) == 0


def test_a_node_without_a_coordinator_ends(tmp_path: Path) -> None:
    with launcher(tmp_path) as node:
        node.report()
    assert node.process.returncode == 0


def test_a_stopped_spare_node_ends_with_success(tmp_path: Path) -> None:
    with launcher(tmp_path) as node:
        node.report()
        node.process.terminate()
        assert node.process.wait(jobs.LIMIT_S) == 0


def test_a_taken_port_ends_the_launcher_with_the_reason(tmp_path: Path) -> None:
    with launcher(tmp_path) as node, socket.create_server(("127.0.0.1", 0)) as taken:
        node.report()
        node.order(listen={"address": "127.0.0.1", "port": taken.getsockname()[1]})
        assert node.process.wait(jobs.LIMIT_S) != 0


def test_a_start_that_was_stopped_during_the_imports_never_begins(tmp_path: Path) -> None:
    with launcher(tmp_path) as node:
        lines = [{"listen": {"address": "127.0.0.1", "port": 0}}, {"start": start(0, 0)}, {"stop": 0}]
        node.send("".join(json.dumps(line) + "\n" for line in lines))
        assert "ready" in node.report()
        assert "listening" in node.report()
        assert node.report() == {"ended": 0, "code": 4, "failure": ""}


def test_the_same_port_is_opened_again_for_the_next_start(tmp_path: Path) -> None:
    with launcher(tmp_path) as node:
        node.report()
        node.order(listen={"address": "127.0.0.1", "port": 0})
        port = node.report()["listening"]
        node.order(listen={"address": "127.0.0.1", "port": port})  # the first start was stopped before it began
        assert node.report() == {"listening": port}
        node.order(start=start(5, port))
        assert node.report()["ended"] == 5
        node.order(listen={"address": "127.0.0.1", "port": port})  # a helper of a dead rank has a copy of the socket
        assert node.report() == {"listening": port}


def test_an_order_does_not_end_a_launcher_with_a_thread(tmp_path: Path) -> None:
    with launcher(tmp_path, WITH_THREAD="1") as node:
        node.report()
        node.order(start=start(5, 0))
        assert node.report()["ended"] == 5
        node.order(start=start(0, 0))  # first ends the helper that the ranks have left
        node.order(stop=0)
        assert node.report()["ended"] == 0

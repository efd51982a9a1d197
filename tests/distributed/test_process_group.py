"""Forming the group between real processes that were started by hand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks

PROGRAM = """
import json, os, sys, time
from dtrain.distributed.collectives import all_gather_object
from dtrain.errors import DtrainError
from dtrain.distributed.process_group import process_group
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import Topology
begin = time.monotonic()
try:
    run = {"run folder": os.environ.get("TEST_RUN", "runs/one")}
    with process_group(Topology.from_env(os.environ), os.environ, timeout_s=float(sys.argv[1]), run=run) as topology:
        print(json.dumps({
            "everyone": all_gather_object(topology.rank, RankContext(topology)),
            "local_rank": topology.local_rank,
            "num_nodes": topology.num_nodes,
            "complete": topology.is_complete,
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        }))
        if len(sys.argv) > 2 and topology.rank == 1:
            raise ValueError("inside the group")
except DtrainError as error:
    print(json.dumps({"error": str(error), "seconds": time.monotonic() - begin}))
    sys.stdout.flush()
    os._exit(error.exit_code)
except (ValueError, RuntimeError) as error:
    print(json.dumps({"error": str(error), "seconds": time.monotonic() - begin}))
    sys.stdout.flush()
    os._exit(1)
sys.stdout.flush()
os._exit(0)
"""


def _start(
    rank: int, world_size: int, port: int, *arguments: str, inside: Sequence[str] = (), **env: str
) -> subprocess.Popen[str]:
    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    return subprocess.Popen(
        [*inside, sys.executable, "-c", PROGRAM, *arguments],
        env={**inherited, **names, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> tuple[int, dict[str, object]]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert lines, err
    found: dict[str, object] = json.loads(lines[-1])
    return process.returncode, found


def _free_port() -> int:
    """One that the kernel gave out and took back. Nobody else asks for it by number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_processes_started_by_hand_find_each_other_and_their_node() -> None:
    port = _free_port()
    ranks = [_start(rank, 2, port, "60") for rank in range(2)]

    ended = [_end(process) for process in ranks]

    assert [code for code, _ in ended] == [0, 0]
    for rank, (_, found) in enumerate(ended):
        assert found["everyone"] == [0, 1]
        assert (found["local_rank"], found["num_nodes"], found["complete"]) == (rank, 1, True)
        assert found["interface"] == "lo"


def test_a_low_soft_limit_of_open_files_does_not_keep_ranks_from_meeting() -> None:
    """Each rank has about 14 files open before it meets the others."""
    port = _free_port()
    limited = ["bash", "-c", 'ulimit -Sn 16 && exec "$0" "$@"']
    ranks = [_start(rank, 4, port, "60", inside=limited) for rank in range(4)]

    ended = [_end(process) for process in ranks]

    assert [code for code, _ in ended] == [0] * 4
    assert all(found["everyone"] == [0, 1, 2, 3] for _, found in ended)


def test_a_hard_limit_of_open_files_that_is_too_low_is_named() -> None:
    limited = ["bash", "-c", 'ulimit -n 18 && exec "$0" "$@"']

    code, found = _end(_start(0, 40, _free_port(), "60", inside=limited))

    assert code == 4
    assert "needs a socket for each of the 39 other ranks" in str(found["error"])
    assert "the limit of open files is 18 (dtrain has raised it to the hard limit). Raise that" in str(found["error"])


def test_a_missing_or_wrong_process_is_named_after_the_start_up_time_out() -> None:
    host, unused = socket.gethostname(), _free_port()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()  # answers, and says nothing
        taken = stranger.getsockname()[1]
        alone, no_master = _start(0, 2, _free_port(), "3"), _start(1, 2, unused, "3")
        at_taken_port, with_stranger = _start(0, 2, taken, "3"), _start(1, 2, taken, "3")
        ended = [_end(process) for process in (alone, no_master, at_taken_port, with_stranger)]

    assert [code for code, _ in ended] == [4, 4, 4, 4]
    first, second, third, fourth = (str(found["error"]) for _, found in ended)
    assert re.match(
        rf"1 of 2 ranks arrived within 3 s\. Missing: rank 1\. Arrived: rank 0 \(process \d+ on {host}\)", first
    )
    assert f"Rank 1 on {host} found no master at 127.0.0.1:{unused} within 3 s" in second
    assert f"Port {taken} on 127.0.0.1 is in use" in third
    assert f"The server at 127.0.0.1:{taken} is not this job's rendezvous" in fourth
    assert all(float(str(found["seconds"])) < 10 for _, found in ended)


@pytest.mark.parametrize(
    ("stale", "right", "row"),
    [
        ({"TEST_RUN": "runs/old"}, {}, "run folder  runs/one"),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, "restart  1"),
    ],
    ids=["another run", "an older start"],
)
def test_a_process_of_an_old_run_is_rejected_before_any_collective_and_the_right_one_admitted(
    stale: dict[str, str], right: dict[str, str], row: str
) -> None:
    common: dict[str, str] = {}
    if right:
        common = {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}
    port = _free_port()
    zero = _start(0, 2, port, "60", **common, **right, LOCAL_RANK="0")
    try:
        code, told = _end(_start(1, 2, port, "60", **common, **stale, LOCAL_RANK="1"))
        ended = [_end(process) for process in (_start(1, 2, port, "60", **common, **right, LOCAL_RANK="1"), zero)]
    finally:
        zero.kill()

    assert code == 4
    assert f"does not belong to the job that rank 0 (process {zero.pid} on " in str(told["error"])
    assert row in str(told["error"])
    assert float(str(told["seconds"])) < 30
    assert [(code, found["everyone"]) for code, found in ended] == [(0, [0, 1])] * 2


@pytest.fixture
def two_nodes() -> Iterator[list[str]]:
    """Names of two network namespaces with a wire between them: 10.77.9.1 and 10.77.9.2."""
    one, two = (f"dtrain{os.getpid()}{side}" for side in "ab")
    steps = f"""
        ip netns add {one} && ip netns add {two}
        ip link add eth0 netns {one} type veth peer name eth0 netns {two}
        ip -n {one} addr add 10.77.9.1/24 dev eth0 && ip -n {two} addr add 10.77.9.2/24 dev eth0
        ip -n {one} link set eth0 up && ip -n {two} link set eth0 up
        ip -n {one} link set lo up && ip -n {two} link set lo up"""
    made = subprocess.run(["sh", "-ec", steps], capture_output=True, timeout=30, check=False)
    try:
        if made.returncode:
            pytest.skip("no network namespaces: needs root and iproute2")
        yield [one, two]
    finally:
        for name in (one, two):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30, check=False)


def test_two_nodes_meet_where_their_own_names_do_not_resolve(two_nodes: list[str]) -> None:
    ranks = []
    for rank, node in enumerate(two_nodes):
        inside = ["ip", "netns", "exec", node, "unshare", "--uts", "sh", "-c", f'hostname {node}; exec "$@"', "sh"]
        # The port is the namespace's own: nobody else can have it.
        ranks.append(_start(rank, 2, 29500, "60", inside=inside, MASTER_ADDR="10.77.9.1"))

    ended = [_end(process) for process in ranks]

    assert [code for code, _ in ended] == [0, 0]
    for _, found in ended:
        assert (found["everyone"], found["interface"]) == ([0, 1], "eth0")
        assert (found["local_rank"], found["num_nodes"]) == (0, 2)


def test_an_exception_inside_the_group_is_neither_masked_nor_held_up() -> None:
    port = _free_port()
    ranks = [_start(rank, 2, port, "60", "fail") for rank in range(2)]

    (other, _), (code, found) = [_end(process) for process in ranks]

    assert code == 1
    assert found["error"] == "inside the group"
    assert other == 1, "the one that waits for it at the end of the group hears of it"

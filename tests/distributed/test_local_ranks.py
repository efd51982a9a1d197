"""Nodes with unequal numbers of ranks: each rank has a device and a place on its node that no other has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import jobs

pytestmark = pytest.mark.launchers

SLOTS = {"127.0.0.1": 3, "localhost": 2}

SAYS_WHERE = f"""
import json, os, sys
sys.path.insert(0, {str(jobs.ROOT)!r})
import torch
from dtrain.distributed.process_group import process_group
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.topology import Topology

place = Topology.from_env(os.environ)
# As many devices as the node has slots; the arithmetic is dtrain's own.
torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: place.local_world_size)
with process_group(place, os.environ) as topology:
    torch.cuda.is_available, chosen = (lambda: True), []
    torch.cuda.set_device = chosen.append
    device_of(topology)
    torch.cuda.is_available = lambda: False
    told = [topology.rank, topology.node_rank, topology.num_nodes, topology.local_rank, topology.local_world_size]
    with open(os.path.join(os.environ["PLACES"], f"{{topology.rank}}.json"), "w") as file:
        json.dump([*told, chosen[0].index], file)
os._exit(0)
"""


def commands(folder: Path) -> Iterator[list[str]]:
    """What is typed on each node."""
    script, hostfile = folder / "says_where.py", folder / "hosts"
    script.write_text(SAYS_WHERE)
    hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in SLOTS.items()))
    port = jobs.free_port()
    for node in range(len(SLOTS)):
        yield [
            *[jobs.launcher("deepspeed"), "--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1"],
            *["--master_port", str(port), "--hostfile", str(hostfile), str(script)],
        ]


@pytest.mark.slow
def test_deepspeed_gives_each_rank_of_unequal_nodes_a_device_of_its_own(tmp_path: Path) -> None:
    """It takes the rank modulo the node's slots: local ranks of the second node do not begin with 0, but none comes twice."""
    with ExitStack() as stack:
        env = {"PLACES": str(tmp_path)}
        nodes = [stack.enter_context(jobs.started(command, env=env)) for command in commands(tmp_path)]
        codes = [node.end() for node in nodes]

    assert codes == [0, 0], [node.text for node in nodes]
    places = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(5)]
    assert [place[:3] for place in places] == [[0, 0, 2], [1, 0, 2], [2, 0, 2], [3, 1, 2], [4, 1, 2]]
    assert [place[4] for place in places] == [3, 3, 3, 2, 2]
    assert [place[3] for place in places] == [0, 1, 2, 1, 0], (
        "as the launcher says; not in the order of ranks on node 1"
    )
    assert [place[5] for place in places] == [0, 1, 2, 1, 0], "the device is that of the local rank"
    for node in range(2):
        mains = [place for place in places if place[1] == node and place[3] == 0]
        assert len(mains) == 1, "one rank of a node works for it"

"""The doctor's ranks: a process group over all hosts as a job has it, timed for each pair of hosts and for all.

Started on every host as `python -m dtrain.commands.link_test '{"firsts": [0, 1], "hosts": ["node1", "node2"]}'` with
the place of its first rank in the environment. They print JSON objects, one a line: which pair is next, what went wrong,
and rank 0 what was measured.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dtrain import console
from dtrain.cluster.doctor.link_checks import pairs_of
from dtrain.distributed.collectives import all_gather_object
from dtrain.distributed.process_group import process_group
from dtrain.distributed.topology import Topology, device_of
from dtrain.errors import DtrainError, TopologyError

FORM_S, COLLECTIVE_S, PAIR_S = 60.0, 120.0, 30.0
"""How long the group may take to form, one exchange of all (which wait while a pair is measured), and one of a pair."""

LEAST_LIMIT_S, LIMIT_OF_PAIR_S = 180.0, 15.0
"""How long it may take in all; a rank that hangs ends after that, whatever it hangs in."""

SIZES = tuple(mib << 20 for mib in (1, 4, 16, 32, 64, 128, 256))
"""Bytes, smallest first: the first ones open TCP's window."""

ENOUGH_S = 0.25
"""What takes so long is large enough: its start no longer counts."""

IN_FLIGHT = 2
"""All-reduces at once in a group: as many as gloo's threads take, and DDP's buckets keep them busy."""

GROUPS_OF_PAIR = 2
"""Of gloo, each with a connection of its own: one alone leaves a long line idle between its parts."""

REPEATS, LATENCY_REPEATS = 3, 20


def measure(topology: Topology, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Collective. Latency in seconds of an all-reduce of 4 bytes; rates in bytes per second that a rank sends.

    Args:
        asked: `firsts`, the first rank of each host; `hosts`, their names.
    """
    device = device_of(topology)
    hosts, firsts = asked["hosts"], asked["firsts"]
    backend = "nccl" if device.type == "cuda" else "gloo"
    told = {"hosts": hosts, "ranks": topology.world_size, "backend": backend}
    if topology.world_size == 1:  # no group is formed for one
        return {**told, "pairs": [], "all": {"latency_s": 0.0, "bandwidth": 0.0, "sizes": []}}
    mine = []
    for one, other in pairs_of(len(hosts)):
        ranks, names = [firsts[one], firsts[other]], [hosts[one], hosts[other]]
        groups = [_group(ranks) for _ in range(GROUPS_OF_PAIR if device.type == "cpu" else 1)]
        if topology.is_main:
            say({"next": names})
        if topology.rank in ranks:
            try:
                found = _timed(2, groups, device)
            except RuntimeError as error:
                raise TopologyError(f"between {' and '.join(names)}: {error}") from error
            if topology.rank == ranks[0]:
                mine.append({"hosts": names, **found})
        dist.all_reduce(torch.zeros(1, device=device))  # the next pair has the network for itself
    if topology.is_main:
        say({"next": hosts})
    every = _timed(topology.world_size, [None], device)
    pairs = [pair for some in all_gather_object(mine, topology) for pair in some]
    return {**told, "pairs": pairs, "all": every}


def _group(ranks: Sequence[int]) -> Any:
    """Collective. Without a time limit of its own a lost link would be waited for half an hour."""
    return dist.new_group(list(ranks), timeout=timedelta(seconds=PAIR_S))


def _timed(ranks: int, groups: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Collective of the groups, which have the same ranks. All-reduces of growing size, until one takes long enough."""
    latency_s = _latency(groups[0], device)
    sizes = []
    for size in SIZES:
        count = IN_FLIGHT * len(groups)
        parts = [(torch.zeros(size // 4 // count, device=device), groups[at % len(groups)]) for at in range(count)]
        seconds = min(_agreed(_seconds(parts, device), groups[0], device) for _ in range(REPEATS))
        sizes.append({"bytes": size, "seconds": seconds})
        if seconds > ENOUGH_S:
            break
    # In a ring each rank sends so much of the whole; with two ranks, all of it. It begins after half a round trip.
    on_wire = 2 * (ranks - 1) / ranks * sizes[-1]["bytes"]
    bandwidth = on_wire / max(sizes[-1]["seconds"] - latency_s / 2, 1e-9)
    return {"latency_s": latency_s, "bandwidth": bandwidth, "sizes": sizes}


def _latency(group: Any, device: torch.device) -> float:
    value = [(torch.zeros(1, device=device), group)]
    return statistics.median([_seconds(value, device) for _ in range(3 + LATENCY_REPEATS)][3:])


def _seconds(parts: Sequence[tuple[torch.Tensor, Any]], device: torch.device) -> float:
    """Collective of the groups. How long it takes here to sum every part in its group, all at once."""
    _wait(device)
    begin = time.perf_counter()
    for work in [dist.all_reduce(part, group=group, async_op=True) for part, group in parts]:
        work.wait()
    _wait(device)
    return time.perf_counter() - begin


def _agreed(seconds: float, group: Any, device: torch.device) -> float:
    """Collective of the group. The longest that it took any of its ranks, which begin the next one together."""
    longest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return float(longest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spawn(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """All ranks of this host as children; the worst of their exit codes."""
    first, count = int(env["RANK"]), int(env["LOCAL_WORLD_SIZE"])
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "dtrain.commands.link_test", *argv],
            env={**env, "RANK": str(first + place), "LOCAL_RANK": str(place)},
        )
        for place in range(count)
    ]
    return max(abs(child.wait()) for child in children)


def main(argv: Sequence[str], env: MutableMapping[str, str]) -> int:
    """One rank; or, without LOCAL_RANK, what starts all ranks of a host."""
    asked = json.loads(argv[0])
    # By a thread that needs no Python: also out of a hang in C.
    faulthandler.dump_traceback_later(limit_s(len(asked["hosts"])), exit=True)
    if "LOCAL_RANK" not in env:
        return spawn(argv, env)
    torch.set_num_threads(1)
    topology = Topology.from_env(env)
    console.configure_logging(rank=topology.rank, world_size=topology.world_size)
    try:
        with process_group(topology, env, timeout_s=FORM_S, collective_timeout_s=COLLECTIVE_S) as complete:
            found = measure(complete, asked)
    except (DtrainError, RuntimeError) as error:
        say({"problem": str(error).strip()})
        return 4
    if topology.is_main:
        say(found)
    return 0


def limit_s(hosts: int) -> float:
    """How long all of it may take, in seconds."""
    return LEAST_LIMIT_S + LIMIT_OF_PAIR_S * len(pairs_of(hosts))


def say(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own waits until a collective ends, and prints where
    code = main(sys.argv[1:], os.environ)
    sys.stdout.flush()
    os._exit(code)  # interpreter shutdown with a gloo group that ever existed aborts now and then

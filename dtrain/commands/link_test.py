"""The doctor's ranks: they form a process group over all hosts, as a job does, and time each pair of hosts and all.

The doctor starts `python -m dtrain.commands.link_test '{"firsts": [0, 1], "hosts": ["node1", "node2"]}'` on every host,
with the host's first rank in the environment. Ranks print one JSON object a line: the pair that is measured next, a
problem, and from rank 0 the result.
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
from dtrain.cluster.doctor.link_checks import host_pairs
from dtrain.distributed.collectives import all_gather_object
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.process_group import process_group
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import Topology
from dtrain.errors import DtrainError, TopologyError
from dtrain.training.precision_timing import time_fixed_model

FORM_S, COLLECTIVE_S, PAIR_S = 60.0, 120.0, 30.0
"""Time limits of forming the group, of a collective of all ranks (which wait while a pair is measured), and of a pair's."""

BASE_LIMIT_S, LIMIT_PER_PAIR_S = 180.0, 15.0
"""Time limit of the complete test; a rank that hangs, in any call, ends after it."""

SIZES = tuple(mib << 20 for mib in (1, 4, 16, 32, 64, 128, 256))
"""Sizes in bytes, in ascending order: the first ones open TCP's window."""

LONG_ENOUGH_S = 0.25
"""A size that takes this long is large enough: the startup time no longer matters."""

IN_FLIGHT = 2
"""Parallel all-reduces in a group: as many as gloo has threads, which DDP's buckets keep busy, too."""

GROUPS_OF_PAIR = 2
"""Groups of gloo, each with its own connection: a single one leaves a line with high latency idle between messages."""

REPEATS, LATENCY_REPEATS = 3, 20


def measure(context: RankContext, order: Mapping[str, Any]) -> dict[str, Any]:
    """Collective. Measures the links: latency of an all-reduce of 4 bytes in seconds, rates in bytes/s that a rank sends.

    Then the first rank of each host times a small model on the CPU.

    Args:
        order: `firsts`, the first rank of each host; `hosts`, the names of the hosts.
    """
    device = device_of(context.topology)
    hosts, firsts = order["hosts"], order["firsts"]
    backend = "nccl" if device.type == "cuda" else "gloo"
    facts = {"hosts": hosts, "ranks": context.world_size, "backend": backend}
    if context.world_size == 1:  # no group is formed for one
        return {**facts, "pairs": [], "all": {"latency_s": 0.0, "bandwidth": 0.0, "sizes": []}, "precision": []}
    measured = []
    for one, other in host_pairs(len(hosts)):
        ranks, names = [firsts[one], firsts[other]], [hosts[one], hosts[other]]
        groups = [_group(ranks) for _ in range(GROUPS_OF_PAIR if device.type == "cpu" else 1)]
        if context.is_main:
            say({"next": names})
        if context.rank in ranks:
            try:
                rates = _timed(2, groups, device)
            except RuntimeError as error:
                raise TopologyError(f"between {' and '.join(names)}: {error}") from error
            if context.rank == ranks[0]:
                measured.append({"hosts": names, **rates})
        dist.all_reduce(torch.zeros(1, device=device))  # the next pair has the network for itself
    if context.is_main:
        say({"next": hosts})
    every = _timed(context.world_size, [None], device)
    pairs = [pair for some in all_gather_object(measured, context) for pair in some]
    precision = [_time_precisions(hosts[firsts.index(context.rank)])] if _computes(context, order, device) else []
    timed = [host for some in all_gather_object(precision, context) for host in some]
    return {**facts, "pairs": pairs, "all": every, "precision": timed}


def _computes(context: RankContext, order: Mapping[str, Any], device: torch.device) -> bool:
    """Returns whether this rank times its host's CPU: one rank of each host does, unless the host computes on GPUs."""
    return device.type == "cpu" and context.rank in order["firsts"]


def _time_precisions(host: str) -> dict[str, Any]:
    """Returns the seconds of a small model's forward and backward, and what they say about engine.precision."""
    times = time_fixed_model()
    return {"host": host, "fp32_s": times.fp32_s, "bf16_s": times.bf16_s, "found": times.describe()}


def _group(ranks: Sequence[int]) -> Any:
    """Collective. Creates a group with a short time limit; by default a lost link would block for half an hour."""
    return dist.new_group(list(ranks), timeout=timedelta(seconds=PAIR_S))


def _timed(ranks: int, groups: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Collective of the groups, which have the same ranks. Times all-reduces of growing size until one takes long enough.

    Args:
        ranks: number of ranks in each group.
    """
    latency_s = _latency(groups[0], device)
    sizes = []
    for size in SIZES:
        count = IN_FLIGHT * len(groups)
        chunks = [(torch.zeros(size // 4 // count, device=device), groups[at % len(groups)]) for at in range(count)]
        seconds = min(_longest(_all_reduce_s(chunks, device), groups[0], device) for _ in range(REPEATS))
        sizes.append({"bytes": size, "seconds": seconds})
        if seconds > LONG_ENOUGH_S:
            break
    # A rank of a ring sends this many bytes; with two ranks, the complete tensor. The first byte takes half a round trip.
    on_wire = 2 * (ranks - 1) / ranks * sizes[-1]["bytes"]
    bandwidth = on_wire / max(sizes[-1]["seconds"] - latency_s / 2, 1e-9)
    return {"latency_s": latency_s, "bandwidth": bandwidth, "sizes": sizes}


def _latency(group: Any, device: torch.device) -> float:
    """Collective of the group. Returns the median latency in seconds, without the first three all-reduces."""
    value = [(torch.zeros(1, device=device), group)]
    return statistics.median([_all_reduce_s(value, device) for _ in range(3 + LATENCY_REPEATS)][3:])


def _all_reduce_s(chunks: Sequence[tuple[torch.Tensor, Any]], device: torch.device) -> float:
    """Collective of the groups. Returns the seconds that parallel all-reduces, one of each chunk, take on this rank."""
    _synchronize(device)
    begin = time.perf_counter()
    for work in [dist.all_reduce(chunk, group=group, async_op=True) for chunk, group in chunks]:
        work.wait()
    _synchronize(device)
    return time.perf_counter() - begin


def _longest(seconds: float, group: Any, device: torch.device) -> float:
    """Collective of the group. Returns the longest time of its ranks, which then begin the next all-reduce together."""
    longest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return float(longest)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spawn(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs all ranks of this host as child processes and returns the highest of their exit codes."""
    first, count = int(env["RANK"]), int(env["LOCAL_WORLD_SIZE"])
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "dtrain.commands.link_test", *argv],
            env={**env, "RANK": str(first + local_rank), "LOCAL_RANK": str(local_rank)},
        )
        for local_rank in range(count)
    ]
    return max(abs(child.wait()) for child in children)


def main(argv: Sequence[str], env: MutableMapping[str, str]) -> int:
    """Runs one rank; without LOCAL_RANK in the environment, starts all ranks of a host. Returns the exit code."""
    order = json.loads(argv[0])
    # faulthandler's thread does not need the interpreter, so it also ends a rank that hangs in C code.
    faulthandler.dump_traceback_later(limit_s(len(order["hosts"])), exit=True)
    if "LOCAL_RANK" not in env:
        return spawn(argv, env)
    torch.set_num_threads(1)
    topology = Topology.from_env(env)
    console.configure_logging(rank=topology.rank, world_size=topology.world_size)
    try:
        with process_group(topology, env, timeout_s=FORM_S, collective_timeout_s=COLLECTIVE_S) as complete:
            result = measure(RankContext(complete), order)
    except (DtrainError, RuntimeError) as error:
        say({"problem": str(error).strip()})
        return 4
    if topology.is_main:
        say(result)
    return 0


def limit_s(hosts: int) -> float:
    """Returns the time limit of the complete test, in seconds."""
    return BASE_LIMIT_S + LIMIT_PER_PAIR_S * len(host_pairs(hosts))


def say(message: Mapping[str, Any]) -> None:
    """Prints a message for the doctor, one JSON object a line."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler waits for the collective, and prints a traceback
    code = main(sys.argv[1:], os.environ)
    sys.stdout.flush()
    os._exit(code)  # interpreter shutdown sometimes aborts in a process that has used gloo

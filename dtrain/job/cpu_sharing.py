"""Shares a node's cores among its ranks: always the threads, and the binding of processes if the user asks for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dtrain.console import log
from dtrain.distributed import cpu
from dtrain.distributed.collectives import all_gather_object
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import Topology


def set_threads(topology: Topology, env: Mapping[str, str]) -> int:
    """Shares the cores among the node's ranks, unless OMP_NUM_THREADS is set (torchrun sets it to 1 by default).

    Counts physical cores, because two hyper-threads share one unit for matrices, and no more than a container's limit.
    If the launcher has bound each rank to its own cores, `share_cores` finds that out once the ranks have met.

    Returns:
        The number of threads that torch uses inside one operation.
    """
    if not env.get("OMP_NUM_THREADS"):
        mask = cpu.allowed_cpus()
        masks = dict.fromkeys(range(topology.local_world_size), mask)
        torch.set_num_threads(cpu.rank_share(0, masks, cpu.physical_cores(mask), cpu.cpu_time_limit()).threads)
    return torch.get_num_threads()


def share_cores(context: RankContext, env: Mapping[str, str], *, bind: bool) -> None:
    """Collective. Sets this rank's number of threads from the CPUs that the ranks of its node may use.

    Args:
        env: the environment; OMP_NUM_THREADS, if set, decides the number of threads (torchrun sets it to 1 by default).
        bind: run.bind_cores: also bind this rank to its cores.
    """
    allowed = cpu.allowed_cpus()
    reports = all_gather_object([context.topology.node_rank, context.topology.local_rank, sorted(allowed)], context)
    masks = {local_rank: mask for node, local_rank, mask in reports if node == context.topology.node_rank}
    share = cpu.rank_share(context.topology.local_rank, masks, cpu.physical_cores(allowed), cpu.cpu_time_limit())
    if not env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(share.threads)
    if not bind:
        return
    if torch.cuda.is_available():
        log.info("run.bind_cores is for ranks on the CPU. With GPUs, let the launcher bind each rank near its GPU.")
    elif share.cpus is None:
        log.info("run.bind_cores: rank 0 keeps CPUs %s: %s.", cpu.format_cpu_list(allowed), share.reason)
    else:
        _bind(share, context)


def _bind(share: cpu.CpuShare, context: RankContext) -> None:
    """Binds this rank; leaves it where it is if that is not allowed."""
    assert share.cpus is not None
    cpus, threads = cpu.format_cpu_list(share.cpus), torch.get_num_threads()
    try:
        cpu.bind_process(share.cpus)
    except OSError as error:
        log.warning("run.bind_cores: rank %d cannot be bound to CPUs %s: %s.", context.rank, cpus, error.strerror)
        return
    log.info("run.bind_cores: rank 0 runs on CPUs %s: %s.", cpus, share.reason)
    if threads < share.threads and context.is_node_main:
        log.warning(
            "run.bind_cores: rank %d is bound to %d cores but uses %d, because OMP_NUM_THREADS=%d is set (torchrun "
            "does that by default). Set OMP_NUM_THREADS=%d, or start the job with a script of launch/.",
            context.rank,
            share.threads,
            threads,
            threads,
            share.threads,
        )

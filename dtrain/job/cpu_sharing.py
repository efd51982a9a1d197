"""How the ranks of a node share its cores: threads always, binding where the user asks for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dtrain.console import log
from dtrain.distributed import cpu
from dtrain.distributed.collectives import all_gather_object
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import Topology


def set_threads(topology: Topology, env: Mapping[str, str]) -> int:
    """Shares the cores out among the node's ranks, unless OMP_NUM_THREADS is set (torchrun sets it to 1 by itself).

    Physical cores, for two hyper-threads share one unit for matrices; as many as a container's limit leaves. Where the
    launcher has bound each rank to cores of its own, `share_cores` finds so once the ranks have met.

    Returns:
        The number of threads that torch uses inside one operation.
    """
    if not env.get("OMP_NUM_THREADS"):
        mask = cpu.allowed()
        masks = dict.fromkeys(range(topology.local_world_size), mask)
        torch.set_num_threads(cpu.share(0, masks, cpu.cores_of(mask), cpu.time_limit()).threads)
    return torch.get_num_threads()


def share_cores(context: RankContext, env: Mapping[str, str], *, bind: bool) -> None:
    """Collective. Sets this rank's number of threads from what all ranks of its node may use; binds it if told to.

    Args:
        env: the environment; OMP_NUM_THREADS in it (torchrun sets 1 by itself) decides the threads alone.
        bind: run.bind_cores.
    """
    own = cpu.allowed()
    told = all_gather_object([context.topology.node_rank, context.topology.local_rank, sorted(own)], context)
    masks = {local_rank: mask for node, local_rank, mask in told if node == context.topology.node_rank}
    share = cpu.share(context.topology.local_rank, masks, cpu.cores_of(own), cpu.time_limit())
    if not env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(share.threads)
    if not bind:
        return
    if torch.cuda.is_available():
        log.info("run.bind_cores is for ranks on CPU: a rank with a GPU belongs near it, which its launcher knows.")
    elif share.cpus is None:
        log.info("run.bind_cores: rank 0 keeps CPUs %s: %s.", cpu.as_text(own), share.why)
    else:
        _bind(share, context)


def _bind(share: cpu.Share, context: RankContext) -> None:
    """Binds this rank, which goes on where it is if that is not allowed."""
    assert share.cpus is not None
    cpus, threads = cpu.as_text(share.cpus), torch.get_num_threads()
    try:
        cpu.bind(share.cpus)
    except OSError as error:
        log.warning("run.bind_cores: rank %d cannot be bound to CPUs %s: %s.", context.rank, cpus, error.strerror)
        return
    log.info("run.bind_cores: rank 0 runs on CPUs %s: %s.", cpus, share.why)
    if threads < share.threads and context.is_node_main:
        log.warning(
            "run.bind_cores: rank %d is bound to %d cores and uses %d: OMP_NUM_THREADS=%d decides, which torchrun sets by "
            "itself. Set OMP_NUM_THREADS=%d, or start the job by a script of launch/.",
            context.rank,
            share.threads,
            threads,
            threads,
            share.threads,
        )

"""Asks MPI for what mpirun's variables do not contain: where rank 0 is, and which ranks share a node.

mpi4py is imported when used.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

from dtrain.distributed import launcher_env, network
from dtrain.errors import TopologyError

FIX = "or set the address yourself: mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=<a free port> ..."


class MpiRendezvous(NamedTuple):
    """The address where all ranks meet.

    Attributes:
        address: address of rank 0's socket.
        port: port of rank 0's socket.
        listener: the open socket on rank 0; None on other ranks.
        node: equal for all ranks of one node.
    """

    address: str
    port: int
    listener: socket.socket | None
    node: str


def bootstrap(env: Mapping[str, str], *, rank: int, world_size: int, launcher: str) -> MpiRendezvous:
    """Collective. Opens the master's socket on rank 0 and broadcasts its address.

    The socket stays open, so that no other process can take the port. MPI is finalized when this returns, so that a
    rank may end with os._exit.

    Raises:
        TopologyError: mpi4py is missing or uses another MPI than the launcher, or the address of rank 0 is unknown.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise TopologyError(f"Under {launcher} the ranks meet through mpi4py ({error}): install it, {FIX}") from error
    comm = MPI.COMM_WORLD
    if (comm.rank, comm.size) != (rank, world_size):
        library = MPI.Get_library_version().splitlines()[0]
        launcher_env.refuse(
            env,
            f"By its variables this is rank {rank} of {world_size}, by mpi4py rank {comm.rank} of {comm.size}: mpi4py "
            f"uses another MPI ({library}) than the launcher. Use the mpirun of that MPI, {FIX}",
        )
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    node = f"mpi:{shared.bcast(comm.rank, root=0)}"
    listener, endpoint = None, None
    if comm.rank == 0:
        address = "127.0.0.1" if shared.size == comm.size else network.outward_address()
        if address is not None:
            listener = network.listen(address, 0)
            endpoint = (address, int(listener.getsockname()[1]))
    endpoint = comm.bcast(endpoint, root=0)
    finalize_mpi()
    if endpoint is None:
        raise TopologyError(
            f"Rank 0 has no default route, so the address that other nodes can reach is unknown. Set MASTER_ADDR, {FIX}"
        )
    return MpiRendezvous(endpoint[0], endpoint[1], listener, node)


def finalize_mpi() -> None:
    """Finalizes MPI if it was started. Without this, mpirun kills the job when a rank ends with os._exit."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()

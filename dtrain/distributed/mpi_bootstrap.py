"""What only MPI can tell under mpirun: where rank 0 is, and which ranks share a node. mpi4py is imported when used."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

from dtrain.distributed import launcher_env, network
from dtrain.errors import TopologyError

CURE = "or give the address yourself: mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=<a free port> ..."


class Meeting(NamedTuple):
    """Where all ranks meet.

    address, port: rank 0's socket.
    listener: that socket, open, on rank 0; None elsewhere.
    node: what the ranks of one node have in common.
    """

    address: str
    port: int
    listener: socket.socket | None
    node: str


def meet(env: Mapping[str, str], *, rank: int, world_size: int, launcher: str) -> Meeting:
    """Collective. Lets rank 0 open the master's socket and tell all others where.

    The socket stays open from here on, so that nobody else can take the port. MPI is over again when this returns: a
    rank may then end by os._exit.

    Raises:
        TopologyError: mpi4py is missing or of another MPI than the launcher, or rank 0 cannot tell its address.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise TopologyError(f"Under {launcher} ranks meet by mpi4py ({error}): install it, {CURE}") from error
    comm = MPI.COMM_WORLD
    if (comm.rank, comm.size) != (rank, world_size):
        library = MPI.Get_library_version().splitlines()[0]
        launcher_env.refuse(
            env,
            f"By its variables this is rank {rank} of {world_size}, by mpi4py rank {comm.rank} of {comm.size}: mpi4py "
            f"uses another MPI ({library}) than the launcher. Use the mpirun of that MPI, {CURE}",
        )
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    node = f"mpi:{shared.bcast(comm.rank, root=0)}"
    listener, where = None, None
    if comm.rank == 0:
        address = "127.0.0.1" if shared.size == comm.size else network.outward_address()
        if address is not None:
            listener = network.listen(address, 0)
            where = (address, int(listener.getsockname()[1]))
    where = comm.bcast(where, root=0)
    finalize_mpi()
    if where is None:
        raise TopologyError(f"Rank 0 has no default route: which address do others reach? Set MASTER_ADDR, {CURE}")
    return Meeting(where[0], where[1], listener, node)


def finalize_mpi() -> None:
    """Ends MPI if it was started: mpirun kills the job when a rank leaves by os._exit after MPI_Init without this."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()

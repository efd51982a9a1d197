"""Asks MPI for what mpirun's variables do not contain: where rank 0 is, and which ranks share a node.

mpi4py is imported when used.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def bootstrap(env: Mapping[str, str], *, rank: int, world_size: int, launcher: str, timeout_s: float) -> MpiRendezvous:
    """Collective. Opens the master's socket on rank 0 and broadcasts its address.

    The socket stays open, so that no other process can take the port. MPI is finalized when this returns, so that a
    rank may end with os._exit. Ends this process, with a message, if MPI takes longer than `timeout_s`.

    Raises:
        TopologyError: mpi4py is missing or uses another MPI than the launcher, or the address of rank 0 is unknown.
    """
    message = (
        f"error: Rank {rank} on {socket.gethostname()}: MPI did not connect the ranks within run.startup_timeout_s="
        f"{timeout_s:g} s. A firewall may block MPI's ports between the hosts, or another program sends to them. Let MPI use "
        f"one network (mpirun --mca btl_tcp_if_include <interface> with Open MPI), {FIX}"
    )
    with _killed_after(timeout_s, message):
        return _bootstrap(env, rank=rank, world_size=world_size, launcher=launcher)


@contextmanager
def _killed_after(timeout_s: float, message: str) -> Iterator[None]:
    """Prints the message and kills this process if the block takes longer.

    A child process does that: MPI may block with the interpreter lock held, so that no thread of this process runs.
    """
    read_end, write_end = os.pipe()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks with threads: the child only waits
        child = os.fork()
    if child == 0:
        os.close(write_end)
        if not select.select([read_end], [], [], timeout_s)[0]:
            os.write(1, f"{message}\n".encode())
            os.kill(parent, signal.SIGKILL)
        os._exit(0)
    os.close(read_end)
    try:
        yield
    finally:
        os.close(write_end)
        os.waitpid(child, 0)


def _bootstrap(env: Mapping[str, str], *, rank: int, world_size: int, launcher: str) -> MpiRendezvous:
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

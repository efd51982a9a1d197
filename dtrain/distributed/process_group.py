"""Creates and destroys the process group: all ranks meet in the master's store, then torch's group starts.

Moves no tensors: see collectives.py. torch is imported when used.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from dtrain.distributed import launcher_env, mpi_bootstrap, network, process_info, process_limit, rendezvous
from dtrain.distributed.bounded import call_with_timeout
from dtrain.distributed.topology import Topology
from dtrain.errors import TopologyError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a collective waits for a rank that is alive but does not join it."""


@contextmanager
def process_group(
    topology: Topology,
    env: MutableMapping[str, str],
    *,
    timeout_s: float = 120.0,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    store: Store | None = None,
    run: Mapping[str, str] | None = None,
) -> Iterator[Topology]:
    """Collective. Creates torch's default process group and yields the complete topology. No group at world size 1.

    NCCL moves CUDA tensors, gloo those on the host. On a normal exit the ranks wait for each other and destroy the
    group. After an exception no rank waits for another; end the process with os._exit then, since torch's teardown can
    block.

    Args:
        topology: as `Topology.from_env` returned it.
        env: os.environ; the socket interface on the route to the master is added unless the user has set one.
        timeout_s: how long to wait for all ranks to arrive.
        collective_timeout_s: how long a collective waits after that.
        store: used for the rendezvous instead of one at the master's address (tests use a file store).
        run: name of the run, equal on all ranks: a process with another value is rejected.

    Raises:
        TopologyError: ranks are missing, or this one belongs to another job; the message says which ranks, or why.
    """
    if topology.world_size == 1:
        with _exported(topology, env):
            yield topology
        return
    import torch.distributed as dist

    _make_room_for_sockets(topology)
    deadline = time.monotonic() + timeout_s
    topology, group_store = _meet(topology, env, deadline, timeout_s, store, run or {})
    _start_group(topology, group_store, deadline, collective_timeout_s)
    try:
        with _exported(topology, env):
            yield topology
    except BaseException:
        _destroy_group()
        raise
    # Rank 0 hosts the store, so no rank leaves while another still needs it.
    dist.all_reduce(_one_zero())
    _destroy_group()


def _make_room_for_sockets(topology: Topology) -> None:
    """Raises the limit of open files, and refuses one that cannot hold a socket for every other rank."""
    limit, is_open = process_info.raise_open_files(), process_info.count_open_files()
    if limit < is_open + topology.world_size - 1:
        raise TopologyError(
            f"Rank {topology.rank} on {socket.gethostname()} needs a socket for each of the {topology.world_size - 1} other "
            f"ranks and has {is_open} files open, but {process_info.open_files_hint(limit)}"
        )


def _meet(
    topology: Topology,
    env: MutableMapping[str, str],
    deadline: float,
    timeout_s: float,
    store: Store | None,
    run: Mapping[str, str],
) -> tuple[Topology, Store]:
    """Collective. Waits for all ranks; returns the complete topology and a store for this rendezvous only."""
    from torch.distributed.distributed_c10d import PrefixStore

    listener, node = None, None
    if store is None and topology.master_addr is None:
        mpi = mpi_bootstrap.bootstrap(
            env,
            rank=topology.rank,
            world_size=topology.world_size,
            launcher=topology.launcher,
            timeout_s=timeout_s,
        )
        topology = replace(topology, master_addr=mpi.address, master_port=mpi.port)
        listener, node = mpi.listener, mpi.node
    if store is None:
        store = _open_store(topology, env, listener, deadline, timeout_s)
    if topology.is_complete:
        # The launcher numbers the nodes. Two of them may share a machine, as in tests.
        node = f"node {topology.node_rank}"
    result = rendezvous.join(
        PrefixStore("rendezvous", store),
        rank=topology.rank,
        world_size=topology.world_size,
        local_rank=topology.local_rank if topology.is_complete or "LOCAL_RANK" in env else None,
        node=node,
        deadline=deadline,
        timeout_s=timeout_s,
        identity=launcher_env.read_job_identity(env, topology.launcher, run=run),
    )
    if not topology.is_complete:
        topology = replace(topology, **result.placement._asdict(), is_complete=True)
    # An earlier start of this job may have used the store, and a restarted one must not read what that wrote.
    return topology, PrefixStore(f"group/{result.round}", store)


def _open_store(
    topology: Topology, env: MutableMapping[str, str], listener: socket.socket | None, deadline: float, timeout_s: float
) -> Store:
    """Returns the store where all ranks meet: torchrun's, else one that rank 0 opens on the master's interface.

    Also sets the socket interface in `env`.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore

    address, port, size = topology.master_addr, topology.master_port, topology.world_size
    assert address is not None
    assert port is not None
    on_one_node = topology.is_complete and topology.num_nodes == 1
    serves_others = not on_one_node and not network.is_literally_local(address)
    network.choose_interface(env, address, port, serves_other_nodes=serves_others)
    agent_has_store = topology.launcher == "torchrun" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=timeout_s)
    if topology.is_main and not agent_has_store:
        if listener is None and (file := env.pop(launcher_env.MASTER_FD, "")):
            listener = socket.socket(fileno=int(file))  # nobody else can have taken its port
        if listener is None:
            listener = network.listen_as_master(address, port, serves_other_nodes=serves_others)
        resolved = network.resolve(address, port)[1]
        store: Store = TCPStore(resolved, port, size, True, timeout, False, master_listen_fd=listener.detach())
    else:
        network.wait_for_master(address, port, rank=topology.rank, deadline=deadline, timeout_s=timeout_s)
        store = _connect(lambda: TCPStore(address, port, size, False, timeout, False), f"{address}:{port}", deadline)
    return PrefixStore("dtrain", store)


def _connect(client: Callable[[], Store], endpoint: str, deadline: float) -> Store:
    """Creates the store's client. Its constructor never returns if the server sends nothing, hence the time limit."""

    def connect() -> Store | RuntimeError:
        try:
            return client()
        except RuntimeError as error:
            return error

    no_answer = RuntimeError("it does not speak the protocol")
    result = call_with_timeout(connect, max(deadline - time.monotonic(), 1.0), no_answer)
    if isinstance(result, RuntimeError):
        raise TopologyError(f"The server at {endpoint} is not this job's rendezvous: {result}. Is MASTER_PORT correct?")
    return result


def _start_group(topology: Topology, store: Store, deadline: float, collective_timeout_s: float) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    # Connecting has the start-up time-out; later collectives have the longer one.
    timeout = timedelta(seconds=max(deadline - time.monotonic(), 10.0))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )
        dist.all_reduce(_one_zero())
    except RuntimeError as error:
        if os.strerror(errno.EMFILE) in str(error):
            limit = process_info.raise_open_files()
            raise TopologyError(
                f"Rank {topology.rank} on {socket.gethostname()} cannot connect to all {topology.world_size} ranks: "
                f"{process_info.open_files_hint(limit)}"
            ) from error
        if os.strerror(errno.EAGAIN) in str(error):
            raise process_limit.start_error() from error
        raise TopologyError(
            f"All {topology.world_size} ranks arrived, but rank {topology.rank} on {socket.gethostname()} cannot "
            f"connect to them: {error}\n"
            "Can the nodes reach each other on all ports? Is GLOO_SOCKET_IFNAME the right interface?"
        ) from error
    _set_pg_timeout(timedelta(seconds=collective_timeout_s))


@contextmanager
def _exported(topology: Topology, env: MutableMapping[str, str]) -> Iterator[None]:
    """Sets the variables that DeepSpeed reads the rank from, under every launcher, and restores them afterwards."""
    variables = {
        "RANK": topology.rank,
        "WORLD_SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
        "LOCAL_WORLD_SIZE": topology.local_world_size,
    }
    before = {name: env.get(name) for name in variables}
    env.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value


def _one_zero() -> torch.Tensor:
    import torch

    return torch.zeros(1)


def _destroy_group() -> None:
    """Destroys the group, within 5 s: with work pending, torch's teardown waits for peers that may be gone."""
    import torch.distributed as dist

    call_with_timeout(dist.destroy_process_group, 5.0, None)

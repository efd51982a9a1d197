"""The process group's life: ranks meet at the master's store, a rendezvous says who came, then torch's group starts.

Moves no tensors: see collectives.py. torch is imported when used.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from queue import Empty, Queue
from typing import TYPE_CHECKING

from dtrain.distributed import launcher_env, mpi_bootstrap, network, rendezvous
from dtrain.distributed.job_identity import Identity
from dtrain.distributed.topology import Topology
from dtrain.errors import TopologyError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a collective waits for a rank that is alive but does not come."""


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
    """Collective. Forms torch's default process group and yields the complete topology; nothing at world size 1.

    NCCL moves CUDA tensors, gloo those on the host. Leaving it normally, ranks wait for each other and destroy the
    group. After an exception no rank waits for another; end with os._exit then, since torch's teardown can block.

    Args:
        topology: as `Topology.from_env` gave it.
        env: os.environ; the socket interface on the route to the master is added where the user has chosen none.
        timeout_s: how long to wait for all ranks to arrive.
        collective_timeout_s: how long a collective waits later on.
        store: where to meet instead of the master's address (tests use a file store).
        run: what the ranks work on, in words that are the same on all: a process that says otherwise is not let in.

    Raises:
        TopologyError: not all ranks came in time, or this one is of another job; the message says which.
    """
    if topology.world_size == 1:
        with _published(topology, env):
            yield topology
        return
    import torch.distributed as dist

    deadline = time.monotonic() + timeout_s
    topology, own = _meet(topology, env, deadline, timeout_s, store, run or {})
    _start_group(topology, own, deadline, collective_timeout_s)
    try:
        with _published(topology, env):
            yield topology
    except BaseException:
        _destroy_group()
        raise
    # Rank 0 holds the store: nobody leaves while another still needs it.
    dist.all_reduce(_nothing())
    _destroy_group()


def _meet(
    topology: Topology,
    env: MutableMapping[str, str],
    deadline: float,
    timeout_s: float,
    store: Store | None,
    run: Mapping[str, str],
) -> tuple[Topology, Store]:
    """Collective. The complete topology and a store for this meeting alone, once all ranks are there."""
    from torch.distributed.distributed_c10d import PrefixStore

    listener, node = None, None
    if store is None and topology.master_addr is None:
        meeting = mpi_bootstrap.meet(
            env, rank=topology.rank, world_size=topology.world_size, launcher=topology.launcher
        )
        topology = replace(topology, master_addr=meeting.address, master_port=meeting.port)
        listener, node = meeting.listener, meeting.node
    if store is None:
        store = _open_store(topology, env, listener, deadline, timeout_s)
    if topology.is_complete:
        # The launcher knows its nodes; two of them may share a machine, as in tests.
        node = f"node {topology.node_rank}"
    admission = rendezvous.call(
        PrefixStore("rollcall", store),
        rank=topology.rank,
        world_size=topology.world_size,
        local_rank=topology.local_rank if topology.is_complete or "LOCAL_RANK" in env else None,
        node=node,
        deadline=deadline,
        timeout_s=timeout_s,
        identity=Identity(*launcher_env.job_of(env, topology.launcher), run=run),
    )
    if not topology.is_complete:
        topology = replace(topology, **admission.seat._asdict(), is_complete=True)
    # Of its own in a store that an earlier start of this job has used: a restarted one must not read what that wrote.
    return topology, PrefixStore(f"group/{admission.meeting}", store)


def _open_store(
    topology: Topology, env: MutableMapping[str, str], listener: socket.socket | None, deadline: float, timeout_s: float
) -> Store:
    """The store where all ranks meet: torchrun's own, else one that rank 0 opens on the master's interface.

    Chooses the socket interface on the way.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore

    address, port, size = topology.master_addr, topology.master_port, topology.world_size
    assert address is not None
    assert port is not None
    on_one_node = topology.is_complete and topology.num_nodes == 1
    serves_others = not on_one_node and not network.is_literally_local(address)
    network.choose_interface(env, address, port, serves_other_nodes=serves_others)
    agent_has_it = topology.launcher == "torchrun" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    left = timedelta(seconds=timeout_s)
    if topology.is_main and not agent_has_it:
        if listener is None:
            listener = network.listen_as_master(address, port, serves_other_nodes=serves_others)
        own = network.resolve(address, port)[1]
        store: Store = TCPStore(own, port, size, True, left, False, master_listen_fd=listener.detach())
    else:
        network.reach(address, port, rank=topology.rank, deadline=deadline, timeout_s=timeout_s)
        store = _connect(lambda: TCPStore(address, port, size, False, left, False), f"{address}:{port}", deadline)
    return PrefixStore("dtrain", store)


def _connect(client: Callable[[], Store], where: str, deadline: float) -> Store:
    """The store's client, made in a thread: against a server that says nothing its constructor never returns."""
    made: Queue[Store | RuntimeError] = Queue()

    def connect() -> None:
        try:
            made.put(client())
        except RuntimeError as error:
            made.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        result = made.get(timeout=max(deadline - time.monotonic(), 1.0))
    except Empty:
        result = RuntimeError("it does not speak the protocol")
    if isinstance(result, RuntimeError):
        raise TopologyError(f"What answers at {where} is not this job's meeting point: {result}. Is MASTER_PORT right?")
    return result


def _start_group(topology: Topology, store: Store, deadline: float, collective_timeout_s: float) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    # Connecting has the start-up time-out, work after it the longer one.
    left = timedelta(seconds=max(deadline - time.monotonic(), 10.0))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=left)
        dist.all_reduce(_nothing())
    except RuntimeError as error:
        raise TopologyError(
            f"All {topology.world_size} ranks came, but rank {topology.rank} on {socket.gethostname()} cannot connect "
            f"to them: {error}\nDo the nodes reach each other on all ports? Is GLOO_SOCKET_IFNAME the right interface?"
        ) from error
    _set_pg_timeout(timedelta(seconds=collective_timeout_s))


@contextmanager
def _published(topology: Topology, env: MutableMapping[str, str]) -> Iterator[None]:
    """DeepSpeed takes its place from these variables alone, also under MPI, Slurm and no launcher at all."""
    places = {
        "RANK": topology.rank,
        "WORLD_SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
        "LOCAL_WORLD_SIZE": topology.local_world_size,
    }
    before = {name: env.get(name) for name in places}
    env.update({name: str(place) for name, place in places.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value


def _nothing() -> torch.Tensor:
    import torch

    return torch.zeros(1)


def _destroy_group() -> None:
    """Destroys the group, in 5 s at most: with work pending, torch's teardown waits for peers that may be gone."""
    import torch.distributed as dist

    worker = threading.Thread(target=dist.destroy_process_group, daemon=True)
    worker.start()
    worker.join(timeout=5.0)

"""Communication between ranks: sums, maxima, tensors of any shape, JSON objects, agreement, and work once per node.

Every function works at world size 1 without a process group. With more ranks and no group it raises, instead of
silently acting as a single process. Objects are sent as JSON, never as pickles. Reductions stay on their tensor's
device; gathers, and broadcasts of an unknown shape, go through the host.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.distributed.node_first import NodeWork, run_node_work
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.serialization import (
    HEADER_SIZE,
    Json,
    build_header,
    bytes_to_object,
    bytes_to_tensor,
    num_bytes,
    object_to_bytes,
    pad_bytes,
    tensor_to_bytes,
)
from dtrain.distributed.store import KeyValueStore
from dtrain.errors import ERROR_TYPES, DtrainError

BROADCAST_BYTES = 2**16
"""A broadcast more is worth it if it saves each rank this many bytes."""


def all_reduce_sum(tensor: Tensor, context: RankContext) -> Tensor:
    """Collective. Returns the elementwise sum over ranks as a new tensor on the same device."""
    return _all_reduce(tensor, context, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor, context: RankContext) -> Tensor:
    """Collective. Returns the elementwise maximum over ranks as a new tensor on the same device."""
    return _all_reduce(tensor, context, dist.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, context: RankContext, operation: Any) -> Tensor:
    if not _has_peers(context):
        return tensor.clone()
    wire = _to_wire(tensor.clone(), tensor.device)
    context.traffic.add(wire.nbytes)
    dist.all_reduce(wire, op=operation)
    return wire.to(tensor.device)


def reduce_sum(tensor: Tensor, context: RankContext, *, dst: int = 0) -> Tensor | None:
    """Collective. Returns the sum over ranks as a new tensor on rank `dst`, None on the others."""
    if not _has_peers(context):
        return tensor.clone()
    wire = _to_wire(tensor.clone(), tensor.device)
    context.traffic.add(wire.nbytes)
    dist.reduce(wire, dst=dst, op=dist.ReduceOp.SUM)
    return wire.to(tensor.device) if context.rank == dst else None


def broadcast(tensor: Tensor | None, context: RankContext, *, src: int = 0, like: Tensor | None = None) -> Tensor:
    """Collective. Returns rank `src`'s tensor on every rank, as a new tensor.

    Args:
        tensor: read on rank `src` only.
        like: a tensor with the shape, dtype and device of the result, if all ranks know them: saves a message and keeps
            the data on the device. Without it the result is on the host.
    """
    if not _has_peers(context):
        assert tensor is not None
        return tensor.clone() if like is not None else tensor.detach().cpu().clone()
    is_source = context.rank == src
    assert tensor is not None or not is_source, "the source has nothing to broadcast"
    if like is not None:
        assert tensor is None or not is_source or (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        wire = _to_wire(
            tensor.detach().clone() if is_source and tensor is not None else torch.empty_like(like), like.device
        )
        context.traffic.add(wire.nbytes)
        dist.broadcast(wire, src=src)
        return wire.to(like.device)
    header = _host_wire(
        build_header(tensor) if tensor is not None and is_source else torch.empty(HEADER_SIZE, dtype=torch.int64)
    )
    context.traffic.add(header.nbytes)
    dist.broadcast(header, src=src)
    size = num_bytes(header)
    payload = _host_wire(
        tensor_to_bytes(tensor) if tensor is not None and is_source else torch.empty(size, dtype=torch.uint8)
    )
    if size:
        context.traffic.add(size)
        dist.broadcast(payload, src=src)
    return bytes_to_tensor(payload, header)


def scatter(tensors: Sequence[Tensor] | None, context: RankContext, *, src: int = 0) -> Tensor:
    """Collective. Returns `tensors[r]` of rank `src` on rank r, on the host. Shapes and dtypes may differ."""
    if not _has_peers(context):
        assert tensors is not None
        return tensors[0].detach().cpu().clone()
    headers = torch.empty(context.world_size, HEADER_SIZE, dtype=torch.int64)
    parts: list[Tensor] | None = None
    if context.rank == src:
        assert tensors is not None, "the source has nothing to scatter"
        assert len(tensors) == context.world_size, f"{len(tensors)} tensors for {context.world_size} ranks"
        headers = torch.stack([build_header(tensor) for tensor in tensors])
    headers = _host_wire(headers)
    context.traffic.add(headers.nbytes)
    dist.broadcast(headers, src=src)
    width = max(num_bytes(header) for header in headers)
    payload = _host_wire(torch.empty(width, dtype=torch.uint8))
    if context.rank == src and tensors is not None:
        parts = [_host_wire(pad_bytes(tensor_to_bytes(tensor), width)) for tensor in tensors]
    if width:
        context.traffic.add(width)
        dist.scatter(payload, parts, src=src)
    return bytes_to_tensor(payload, headers[context.rank])


def gather(tensor: Tensor, context: RankContext, *, dst: int = 0) -> list[Tensor] | None:
    """Collective. Returns all ranks' tensors in rank order on rank `dst`'s host, None elsewhere. Shapes may differ."""
    if not _has_peers(context):
        return [tensor.detach().cpu().clone()]
    headers, data = _exchange_headers(tensor, context)
    payload = _host_wire(pad_bytes(data, max(map(num_bytes, headers))))
    parts = [torch.empty_like(payload) for _ in headers] if context.rank == dst else None
    if payload.numel():
        context.traffic.add(payload.nbytes)
        dist.gather(payload, parts, dst=dst)
    return (
        None if parts is None else [bytes_to_tensor(part, header) for part, header in zip(parts, headers, strict=True)]
    )


def gather_bytes(data: Tensor, width: int, context: RankContext, *, dst: int = 0) -> list[Tensor] | None:
    """Collective. Returns all ranks' bytes in rank order on rank `dst`'s host, filled up with zeros; None elsewhere.

    Args:
        data: (bytes,) uint8, at most `width`.
        width: at least 1, and the same on all ranks.
    """
    payload = pad_bytes(data, width)
    if not _has_peers(context):
        return [payload]
    payload = _host_wire(payload)
    parts = [torch.empty_like(payload) for _ in range(context.world_size)] if context.rank == dst else None
    context.traffic.add(width)
    dist.gather(payload, parts, dst=dst)
    return None if parts is None else [part.cpu() for part in parts]


def all_gather_numbers(numbers: Sequence[int], context: RankContext) -> Tensor:
    """Collective. Returns the integers of all ranks, (world_size, len(numbers)) int64, equally many from each rank."""
    own = torch.tensor(numbers, dtype=torch.int64)
    if not _has_peers(context):
        return own.unsqueeze(0)
    wire = _host_wire(own)
    rows = [torch.empty_like(wire) for _ in range(context.world_size)]
    context.traffic.add(wire.nbytes)
    dist.all_gather(rows, wire)
    return torch.stack(rows).cpu()


def all_gather(tensor: Tensor, context: RankContext) -> list[Tensor]:
    """Collective. Returns all ranks' tensors in rank order, on the host. Shapes and dtypes may differ.

    A rank that has much more than the others sends the rest by itself, so that memory does not grow with the number of
    ranks times the largest tensor.
    """
    if not _has_peers(context):
        return [tensor.detach().cpu().clone()]
    headers, data = _exchange_headers(tensor, context)
    sizes = [num_bytes(header) for header in headers]
    width = gather_width(sizes)
    payload = _host_wire(pad_bytes(data[:width], width))
    parts = [torch.empty_like(payload) for _ in headers]
    if width:
        context.traffic.add(width)
        dist.all_gather(parts, payload)
    for rank, size in enumerate(sizes):
        if size > width:
            rest = _host_wire(data[width:] if rank == context.rank else torch.empty(size - width, dtype=torch.uint8))
            context.traffic.add(size - width)
            dist.broadcast(rest, src=rank)
            parts[rank] = torch.cat([parts[rank], rest])
    return [bytes_to_tensor(part, header) for part, header in zip(parts, headers, strict=True)]


def gather_width(sizes: Sequence[int]) -> int:
    """Returns how many bytes of each rank cross in one gather; the ranks with more broadcast the rest.

    That moves the fewest bytes to each rank, where a broadcast counts as BROADCAST_BYTES more.
    """
    best, cheapest, larger, their_bytes = 0, None, 0, 0
    for size, times in sorted(Counter(sizes).items(), reverse=True):
        cost = len(sizes) * size + their_bytes - larger * size + larger * BROADCAST_BYTES
        if cheapest is None or cost < cheapest:
            best, cheapest = size, cost
        larger, their_bytes = larger + times, their_bytes + times * size
    return best


def all_gather_object(obj: Json, context: RankContext) -> list[Json]:
    """Collective. Returns all ranks' objects in rank order, through JSON (tuples become lists)."""
    return [bytes_to_object(part) for part in all_gather(object_to_bytes(obj), context)]


def gather_object(obj: Json, context: RankContext, *, dst: int = 0) -> list[Json] | None:
    """Collective. Returns all ranks' objects in rank order on rank `dst`, None elsewhere, through JSON."""
    parts = gather(object_to_bytes(obj), context, dst=dst)
    return None if parts is None else [bytes_to_object(part) for part in parts]


def scatter_object(objects: Sequence[Json] | None, context: RankContext, *, src: int = 0) -> Json:
    """Collective. Returns `objects[r]` of rank `src` on rank r, through JSON. Ignores the argument of the others."""
    parts = [object_to_bytes(obj) for obj in objects or ()] if context.rank == src else None
    return bytes_to_object(scatter(parts, context, src=src))


def is_equal_on_all_ranks(obj: Json, context: RankContext) -> bool:
    """Collective. Returns, on every rank, whether all ranks have the same object. Sends 64 bytes, whatever its size.

    Objects are compared by the SHA-256 of their JSON, in which dictionaries keep their order.
    """
    digest = torch.frombuffer(bytearray(hashlib.sha256(json.dumps(obj).encode()).digest()), dtype=torch.uint8)
    largest = all_reduce_max(torch.cat([digest, 255 - digest]), context)  # the second half holds the smallest bytes
    return bool((largest[:32] == 255 - largest[32:]).all())


def broadcast_object(obj: Json | None, context: RankContext, *, src: int = 0) -> Json:
    """Collective. Returns rank `src`'s object on every rank, through JSON. Ignores the argument of the others."""
    return bytes_to_object(broadcast(object_to_bytes(obj) if context.rank == src else None, context, src=src))


def barrier(context: RankContext) -> None:
    """Collective. Returns when every rank has called it."""
    if _has_peers(context):
        context.traffic.add(4)
        # dist.barrier would guess a device.
        dist.all_reduce(_host_wire(torch.zeros(1)))


def agree(flag: int, context: RankContext) -> int:
    """Collective. Returns the largest of the ranks' integers (True is 1), so that all take the same decision."""
    return int(all_reduce_max(torch.tensor(int(flag), dtype=torch.int64), context))


def _has_peers(context: RankContext) -> bool:
    """Returns whether there are other ranks to communicate with.

    Raises:
        RuntimeError: there are, but no process group.
    """
    if context.world_size == 1:
        return False
    if not dist.is_initialized():
        raise RuntimeError(f"{context.world_size} ranks, but no process group: call this inside process_group(...).")
    assert dist.get_world_size() == context.world_size, "the process group and the topology have different sizes"
    return True


def _to_wire(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a contiguous tensor that the group can send: on its own device, or on CUDA if the group has only NCCL."""
    sends_host = device.type != "cpu" or "gloo" in str(dist.get_backend_config())
    return tensor.detach().contiguous() if sends_host else tensor.detach().cuda().contiguous()


def _host_wire(tensor: Tensor) -> Tensor:
    return _to_wire(tensor, torch.device("cpu"))


def _exchange_headers(tensor: Tensor, context: RankContext) -> tuple[list[Tensor], Tensor]:
    """Collective. Returns all ranks' headers, and this rank's bytes."""
    header = _host_wire(build_header(tensor))
    headers = [torch.empty_like(header) for _ in range(context.world_size)]
    context.traffic.add(header.nbytes)
    dist.all_gather(headers, header)
    return headers, tensor_to_bytes(tensor)


def node_first(work: Callable[[], Json], context: RankContext, *, progress_every_s: float = 30.0) -> Json:
    """Collective. Runs `work` on local rank 0 of each node; returns its result on every rank of the node, through JSON.

    The other ranks wait in the store, not in a collective, for as long as the work takes. Ctrl-C and the launcher can
    still end them.

    Args:
        work: runs once per node. It must not call collectives.
        progress_every_s: seconds between two log lines that name the nodes still at work.

    Raises:
        DtrainError: what `work` raised on any node, on all ranks, with the same type and message.
    """
    if not _has_peers(context):
        return json.loads(json.dumps(work()))
    topology = context.topology
    node_work = _node_work(context, "node_first", topology.node_rank, topology.num_nodes, unit="node")
    return run_node_work(node_work, work if context.is_node_main else None, progress_every_s=progress_every_s)


def every_rank(work: Callable[[], Json], context: RankContext, *, progress_every_s: float = 30.0) -> Json:
    """Collective. Runs `work` on every rank, and waits for all; returns this rank's result, through JSON.

    As in `node_first`, ranks that are done wait in the store for as long as the others work.

    Args:
        work: must not call collectives.
        progress_every_s: seconds between two log lines that name the ranks still at work.

    Raises:
        DtrainError: what `work` raised on any rank, on all ranks, with the same type and message.
    """
    if not _has_peers(context):
        return json.loads(json.dumps(work()))
    rank_work = _node_work(context, "every_rank", context.rank, context.world_size, unit="rank")
    return run_node_work(rank_work, work, progress_every_s=progress_every_s)


def _node_work(context: RankContext, name: str, node_rank: int, num_nodes: int, *, unit: str) -> NodeWork:
    store = _get_default_store()
    # Each rank counts its own calls. All ranks make the same calls, so the number identifies the call on all of them.
    number = store.add(f"{name}/calls/{context.rank}", 1)
    return NodeWork(
        store, f"{name}/{number}", context.rank, context.world_size, node_rank, num_nodes, unit, context.heartbeat
    )


def on_main(work: Callable[[], Json], context: RankContext) -> Json:
    """Collective. Runs `work` on rank 0; returns its result on every rank, through JSON.

    The other ranks wait in a collective.

    Raises:
        DtrainError: what `work` raised, on all ranks, with the same type and message.
    """
    return value_of(broadcast_object(outcome_of(work) if context.is_main else None, context), context)


def outcome_of(work: Callable[[], Json]) -> Json:
    """Returns the result or the DtrainError of some work on rank 0, to send it to the others. See `value_of`."""
    try:
        return {"value": work()}
    except DtrainError as error:
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in ERROR_TYPES)
        return {"error": kind, "message": str(error)}


def value_of(outcome: Json, context: RankContext) -> Json:
    """Returns the result that `outcome_of` made on rank 0.

    Raises:
        DtrainError: what the work raised.
    """
    if "error" in outcome:
        failure = ERROR_TYPES[outcome["error"]](outcome["message"])
        failure.is_reported_elsewhere = not context.is_main
        raise failure
    return outcome["value"]


def job_store(context: RankContext) -> KeyValueStore | None:
    """Returns the store that all ranks share, which outlives the process group; None for one process."""
    return _get_default_store() if _has_peers(context) else None


def is_lost_peer(error: BaseException) -> bool:
    """Returns whether a collective or the store failed because another rank is gone. That rank may have reported why."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "NCCL communicator was aborted",
        "remote process exited or there was a network error",
        "Connection closed by remote peer",
    )
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)

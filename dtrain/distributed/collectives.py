"""What crosses ranks: sums, maxima, tensors of any shape, JSON objects, agreement, and work done once per node.

Every function works at world size 1 without a process group; more ranks without one are an error, never a silent single
process. Objects cross as JSON, never as pickles. Reductions stay on their tensor's device; what is gathered, or
broadcast without a known shape, travels through the host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.distributed.node_first import Turn, take_turn
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.rendezvous import Board
from dtrain.distributed.serialization import (
    HEADER_SIZE,
    bytes_of,
    decode,
    encode,
    header_of,
    num_bytes,
    padded,
    restore,
)
from dtrain.errors import ERROR_TYPES, DtrainError

JSON = Any


def all_reduce_sum(tensor: Tensor, context: RankContext) -> Tensor:
    """Collective. The sum over ranks, elementwise, as a new tensor on the same device."""
    return _all_reduce(tensor, context, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor, context: RankContext) -> Tensor:
    """Collective. The maximum over ranks, elementwise, as a new tensor on the same device."""
    return _all_reduce(tensor, context, dist.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, context: RankContext, operation: Any) -> Tensor:
    if not _has_peers(context):
        return tensor.clone()
    wire = _to_wire(tensor.clone(), tensor.device)
    context.traffic.add(wire.nbytes)
    dist.all_reduce(wire, op=operation)
    return wire.to(tensor.device)


def reduce_sum(tensor: Tensor, context: RankContext, *, dst: int = 0) -> Tensor | None:
    """Collective. The sum over ranks as a new tensor on rank `dst`, None on the others."""
    if not _has_peers(context):
        return tensor.clone()
    wire = _to_wire(tensor.clone(), tensor.device)
    context.traffic.add(wire.nbytes)
    dist.reduce(wire, dst=dst, op=dist.ReduceOp.SUM)
    return wire.to(tensor.device) if context.rank == dst else None


def broadcast(tensor: Tensor | None, context: RankContext, *, src: int = 0, like: Tensor | None = None) -> Tensor:
    """Collective. Rank `src`'s tensor on every rank, as a new tensor.

    Args:
        tensor: read on rank `src` only.
        like: shape, dtype and device of the result, where all ranks know them: one message less, and it stays on the
            device. Without it the result lies on the host.
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
        header_of(tensor) if tensor is not None and is_source else torch.empty(HEADER_SIZE, dtype=torch.int64)
    )
    context.traffic.add(header.nbytes)
    dist.broadcast(header, src=src)
    size = num_bytes(header)
    payload = _host_wire(bytes_of(tensor) if tensor is not None and is_source else torch.empty(size, dtype=torch.uint8))
    if size:
        context.traffic.add(size)
        dist.broadcast(payload, src=src)
    return restore(payload, header)


def scatter(tensors: Sequence[Tensor] | None, context: RankContext, *, src: int = 0) -> Tensor:
    """Collective. Rank r gets `tensors[r]` of rank `src`, on the host. Shapes and dtypes may differ."""
    if not _has_peers(context):
        assert tensors is not None
        return tensors[0].detach().cpu().clone()
    headers = torch.empty(context.world_size, HEADER_SIZE, dtype=torch.int64)
    parts: list[Tensor] | None = None
    if context.rank == src:
        assert tensors is not None, "the source has nothing to scatter"
        assert len(tensors) == context.world_size, f"{len(tensors)} tensors for {context.world_size} ranks"
        headers = torch.stack([header_of(tensor) for tensor in tensors])
    headers = _host_wire(headers)
    context.traffic.add(headers.nbytes)
    dist.broadcast(headers, src=src)
    width = max(num_bytes(header) for header in headers)
    payload = _host_wire(torch.empty(width, dtype=torch.uint8))
    if context.rank == src and tensors is not None:
        parts = [_host_wire(padded(bytes_of(tensor), width)) for tensor in tensors]
    if width:
        context.traffic.add(width)
        dist.scatter(payload, parts, src=src)
    return restore(payload, headers[context.rank])


def gather(tensor: Tensor, context: RankContext, *, dst: int = 0) -> list[Tensor] | None:
    """Collective. All ranks' tensors in rank order, on the host of rank `dst`; None elsewhere. Shapes may differ."""
    if not _has_peers(context):
        return [tensor.detach().cpu().clone()]
    headers, payload = _announce(tensor, context)
    parts = [torch.empty_like(payload) for _ in headers] if context.rank == dst else None
    if payload.numel():
        context.traffic.add(payload.nbytes)
        dist.gather(payload, parts, dst=dst)
    return None if parts is None else [restore(part, header) for part, header in zip(parts, headers, strict=True)]


def all_gather(tensor: Tensor, context: RankContext) -> list[Tensor]:
    """Collective. All ranks' tensors in rank order, on the host. Shapes and dtypes may differ."""
    if not _has_peers(context):
        return [tensor.detach().cpu().clone()]
    headers, payload = _announce(tensor, context)
    parts = [torch.empty_like(payload) for _ in headers]
    if payload.numel():
        context.traffic.add(payload.nbytes)
        dist.all_gather(parts, payload)
    return [restore(part, header) for part, header in zip(parts, headers, strict=True)]


def all_gather_object(obj: JSON, context: RankContext) -> list[JSON]:
    """Collective. All ranks' objects in rank order, through JSON (tuples come back as lists)."""
    return [decode(part) for part in all_gather(encode(obj), context)]


def broadcast_object(obj: JSON | None, context: RankContext, *, src: int = 0) -> JSON:
    """Collective. Rank `src`'s object on every rank, through JSON. The others' argument is not read."""
    return decode(broadcast(encode(obj) if context.rank == src else None, context, src=src))


def barrier(context: RankContext) -> None:
    """Collective. Returns when every rank has called it."""
    if _has_peers(context):
        context.traffic.add(4)
        # Not dist.barrier, which guesses a device.
        dist.all_reduce(_host_wire(torch.zeros(1)))


def agree(flag: int, context: RankContext) -> int:
    """Collective. The largest of the ranks' integers (True counts 1), so that all take the same decision."""
    return int(all_reduce_max(torch.tensor(int(flag), dtype=torch.int64), context))


def gather_for_metrics(
    values: Mapping[str, Tensor], example_index: Tensor, context: RankContext, *, num_examples: int
) -> dict[str, Tensor]:
    """Collective. Every rank's per-example values, each example exactly once, in data order, on the host of every rank.

    Args:
        values: by name, one row per example of this rank: (rows, ...). Trailing shape and dtype are the same on all
            ranks. A rank without examples passes empty tensors of any shape, or nothing: what it lacks others tell.
        example_index: (rows,) int64, each row's place in the split.
        num_examples: examples in the whole split.

    Returns:
        By name, (num_examples, ...) on the host.

    Raises:
        DtrainError: on all ranks alike; the indices are not 0 .. num_examples-1 once each, or the values do not fit.
    """
    rows = example_index.numel()
    mine = {name: [list(value.shape), str(value.dtype)] for name, value in values.items()}
    told = all_gather_object({"rows": rows, "values": mine}, context)
    kinds = _common_kinds(told)
    index = torch.cat(all_gather(example_index.to(torch.int64).reshape(-1), context))
    _check_permutation(index, num_examples)
    gathered = {}
    for name in kinds if kinds is not None else values:
        parts = all_gather(values[name] if rows else torch.empty(0), context)
        if kinds is None:  # nobody has an example
            gathered[name] = values[name].detach().cpu().clone()
            continue
        whole = torch.cat([part for part, other in zip(parts, told, strict=True) if other["rows"]])
        gathered[name] = torch.empty_like(whole)
        gathered[name][index] = whole
    return gathered


def _common_kinds(told: Sequence[JSON]) -> dict[str, JSON] | None:
    """Trailing shape and dtype of each value by name, the same on every rank that has rows; None where none has."""
    kinds: dict[str, JSON] | None = None
    for rank, said in enumerate(told):
        if not said["rows"]:
            continue
        short = [name for name, (shape, _) in said["values"].items() if shape[:1] != [said["rows"]]]
        if short:
            raise DtrainError(
                f"Evaluation: rank {rank} has {said['rows']} example indices, but not as many rows of {short[0]}."
            )
        here = {name: [shape[1:], dtype] for name, (shape, dtype) in said["values"].items()}
        if kinds is not None and here != kinds:
            raise DtrainError(
                f"Evaluation: ranks disagree about the values they gather: {kinds} against {here} on rank {rank}."
            )
        kinds = here
    return kinds


def _check_permutation(index: Tensor, num_examples: int) -> None:
    counts = torch.bincount(index[(index >= 0) & (index < num_examples)], minlength=num_examples)
    problems = {
        "outside": index[(index < 0) | (index >= num_examples)],
        "counted more than once": (counts > 1).nonzero().reshape(-1),
        "missing": (counts == 0).nonzero().reshape(-1),
    }
    found = [
        f"{wrong.numel()} {what} ({', '.join(map(str, wrong[:5].tolist()))}{', ...' if wrong.numel() > 5 else ''})"
        for what, wrong in problems.items()
        if wrong.numel()
    ]
    if found:
        raise DtrainError(
            f"Evaluation must count each of the {num_examples} examples once; of their indices are {'; '.join(found)}. "
            "Each batch's example_index must come from the split's own order."
        )


def _has_peers(context: RankContext) -> bool:
    """Whether anything has to be sent. More ranks without their group is a mistake of the caller."""
    if context.world_size == 1:
        return False
    if not dist.is_initialized():
        raise RuntimeError(f"{context.world_size} ranks, but no group: call this inside process_group(...).")
    assert dist.get_world_size() == context.world_size, "the process group is of another size than the topology"
    return True


def _to_wire(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous tensor where the group can send it from: its own device, or CUDA in a group that is NCCL's alone."""
    sends_host = device.type != "cpu" or "gloo" in str(dist.get_backend_config())
    return tensor.detach().contiguous() if sends_host else tensor.detach().cuda().contiguous()


def _host_wire(tensor: Tensor) -> Tensor:
    return _to_wire(tensor, torch.device("cpu"))


def _announce(tensor: Tensor, context: RankContext) -> tuple[list[Tensor], Tensor]:
    """All ranks' headers, and this rank's bytes padded to the longest of them."""
    header = _host_wire(header_of(tensor))
    headers = [torch.empty_like(header) for _ in range(context.world_size)]
    context.traffic.add(header.nbytes)
    dist.all_gather(headers, header)
    return headers, _host_wire(padded(bytes_of(tensor), max(map(num_bytes, headers))))


def node_first(work: Callable[[], JSON], context: RankContext, *, progress_every_s: float = 30.0) -> JSON:
    """Collective. Local rank 0 of each node does `work`; every rank of the node gets its result, through JSON.

    The others wait in the store, not in a collective, however long it takes; Ctrl-C and the launcher still end them.

    Args:
        work: runs once per node. It must not call collectives.
        progress_every_s: seconds between two lines that say who is still at work.

    Raises:
        DtrainError: what `work` raised on any node, on all ranks, of the same type and with the same message.
    """
    if not _has_peers(context):
        return json.loads(json.dumps(work()))
    store = _get_default_store()
    # Every rank counts its own calls, and all make the same ones: so the number names the call everywhere.
    number = store.add(f"node_first/calls/{context.rank}", 1)
    turn = Turn(
        store,
        f"node_first/{number}",
        context.rank,
        context.world_size,
        context.topology.node_rank,
        context.topology.num_nodes,
        context.heartbeat,
    )
    return take_turn(turn, work if context.is_node_main else None, progress_every_s=progress_every_s)


def on_main(work: Callable[[], JSON], context: RankContext) -> JSON:
    """Collective. Rank 0 does `work`; every rank gets its result, through JSON. The others wait in a collective.

    Raises:
        DtrainError: what `work` raised, on all ranks, of the same type and with the same message.
    """
    told = None
    if context.is_main:
        try:
            told = {"value": work()}
        except DtrainError as error:
            kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in ERROR_TYPES)
            told = {"error": kind, "message": str(error)}
    told = broadcast_object(told, context)
    if "error" in told:
        failed = ERROR_TYPES[told["error"]](told["message"])
        failed.is_reported_elsewhere = not context.is_main
        raise failed
    return told["value"]


def job_board(context: RankContext) -> Board | None:
    """The store that all ranks share, which outlives the process group; None for one process."""
    return _get_default_store() if _has_peers(context) else None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective or the store failed because another rank is gone; that rank may have said why."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "NCCL communicator was aborted",
    )
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)

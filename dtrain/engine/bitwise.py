"""The same bits at any number of ranks (engine.bitwise): on one process, and with a replica on every rank.

Floating-point addition depends on its order, and an all-reduce adds in an order that depends on the number of ranks. Here
the gradients of a step's micro-batches are added in a tree that depends on the number of micro-batches alone. Each rank
runs neighbors in the step's list, so that it adds most of the tree by itself. A node whose children are on two ranks is
computed by the rank of its left child, to which the other one sends its partial sum. The root is broadcast: every rank
clips and updates with the same bits. One process computes the same tree, and keeps a number of gradients that is
logarithmic in the number of micro-batches.

The kernels must be the same too: equal processors, libraries and numbers of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import all_gather_object, broadcast
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.gradient_messages import GradientMessage, Messenger, messages_of
from dtrain.engine.local_sgd import buckets_of
from dtrain.engine.protocol import EngineTraits, StepWeight
from dtrain.engine.single import SingleEngine, replicated_memory
from dtrain.errors import ConfigError

THREADS = "threads"
"""Name of the number of threads among the values that a checkpoint keeps."""

Gradients = list[torch.Tensor | None]
"""One for each trainable parameter; None where no micro-batch gave one."""


class Node(NamedTuple):
    """An inner node of the tree: the sum of micro-batches `start` to `stop`, from its children, which meet at `middle`."""

    start: int
    middle: int
    stop: int


def inner_nodes(start: int, stop: int) -> Iterator[Node]:
    """Yields the tree's inner nodes, children first. A left child has as many leaves as a power of two allows."""
    if stop - start < 2:
        return
    middle = start + (1 << (stop - start - 1).bit_length() - 1)
    yield from inner_nodes(start, middle)
    yield from inner_nodes(middle, stop)
    yield Node(start, middle, stop)


class Tree(NamedTuple):
    """The additions of a step.

    Attributes:
        local: by micro-batch: the nodes that its rank alone can compute once it is there, children first.
        shared: the nodes with micro-batches of several ranks, children first.
    """

    local: Mapping[int, Sequence[Node]]
    shared: Sequence[Node]


@lru_cache(maxsize=64)
def tree_of(shares: tuple[int, ...]) -> Tree:
    """Returns the additions of a step.

    Args:
        shares: the rank of each micro-batch, by index; every rank has neighbors.
    """
    local: dict[int, list[Node]] = {}
    shared = []
    for node in inner_nodes(0, len(shares)):
        if shares[node.start] == shares[node.stop - 1]:
            local.setdefault(node.stop - 1, []).append(node)
        else:
            shared.append(node)
    return Tree(local, shared)


def add(left: Gradients, right: Gradients) -> Gradients:
    """Adds `right` to `left`, in place. A gradient that one of them lacks counts as zeros."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if pairs:
        torch._foreach_add_([a for a, _ in pairs], [b for _, b in pairs])
    return [_filled(b) if a is None else a if b is not None else _filled(a) for a, b in zip(left, right, strict=True)]


def _filled(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a gradient plus the zeros that a rank sends for one that it lacks: they make a negative zero positive."""
    return None if gradient is None else gradient.add_(0.0)


class BitwiseEngine(SingleEngine):
    """The single engine on every rank; gradients are added in a tree, in the last micro-batch of a step."""

    contiguous = True

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        super().__init__(module, optimizer, config, context)
        self.name = "single" if context.world_size == 1 else "ddp"
        self.decides_on_device = False  # the sums of a step are added on the host, where their order can be chosen
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._messages = messages_of(self._trainable, config.engine.bucket_mb)
        self._shares: tuple[int, ...] = ()
        self._own: Iterator[int] = iter(())  # indices of this rank's micro-batches that are still to come
        self._sums: dict[tuple[int, int], Gradients] = {}  # by the first micro-batch, and the one after the last
        if self._device_type == "cuda":
            use_deterministic_kernels()
        if context.world_size > 1:
            require_equal_arithmetic(context)
            copy_from_main([tensor.data for tensor in (*module.parameters(), *module.buffers())], context)

    @classmethod
    def traits(cls, config: Config, context: RankContext, *, total_steps: int | None) -> EngineTraits:
        train = config.train
        most = -(-train.global_batch_size // (1 if train.micro_batch_tokens else train.micro_batch_size))
        levels = (-(-most // context.world_size)).bit_length()
        return EngineTraits(
            memory=replicated_memory(config, exchange=2 * 4.0)._replace(gradients=4.0 * levels),
            detail="the same bits at any number of ranks",
            contiguous=True,
            stronger_promise="every bit of weights, moments, losses and gradient norms at any number of ranks (engine.bitwise)",
            notes=(
                "note: engine.bitwise promises equal bits for equal processors, libraries and numbers of threads: here "
                f"{torch.get_num_threads()} per rank (OMP_NUM_THREADS={torch.get_num_threads()} sets it in every start)",
            ),
        )

    def loss_scale(self, weight: StepWeight) -> float:
        return 1.0 / weight.total if weight.total else 0.0  # gradients are added, not averaged

    def begin_step(self, shares: Sequence[int]) -> None:
        self._shares = tuple(shares)
        self._own = (index for index, rank in enumerate(shares) if rank == self.context.rank)
        self._sums = {}

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return self._micro_batch(last=last)

    @contextmanager
    def _micro_batch(self, *, last: bool) -> Iterator[None]:
        with self.autocast():
            yield
        gradients = self._take_gradients()
        index = next(self._own, None)
        if index is not None:  # else this rank has no micro-batch in this step, and ran one that does not count
            self._sums[index, index + 1] = gradients
            for start, middle, stop in tree_of(self._shares).local.get(index, ()):
                self._sums[start, stop] = add(self._sums.pop((start, middle)), self._sums.pop((middle, stop)))
        if last:
            self._finish()

    def _take_gradients(self) -> Gradients:
        """Returns the gradients of one micro-batch, so that the next one begins without any."""
        gradients = [parameter.grad for parameter in self._trainable]
        for parameter in self._trainable:
            parameter.grad = None
        if any(gradient is not None and gradient.layout != torch.strided for gradient in gradients):
            raise ConfigError(
                "engine.bitwise adds dense gradients only, but the model has an embedding with sparse=True: use sparse=False, "
                "or engine.bitwise=false."
            )
        return gradients

    def _finish(self) -> None:
        """Collective. Completes the tree, and gives every rank the gradient of the step."""
        if self.context.world_size == 1:
            (gradients,) = self._sums.values()
            for parameter, gradient in zip(self._trainable, gradients, strict=True):
                parameter.grad = gradient
        else:
            self.context.heartbeat.at(Phase.EXCHANGE)
            self._exchange()
        self._sums = {}

    def _exchange(self) -> None:
        """Collective. Computes the nodes that ranks share, and broadcasts the root."""
        messenger = Messenger(self.context)
        roots = []
        for message in self._messages:
            sums = {place: message.pack(gradients) for place, gradients in self._sums.items()}
            add_shared(sums, self._shares, message, messenger)
            root = sums.pop((0, len(self._shares)), None)
            roots.append(messenger.broadcast(message.empty() if root is None else root, src=self._shares[0]))
        messenger.finish()
        unpack_all(self._messages, roots)

    def scalars(self) -> dict[str, float]:
        return {**super().scalars(), THREADS: float(torch.get_num_threads())}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        super().load_scalars(scalars)
        saved, threads = int(scalars.get(THREADS, 0)), torch.get_num_threads()
        if saved not in (0, threads) and self.context.is_main:
            log.warning(
                "engine.bitwise: this run has used %d thread(s) per rank and continues with %d, so later bits may differ from "
                "those of an uninterrupted run. OMP_NUM_THREADS=%d keeps the number",
                saved,
                threads,
                saved,
            )


def unpack_all(messages: Sequence[GradientMessage], roots: Sequence[torch.Tensor]) -> None:
    """Gives each parameter its gradient. The counts of all messages are fetched from the device at once."""
    views = [message.counts(root) for message, root in zip(messages, roots, strict=True)]
    counts = iter(torch.cat([view.double() for view in views]).tolist() if views else [])
    for message, root, view in zip(messages, roots, views, strict=True):
        message.unpack(root, list(islice(counts, len(view))))


def add_shared(
    sums: dict[tuple[int, int], torch.Tensor], shares: tuple[int, ...], message: GradientMessage, messenger: Messenger
) -> None:
    """Collective. Computes this rank's nodes of those that ranks share.

    Every rank goes through them in the same order, and a rank only waits for nodes before the current one.

    Args:
        sums: this rank's nodes, by the first micro-batch and the one after the last; changed in place.
    """
    rank = messenger.rank
    for start, middle, stop in tree_of(shares).shared:
        left, right = shares[start], shares[middle]
        if rank == left:
            other = sums.pop((middle, stop)) if right == left else messenger.receive(message.empty(), src=right)
            sums[start, stop] = sums.pop((start, middle)).add_(other)
        elif rank == right:
            messenger.send(sums.pop((middle, stop)), dst=left)


def copy_from_main(tensors: list[torch.Tensor], context: RankContext) -> None:
    """Collective. All ranks begin with the weights of rank 0, as under DDP. A sum would lose the sign of zeros."""
    for bucket in buckets_of(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).view(torch.uint8)
        received = broadcast(flat, context, like=flat).view(bucket[0].dtype)
        parts = torch.split(received, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def require_equal_arithmetic(context: RankContext) -> None:
    """Collective. Refuses ranks whose kernels may round differently.

    Raises:
        ConfigError: their numbers of threads or the instructions of their processors differ.
    """
    own = [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    everyones = all_gather_object(own, context)
    for rank, other in enumerate(everyones):
        if other != everyones[0]:
            raise ConfigError(
                f"engine.bitwise needs the same arithmetic on every rank, but rank 0 has {everyones[0][0]} thread(s) and "
                f"{everyones[0][1]} instructions, and rank {rank} has {other[0]} and {other[1]}. Set OMP_NUM_THREADS=1 (or "
                "another number) on every node, and use equal processors."
            )


def use_deterministic_kernels() -> None:
    """Makes torch choose CUDA kernels that add in a fixed order, or raise an error where there is none.

    cuBLAS has one if CUBLAS_WORKSPACE_CONFIG is set before its first call (job/session.py); else torch raises an error.
    """
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    # Their backward passes have no fixed order; flash attention's and plain attention's have one.
    torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)

"""Gradients in flat tensors: few messages, sent point to point and broadcast while other work goes on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dtrain.distributed.process_group import COLLECTIVE_TIMEOUT_S
from dtrain.distributed.rank_context import RankContext
from dtrain.models.host_copy import copy_to

DEFAULT_MB = 25.0
"""MiB of gradients per message, as in DDP's collectives."""

ALIGNMENT_BYTES = 64
"""Each gradient begins at a multiple, as a tensor of its own does: CUDA kernels choose their order of additions by it."""


class GradientMessage:
    """The layout of a flat tensor with the gradients of some parameters of one type, and a count for each.

    A count is the number of sums that have the gradient: 0 or 1 at first; adding two flat tensors adds the counts, too.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], indices: Sequence[int]) -> None:
        """
        Args:
            parameters: all that are trained.
            indices: those in this message.
        """
        self._indices = indices
        self._parameters = [parameters[index] for index in indices]
        self._like = self._parameters[0].detach()
        unit = max(1, ALIGNMENT_BYTES // self._like.element_size())
        self._offsets, end = [], -(-len(indices) // unit) * unit
        for parameter in self._parameters:
            self._offsets.append(end)
            end += -(-parameter.numel() // unit) * unit
        self._size = end

    def empty(self) -> torch.Tensor:
        """Returns a flat tensor to receive into."""
        return self._like.new_empty(self._size)

    @torch.no_grad()
    def pack(self, gradients: list[torch.Tensor | None]) -> torch.Tensor:
        """Moves this message's gradients into a new flat tensor; `gradients` then has None for them."""
        flat = self._like.new_zeros(self._size)
        counts = torch.tensor([float(gradients[index] is not None) for index in self._indices])
        self.counts(flat).copy_(copy_to(counts, flat.device))
        for index, view in zip(self._indices, self._views(flat), strict=True):
            gradient = gradients[index]
            if gradient is not None:
                view.copy_(gradient)
                gradients[index] = None
        return flat

    def counts(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns the count of each gradient, as a view."""
        return flat[: len(self._indices)]

    @torch.no_grad()
    def unpack(self, flat: torch.Tensor, counts: Sequence[float]) -> None:
        """Gives each parameter its gradient, in the parameter's memory layout; None where the count is 0.

        Args:
            counts: those of `flat`, on the host.
        """
        for parameter, count, view in zip(self._parameters, counts, self._views(flat), strict=True):
            if not count:
                parameter.grad = None
            elif parameter.is_contiguous():
                parameter.grad = view
            else:  # the order of additions in the norm depends on the layout
                parameter.grad = torch.empty_like(parameter).copy_(view)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape)
            for offset, parameter in zip(self._offsets, self._parameters, strict=True)
        ]


def messages_of(parameters: Sequence[nn.Parameter], limit_mb: float | None) -> list[GradientMessage]:
    """Spreads parameters over messages, in their order. A message has one type, and a larger one only a single parameter.

    Args:
        limit_mb: MiB per message; None: 25.
    """
    limit = (limit_mb or DEFAULT_MB) * 2**20
    groups: list[list[int]] = []
    size = 0
    for index, parameter in enumerate(parameters):
        begins = not groups or size + parameter.nbytes > limit or parameter.dtype != parameters[groups[-1][0]].dtype
        if begins:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += parameter.nbytes
    return [GradientMessage(parameters, group) for group in groups]


class Messenger:
    """Sends flat tensors of one step, and counts them.

    Attributes:
        rank: this process's.
    """

    def __init__(self, context: RankContext) -> None:
        self.rank = context.rank
        self._traffic = context.traffic
        self._pending: list[tuple[Any, torch.Tensor]] = []  # a tensor must live until it is sent

    def send(self, flat: torch.Tensor, *, dst: int) -> None:
        """Starts to send to a rank that calls `receive`. `flat` must not change any more."""
        self._traffic.add(flat.nbytes)
        self._pending.append((dist.isend(flat, dst=dst), flat))

    def receive(self, flat: torch.Tensor, *, src: int) -> torch.Tensor:
        """Returns `flat` with what a rank sent. What one rank sends arrives in order."""
        self._traffic.add(flat.nbytes)
        _wait(dist.irecv(flat, src=src), flat)
        return flat

    def broadcast(self, flat: torch.Tensor, *, src: int) -> torch.Tensor:
        """Collective. Starts to make `flat` equal to that of rank `src`; returns it, valid after `finish`."""
        self._traffic.add(flat.nbytes)
        self._pending.append((dist.broadcast(flat, src=src, async_op=True), flat))
        return flat

    def finish(self) -> None:
        """Waits for everything."""
        for work, flat in self._pending:
            _wait(work, flat)
        self._pending = []


def _wait(work: Any, flat: torch.Tensor) -> None:
    """Waits for a message. Gloo's messages between two ranks would have the time limit of the start-up."""
    if flat.device.type == "cpu":
        work.wait(timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    else:
        work.wait()  # NCCL only orders its stream before the current one; a time limit would stop the host

"""The values of a step, read at once or one step later.

Fetching a value from a CUDA device stops the host until the device has done everything before it, and then the device
waits for the host. So a step's totals stay on the device, which decides by itself whether to skip the update. They are
copied to the host meanwhile, and read when the next step's micro-batches are in the device's queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.rank_context import RankContext


class StepValues(NamedTuple):
    """What the device computed in a step.

    Attributes:
        losses: loss sum of each counted micro-batch of this rank, in nats.
        loss: summed loss of all micro-batches and ranks; nan where one was not finite.
        faults: number of micro-batches whose loss was not finite.
        grad_norm: as in StepResult.
        applied: as in StepResult.
        gradient_norms: norm of each parameter's gradient, at the steps that measure them.
    """

    losses: Sequence[float]
    loss: float
    faults: int
    grad_norm: float
    applied: bool
    gradient_norms: Mapping[str, float] | None = None


class LateTotals:
    """The totals of one step, on the device. Nothing here waits for the device but `read`."""

    def __init__(self, losses: Sequence[torch.Tensor], device: torch.device, context: RankContext) -> None:
        """Collective, in the device's group.

        Args:
            losses: as `run_micro_batches` returned them; a rank may have none.
        """
        nothing = torch.zeros(0, dtype=torch.float64, device=device)
        self._losses = torch.stack(list(losses)).double() if losses else nothing
        sums = torch.stack([self._losses, (~self._losses.isfinite()).double()]).sum(dim=1)
        self._adds_here = context.world_size == 1
        self._sums = sums if self._adds_here else all_reduce_sum(sums, context)

    @property
    def has_faults(self) -> torch.Tensor:
        """Whether the loss of some micro-batch of any rank is not finite: () bool, on the device."""
        return self._sums[1] > 0

    def start_copy(self, grad_norm: torch.Tensor) -> Callable[[], StepValues]:
        """Starts the copy to the host; returns `read`, which waits for its end and returns the values.

        Args:
            grad_norm: as `Engine.step_on_device` returned it.
        """
        fetch = copy_to_host(torch.cat([self._sums, grad_norm.detach().double().reshape(1), self._losses]))

        def read() -> StepValues:
            loss, faults, norm, *losses = fetch()
            if faults:
                loss = math.nan
            elif self._adds_here:  # the digits of a step that is read at once
                loss = math.fsum(losses)
            return StepValues(losses, loss, int(faults), norm, applied=not faults and math.isfinite(norm))

        return read


def copy_to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Starts to copy a vector; returns a function that waits for the end of the copy and returns the numbers."""
    if values.device.type != "cuda":
        return values.tolist
    # Only a copy to pinned memory runs beside the host.
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def fetch() -> list[float]:
        done.synchronize()
        numbers: list[float] = pinned.tolist()
        return numbers

    return fetch


def to_floats(losses: Sequence[torch.Tensor]) -> list[float]:
    """Returns numbers of one device, with one transfer for all. Waits for the device."""
    if len(losses) == 1:
        return [losses[0].item()]
    return torch.stack(list(losses)).double().tolist() if losses else []

"""What to say when a device runs out of memory: at what, how much it held, and what to set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dtrain.errors import DtrainError

Tensors = Mapping[str, torch.Tensor]

LESS_AT_ONCE = (
    "data.max_length lower, model.gradient_checkpointing=true or engine.precision=bf16. A smaller micro-batch changes "
    "the answer by nothing but dropout's draws"
)
LESS_TO_KEEP = "engine.zero_stage=1 (2, 3) to share it out over the ranks, freeze.modules, or optim.name=adafactor"


@contextmanager
def explain_in_training(tensors: Tensors) -> Iterator[None]:
    """Around forward and backward of one micro-batch, (batch, length, ...) tensors.

    Raises:
        DtrainError: instead of torch's OutOfMemoryError.
    """
    with _explain(f"a micro-batch of {size(tensors)}", f"Set train.micro_batch_size lower, {LESS_AT_ONCE}."):
        yield


@contextmanager
def explain_in_evaluation(tensors: Tensors) -> Iterator[None]:
    """The same around an evaluation's forward."""
    with _explain(f"an evaluation micro-batch of {size(tensors)}", "Set evaluation.micro_batch_size lower."):
        yield


@contextmanager
def explain_in_step() -> Iterator[None]:
    """The same around the optimizer's step, which makes its moments the first time."""
    with _explain("the optimizer's step", f"The moments do not fit beside the weights: set {LESS_TO_KEEP}."):
        yield


def size(tensors: Tensors) -> str:
    """How many examples, and how long the longest padded row of tokens is."""
    ids = tensors.get("input_ids")
    shape = ids.shape if ids is not None else next(iter(tensors.values())).shape
    return f"{shape[0]} examples" + (f", {shape[-1]} tokens long" if ids is not None else "")


@contextmanager
def _explain(at: str, cure: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DtrainError(f"Out of memory at {at}{_held()}. {cure}\n{str(error).splitlines()[0]}") from error


def _held() -> str:
    if not torch.cuda.is_available():
        return ""
    gib = 1024**3
    peak, (_, total) = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()
    return f" (peak {peak / gib:.1f} GiB of {total / gib:.1f} GiB on {torch.cuda.get_device_name()})"

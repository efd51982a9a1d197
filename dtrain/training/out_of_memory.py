"""Explains an out-of-memory error: where it happened, how much memory was in use, and which settings help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dtrain.errors import DtrainError
from dtrain.tasks.protocol import Batch

SMALLER_ACTIVATIONS = (
    "data.max_length lower, model.gradient_checkpointing=true or engine.precision=bf16. A smaller micro-batch changes "
    "only dropout's random draws"
)
SMALLER_STATE = "engine.zero_stage=1 (2, 3) to shard it over the ranks, freeze.modules, or optim.name=adafactor"


@contextmanager
def explain_in_training(tensors: Batch, *, size_setting: str = "train.micro_batch_size") -> Iterator[None]:
    """Surrounds forward and backward of one micro-batch, (batch, length, ...) tensors.

    Args:
        size_setting: the setting that limits the size of a micro-batch.

    Raises:
        DtrainError: instead of torch's OutOfMemoryError.
    """
    with _explain(f"a micro-batch of {size(tensors)}", f"Set {size_setting} lower, {SMALLER_ACTIVATIONS}."):
        yield


@contextmanager
def explain_in_evaluation(tensors: Batch) -> Iterator[None]:
    """Surrounds an evaluation's forward pass."""
    with _explain(f"an evaluation micro-batch of {size(tensors)}", "Set evaluation.micro_batch_size lower."):
        yield


@contextmanager
def explain_in_step() -> Iterator[None]:
    """Surrounds the optimizer's step, which allocates the moments in its first call."""
    with _explain(
        "the optimizer's step", f"The moments do not fit into memory together with the weights: set {SMALLER_STATE}."
    ):
        yield


def size(tensors: Batch) -> str:
    """Returns the number of examples, and the length of the padded rows of tokens."""
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

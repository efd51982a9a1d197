"""Explains an out-of-memory error: where it happened, how much memory was in use, and which settings help.

An error outside the places below (while the model is copied, or in NCCL) is explained by distributed/device_faults.py.
"""

from __future__ import annotations

import re
from types import TracebackType

import torch

from dtrain.errors import DeviceError
from dtrain.tasks.protocol import Batch

CURE_IN_TRAINING = (
    "Set {size_setting} lower, data.max_length lower, model.gradient_checkpointing=true or engine.precision=bf16. A "
    "smaller micro-batch changes only dropout's random draws."
)
CURE_IN_STEP = (
    "The moments do not fit into memory together with the weights: set engine.zero_stage=1 (2, 3) to shard it over the ranks, "
    "freeze.modules, or optim.name=adafactor."
)


def explain_in_training(tensors: Batch, *, size_setting: str = "train.micro_batch_size") -> _Explain:
    """Surrounds forward and backward of one micro-batch, (batch, length, ...) tensors.

    Args:
        size_setting: the setting that limits the size of a micro-batch.

    Raises:
        DeviceError: instead of torch's OutOfMemoryError.
    """
    return _Explain("a micro-batch", CURE_IN_TRAINING, tensors, size_setting)


def explain_in_evaluation(tensors: Batch, *, size_setting: str = "micro_batch_size") -> _Explain:
    """Surrounds an evaluation's forward pass.

    Args:
        size_setting: the setting that limits the size of a micro-batch.
    """
    return _Explain("an evaluation micro-batch", f"Set evaluation.{size_setting} lower.", tensors)


def explain_in_step() -> _Explain:
    """Surrounds the optimizer's step, which allocates the moments in its first call."""
    return _Explain("the optimizer's step", CURE_IN_STEP)


def size(tensors: Batch) -> str:
    """Returns the number of examples, and the length of the padded rows of tokens."""
    ids = tensors.get("input_ids")
    shape = ids.shape if ids is not None else next(iter(tensors.values())).shape
    return f"{shape[0]} examples" + (f", {shape[-1]} tokens long" if ids is not None else "")


class _Explain:
    """A context manager that formats its message only after an error, because it is entered in every micro-batch."""

    __slots__ = ("_at", "_cure", "_size_setting", "_tensors")

    def __init__(self, at: str, cure: str, tensors: Batch | None = None, size_setting: str = "") -> None:
        self._at, self._cure, self._tensors, self._size_setting = at, cure, tensors, size_setting

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            at = self._at if self._tensors is None else f"{self._at} of {size(self._tensors)}"
            first_line = str(error).splitlines()[0]
            cure = self._cure.format(size_setting=self._size_setting)
            raise DeviceError(f"Out of memory at {at}{_held()}. {hints(str(error))}{cure}\n{first_line}") from error


def hints(text: str) -> str:
    """Returns what torch's text says of memory that this process does not use: sentences, or nothing."""
    found = ""
    others = re.findall(r"(?:^|[^\w])Process (\d+) has ([\d.]+ \w+) memory in use", text)
    if others and "this process has" in text:  # in a container torch does not know which of them it is
        listed = ", ".join(f"process {process} has {size}" for process, size in others[:4])
        found += f"Other programs use this GPU ({listed}): end them, or choose another GPU with CUDA_VISIBLE_DEVICES. "
    tried = re.search(r"Tried to allocate ([\d.]+) (\w+)", text)
    unused = re.search(r"([\d.]+) (\w+) is reserved by PyTorch but unallocated", text)
    if tried and unused and _bytes(unused) >= _bytes(tried):
        found += "Enough memory is free, but in pieces: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before the command. "
    return found


def _bytes(size: re.Match[str]) -> float:
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return float(size[1]) * units.get(size[2], 0)


def _held() -> str:
    if not torch.cuda.is_available():
        return ""
    gib = 1024**3
    peak, (_, total) = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()
    return f" (peak {peak / gib:.1f} GiB of {total / gib:.1f} GiB on {torch.cuda.get_device_name()})"

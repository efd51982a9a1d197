"""Copies the state of a run into the staging buffer, tensor by tensor. The training loop waits for this copy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dtrain.checkpoint.format import BUFFER, FULL_TENSOR, MODEL, OPTIMIZER, VALUE, shard_prefix
from dtrain.checkpoint.publish import StagedTensor
from dtrain.checkpoint.staging_buffer import StagingBuffer
from dtrain.engine.protocol import Engine, ParameterState, Shard
from dtrain.models.custom_head import HeadedModel

ALIGNMENT = 64

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Stored types, with their names in safetensors. Other floating-point types are stored as float32."""

KeyMapping = Callable[[str], tuple[str, str]]
"""Maps the name of a parameter or buffer to the stem of its files and its key there."""


def build_key_mapping(module: nn.Module) -> KeyMapping:
    """Returns where each weight of a model is stored. The result is a folder that from_pretrained loads."""
    is_headed = isinstance(module, HeadedModel)
    persistent = set(module.state_dict().keys())

    def key_mapping(name: str) -> tuple[str, str]:
        if name not in persistent:
            return OPTIMIZER, f"{BUFFER}/{name}"
        if is_headed:
            submodule, _, rest = name.partition(".")
            return (MODEL if submodule == "backbone" else submodule), rest
        return MODEL, name

    return key_mapping


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which a tensor of `dtype` is stored."""
    return dtype if dtype in DTYPES else torch.float32


def copy_full_tensors(
    buffer: StagingBuffer, parameters: Iterable[ParameterState], key_mapping: KeyMapping
) -> list[StagedTensor]:
    """Copies parameters and their slots into the buffer, which grows as needed. Returns where each tensor is."""
    copier = _TensorCopier(buffer)
    for parameter in parameters:
        if parameter.value is None:
            continue
        copier.add(*key_mapping(parameter.name), parameter.value)
        # Sorted, because a resumed optimizer returns its slots in another order.
        for slot, value in sorted(parameter.slots.items()):
            copier.add(OPTIMIZER, f"{slot}/{parameter.name}", value)
    return copier.tensors


def copy_shards(buffer: StagingBuffer, shards: Iterable[Shard], part: int) -> list[StagedTensor]:
    """Copies the shards of one rank into the buffer, for the files of its part. Returns where each tensor is."""
    copier = _TensorCopier(buffer)
    for shard in shards:
        start = FULL_TENSOR if shard.start is None else shard.start
        copier.add(shard_prefix(part), f"{shard.slot or VALUE}/{shard.name}@{start}", shard.tensor)
    return copier.tensors


class _TensorCopier:
    """Copies tensors one after the other into a buffer."""

    def __init__(self, buffer: StagingBuffer) -> None:
        self._buffer, self._end = buffer, 0
        self.tensors: list[StagedTensor] = []

    def add(self, stem: str, key: str, tensor: torch.Tensor) -> None:
        dtype = stored_dtype(tensor.dtype)
        size = tensor.numel() * dtype.itemsize
        if self._end + size > self._buffer.size:
            self._buffer.grow(max(self._end + size, self._buffer.size * 3 // 2))
        if size:
            view = torch.frombuffer(self._buffer.view(self._end, size), dtype=dtype)
            view.view(tensor.shape).copy_(tensor.detach())
        self.tensors.append(StagedTensor(stem, key, DTYPES[dtype], list(tensor.shape), self._end, size))
        self._end += -(-size // ALIGNMENT) * ALIGNMENT


def estimate(engine: Engine, *, slots: int) -> int:
    """Estimates the bytes of a checkpoint: the weights, and `slots` numbers per trainable weight."""
    size = 0
    for parameter in engine.module.parameters():
        numbers = engine.numel(parameter)
        width = stored_dtype(parameter.dtype).itemsize
        # One more tensor for AdamW's step count.
        size += numbers * width * (1 + slots * int(parameter.requires_grad)) + ALIGNMENT * (2 + slots)
    return size + sum(b.numel() * stored_dtype(b.dtype).itemsize + ALIGNMENT for b in engine.module.buffers())

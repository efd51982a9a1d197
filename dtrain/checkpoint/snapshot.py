"""The state of a run, copied into a block of memory, tensor by tensor: all that the loop has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dtrain.checkpoint.format import BUFFER, MODEL, OPTIMIZER, VALUE, WHOLE, shard_prefix
from dtrain.checkpoint.publish import Piece
from dtrain.checkpoint.staging_buffer import Block
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
"""What is stored, as safetensors calls it. Other floating types are stored as float32."""

Place = Callable[[str], tuple[str, str]]
"""From a parameter's or buffer's name to the stem of its files and its key there."""


def place_in(module: nn.Module) -> Place:
    """Where a model's weights go, so that the checkpoint is a folder that from_pretrained loads."""
    is_headed = isinstance(module, HeadedModel)
    persistent = set(module.state_dict().keys())

    def place(name: str) -> tuple[str, str]:
        if name not in persistent:
            return OPTIMIZER, f"{BUFFER}/{name}"
        if is_headed:
            part, _, rest = name.partition(".")
            return (MODEL if part == "backbone" else part), rest
        return MODEL, name

    return place


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which type a tensor of `dtype` is kept."""
    return dtype if dtype in DTYPES else torch.float32


def copy_whole(block: Block, entries: Iterable[ParameterState], place: Place) -> list[Piece]:
    """Copies what the entries hold into the block, which grows as needed; gives where each tensor lies."""
    filler = _Filler(block)
    for entry in entries:
        if entry.value is None:
            continue
        filler.add(*place(entry.name), entry.value)
        for slot, value in sorted(entry.slots.items()):  # after a resume they come in another order
            filler.add(OPTIMIZER, f"{slot}/{entry.name}", value)
    return filler.pieces


def copy_shards(block: Block, shards: Iterable[Shard], part: int) -> list[Piece]:
    """The same with what one rank keeps, for the files of its part."""
    filler = _Filler(block)
    for shard in shards:
        start = WHOLE if shard.start is None else shard.start
        filler.add(shard_prefix(part), f"{shard.slot or VALUE}/{shard.name}@{start}", shard.tensor)
    return filler.pieces


class _Filler:
    """Puts one tensor behind the other into a block."""

    def __init__(self, block: Block) -> None:
        self._block, self._end = block, 0
        self.pieces: list[Piece] = []

    def add(self, stem: str, key: str, tensor: torch.Tensor) -> None:
        kind = stored_dtype(tensor.dtype)
        size = tensor.numel() * kind.itemsize
        if self._end + size > self._block.size:
            self._block.grow(max(self._end + size, self._block.size * 3 // 2))
        if size:
            view = torch.frombuffer(self._block.view(self._end, size), dtype=kind)
            view.view(tensor.shape).copy_(tensor.detach())
        self.pieces.append(Piece(stem, key, DTYPES[kind], list(tensor.shape), self._end, size))
        self._end += -(-size // ALIGNMENT) * ALIGNMENT


def estimate(engine: Engine, *, slots: int) -> int:
    """Bytes of a checkpoint of this model, before the first one: weights, and `slots` numbers for each that learns."""
    size = 0
    for parameter in engine.module.parameters():
        numbers = engine.numel(parameter)
        width = stored_dtype(parameter.dtype).itemsize
        # One more for AdamW's count of steps.
        size += numbers * width * (1 + slots * int(parameter.requires_grad)) + ALIGNMENT * (2 + slots)
    return size + sum(b.numel() * stored_dtype(b.dtype).itemsize + ALIGNMENT for b in engine.module.buffers())

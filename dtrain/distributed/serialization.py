"""Tensors and JSON objects as bytes with a header of fixed length, for collectives.py to move. Nothing is sent here."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

JSON = Any

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
MAX_DIMENSIONS = 8
HEADER_SIZE = MAX_DIMENSIONS + 2
"""Length of a header: dtype, number of dimensions, sizes."""


def header_of(tensor: Tensor) -> Tensor:
    """(HEADER_SIZE,) int64: dtype, number of dimensions and sizes."""
    assert tensor.dim() <= MAX_DIMENSIONS
    sizes = list(tensor.shape) + [0] * (MAX_DIMENSIONS - tensor.dim())
    return torch.tensor([DTYPES.index(tensor.dtype), tensor.dim(), *sizes], dtype=torch.int64)


def _shape(header: Tensor) -> tuple[torch.dtype, list[int]]:
    dtype, dimensions, *sizes = header.tolist()
    return DTYPES[dtype], sizes[:dimensions]


def num_bytes(header: Tensor) -> int:
    """Bytes of the tensor that a header describes."""
    dtype, shape = _shape(header)
    return torch.Size(shape).numel() * dtype.itemsize


def bytes_of(tensor: Tensor) -> Tensor:
    """(bytes,) uint8 on the host: the tensor's memory, rows first."""
    # Copied, not made contiguous: an empty slice counts as contiguous with any stride, and then has no view as bytes.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8)


def padded(data: Tensor, width: int) -> Tensor:
    """The bytes, filled up with zeros to `width`."""
    return torch.cat([data, torch.zeros(width - data.numel(), dtype=torch.uint8)])


def restore(payload: Tensor, header: Tensor) -> Tensor:
    """The tensor that a payload and its header came from, on the host, in memory of its own."""
    dtype, shape = _shape(header)
    return payload[: num_bytes(header)].cpu().clone().view(dtype).reshape(shape)


def encode(obj: JSON) -> Tensor:
    """(bytes,) uint8: an object as JSON."""
    return torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)


def decode(data: Tensor) -> JSON:
    """The object that `encode` took; tuples come back as lists."""
    return json.loads(bytes(data.numpy()))

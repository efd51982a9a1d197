"""Converts tensors and JSON objects to bytes with a header of fixed length, for collectives.py. Sends nothing."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

Json = Any

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


def build_header(tensor: Tensor) -> Tensor:
    """Returns (HEADER_SIZE,) int64: dtype, number of dimensions and sizes."""
    assert tensor.dim() <= MAX_DIMENSIONS
    sizes = list(tensor.shape) + [0] * (MAX_DIMENSIONS - tensor.dim())
    return torch.tensor([DTYPES.index(tensor.dtype), tensor.dim(), *sizes], dtype=torch.int64)


def _parse_header(header: Tensor) -> tuple[torch.dtype, list[int]]:
    dtype, dimensions, *sizes = header.tolist()
    return DTYPES[dtype], sizes[:dimensions]


def num_bytes(header: Tensor) -> int:
    """Returns the size in bytes of the tensor that a header describes."""
    dtype, shape = _parse_header(header)
    return torch.Size(shape).numel() * dtype.itemsize


def tensor_to_bytes(tensor: Tensor) -> Tensor:
    """Returns (bytes,) uint8 on the host: the tensor's memory in row-major order."""
    # Copied, not made contiguous: an empty slice counts as contiguous with any stride, and then has no view as bytes.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8)


def pad_bytes(data: Tensor, width: int) -> Tensor:
    """Returns the bytes with zeros appended, (width,)."""
    return torch.cat([data, torch.zeros(width - data.numel(), dtype=torch.uint8)])


def bytes_to_tensor(payload: Tensor, header: Tensor) -> Tensor:
    """Returns the tensor that a payload and its header were made from, on the host, in new memory."""
    dtype, shape = _parse_header(header)
    return payload[: num_bytes(header)].cpu().clone().view(dtype).reshape(shape)


def object_to_bytes(obj: Json) -> Tensor:
    """Returns (bytes,) uint8: an object as JSON."""
    return torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)


def bytes_to_object(data: Tensor) -> Json:
    """Returns the object given to `object_to_bytes`; tuples become lists."""
    return json.loads(bytes(data.numpy()))

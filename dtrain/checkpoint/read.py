"""Reads a checkpoint by parameter name: one tensor at a time, on a rank that sees its file, and broadcasts it to all."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from dtrain.checkpoint.format import BUFFER, FULL_TENSOR, OPTIMIZER, SHARD, VALUE, shard_prefix
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.checkpoint.snapshot import DTYPES, KeyMapping, build_key_mapping
from dtrain.distributed.collectives import all_gather_object, broadcast
from dtrain.distributed.rank_context import RankContext

TYPES = {name: dtype for dtype, name in DTYPES.items()}


class TensorPiece(NamedTuple):
    """A stored piece of a tensor.

    Attributes:
        start: index of its first element in the flattened tensor, or FULL_TENSOR.
        shape: shape of the piece.
        dtype: type name of safetensors.
    """

    start: int
    shape: list[int]
    dtype: str

    @property
    def num_elements(self) -> int:
        """Number of elements in the piece."""
        return torch.Size(self.shape).numel()


class CheckpointTensors:
    """The tensors of a checkpoint. A context manager: it maps the files that this rank reads. Collective throughout."""

    def __init__(self, checkpoint: SelectedCheckpoint, module: nn.Module, context: RankContext) -> None:
        """Collective. Opens the files and exchanges which rank has which piece.

        Args:
            module: model that will get the weights. Its parameter names are the ones to look for.
        """
        self._context = context
        self._files = _LocalFiles(checkpoint, build_key_mapping(module), context.rank)
        self._pieces: dict[str, list[tuple[int, TensorPiece]]] = defaultdict(list)
        self._slots: dict[str, list[str]] = defaultdict(list)
        for rank, table in enumerate(all_gather_object(self._files.table(module), context)):
            for key, pieces in table.items():
                self._pieces[key] += [(rank, TensorPiece(*piece)) for piece in pieces]
        for key in sorted(self._pieces):
            slot, _, name = key.partition("/")
            if slot not in (VALUE, BUFFER):
                self._slots[name].append(slot)

    def __enter__(self) -> CheckpointTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def has(self, name: str) -> bool:
        """Returns whether the checkpoint has a parameter or buffer of that name."""
        return f"{VALUE}/{name}" in self._pieces

    def num_elements(self, name: str) -> int:
        """Returns the number of elements of a parameter or buffer."""
        return sum(piece.num_elements for _, piece in self._pieces[f"{VALUE}/{name}"])

    def value(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Collective. Returns a parameter or buffer in host memory, on every rank."""
        return self._fetch(f"{VALUE}/{name}", shape)

    def slots(self, name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Collective. Returns the optimizer's tensors for a parameter of that shape; empty for a frozen parameter."""
        return {slot: self._fetch(f"{slot}/{name}", shape) for slot in self._slots[name]}

    def _fetch(self, key: str, shape: torch.Size) -> torch.Tensor:
        pieces = self._pieces[key]
        first = pieces[0][1]
        if first.start == FULL_TENSOR:
            return self._broadcast_piece(key, *pieces[0])
        flat = torch.empty(shape.numel(), dtype=TYPES[first.dtype])
        for rank, piece in pieces:
            flat[piece.start : piece.start + piece.num_elements] = self._broadcast_piece(key, rank, piece)
        return flat.view(shape)

    def _broadcast_piece(self, key: str, rank: int, piece: TensorPiece) -> torch.Tensor:
        local = self._files.read(key, piece.start) if rank == self._context.rank else None
        return broadcast(local, self._context, src=rank, like=torch.empty(piece.shape, dtype=TYPES[piece.dtype]))


class _LocalFiles:
    """The tensors in the files of the parts that one rank reads."""

    def __init__(self, checkpoint: SelectedCheckpoint, key_mapping: KeyMapping, rank: int) -> None:
        self._key_mapping = key_mapping
        self._stack = ExitStack()
        self._file_of: dict[tuple[str, str], Any] = {}
        saved = checkpoint.saved
        parts = [part for part, reader in enumerate(checkpoint.readers) if reader == rank]
        if saved is None or not parts:
            return
        for name in sorted(saved.manifest["files"]):
            is_shard = name.startswith(f"{SHARD}-")
            if name.endswith(".safetensors") and (not is_shard or any(name.startswith(shard_prefix(p)) for p in parts)):
                self._open(saved.path / name)

    def _open(self, path: Path) -> None:
        stem = path.name.removesuffix(".safetensors").partition("-")[0]
        file = self._stack.enter_context(safe_open(path, framework="pt"))
        for key in list(file.keys()):
            self._file_of[stem, key] = file

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()

    def table(self, module: nn.Module) -> dict[str, list[TensorPiece]]:
        """Returns this rank's pieces by `value/<name>` and `<slot>/<name>`."""
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        value_keys = {self._key_mapping(name): f"{VALUE}/{name}" for name in names}
        table: dict[str, list[TensorPiece]] = defaultdict(list)
        for (stem, key), file in self._file_of.items():
            header = file.get_slice(key)
            shape, dtype = list(header.get_shape()), str(header.get_dtype())
            if stem == SHARD:
                tensor_key, _, start = key.rpartition("@")
                table[tensor_key].append(TensorPiece(int(start), shape, dtype))
            elif (stem, key) in value_keys:
                table[value_keys[stem, key]].append(TensorPiece(FULL_TENSOR, shape, dtype))
            elif stem == OPTIMIZER:
                table[key].append(TensorPiece(FULL_TENSOR, shape, dtype))
        return dict(table)

    def read(self, key: str, start: int) -> torch.Tensor:
        """Reads the piece of `key` that begins at `start`, as in `table`."""
        slot, _, name = key.partition("/")
        stem_and_key = (SHARD, f"{key}@{start}")
        if stem_and_key not in self._file_of:
            stem_and_key = self._key_mapping(name) if slot == VALUE else (OPTIMIZER, key)
        tensor: torch.Tensor = self._file_of[stem_and_key].get_tensor(stem_and_key[1])
        return tensor

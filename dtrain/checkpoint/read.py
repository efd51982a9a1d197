"""What a checkpoint holds, by the names of parameters: read a tensor at a time where it lies, and given to all ranks."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from dtrain.checkpoint.format import BUFFER, OPTIMIZER, SHARD, VALUE, WHOLE, shard_prefix
from dtrain.checkpoint.select import Chosen
from dtrain.checkpoint.snapshot import DTYPES, Place, place_in
from dtrain.distributed.collectives import all_gather_object, broadcast
from dtrain.distributed.rank_context import RankContext

TYPES = {name: dtype for dtype, name in DTYPES.items()}
Entry = tuple[int, list[int], str]
"""Where a piece begins in its flattened tensor, its shape, and its type as safetensors calls it."""


class Tensors:
    """Collective throughout. The tensors of a checkpoint; use it as a context: it maps the files that this rank reads."""

    def __init__(self, chosen: Chosen, module: nn.Module, context: RankContext) -> None:
        """
        Args:
            module: that is to take the weights; its names say what is looked for.
        """
        self._context = context
        self._files = _Files(chosen, place_in(module), context.rank)
        self._where: dict[str, list[tuple[int, Entry]]] = defaultdict(list)
        self._slots: dict[str, list[str]] = defaultdict(list)
        for rank, table in enumerate(all_gather_object(self._files.table(module), context)):
            for key, entries in table.items():
                self._where[key] += [(rank, (start, shape, dtype)) for start, shape, dtype in entries]
        for key in sorted(self._where):
            slot, _, name = key.partition("/")
            if slot not in (VALUE, BUFFER):
                self._slots[name].append(slot)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def has(self, name: str) -> bool:
        """Whether there is a parameter or buffer of that name."""
        return f"{VALUE}/{name}" in self._where

    def size(self, name: str) -> int:
        """How many numbers its tensor has."""
        return sum(_count(shape) for _, (_, shape, _) in self._where[f"{VALUE}/{name}"])

    def value(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Collective. A parameter or buffer, on every rank's host."""
        return self._fetch(f"{VALUE}/{name}", shape)

    def slots(self, name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Collective. The optimizer's tensors for a parameter of that shape; none where it did not learn."""
        return {slot: self._fetch(f"{slot}/{name}", shape) for slot in self._slots[name]}

    def _fetch(self, key: str, shape: torch.Size) -> torch.Tensor:
        entries = self._where[key]
        first = entries[0][1]
        if first[0] == WHOLE:
            return self._piece(key, *entries[0])
        flat = torch.empty(shape.numel(), dtype=TYPES[first[2]])
        for rank, entry in entries:
            flat[entry[0] : entry[0] + _count(entry[1])] = self._piece(key, rank, entry)
        return flat.view(shape)

    def _piece(self, key: str, rank: int, entry: Entry) -> torch.Tensor:
        start, shape, dtype = entry
        own = self._files.read(key, start) if rank == self._context.rank else None
        return broadcast(own, self._context, src=rank, like=torch.empty(shape, dtype=TYPES[dtype]))


def _count(shape: list[int]) -> int:
    return torch.Size(shape).numel()


class _Files:
    """The tensors in the files of the parts that one rank reads."""

    def __init__(self, chosen: Chosen, place: Place, rank: int) -> None:
        self._place = place
        self._stack = ExitStack()
        self._found: dict[tuple[str, str], Any] = {}
        parts = [part for part, reader in enumerate(chosen.readers) if reader == rank]
        for name in sorted(chosen.saved.manifest["files"]) if chosen.saved is not None and parts else ():
            is_shard = name.startswith(f"{SHARD}-")
            if name.endswith(".safetensors") and (not is_shard or any(name.startswith(shard_prefix(p)) for p in parts)):
                self._open(chosen.saved.path / name)  # type: ignore[union-attr]

    def _open(self, path: Path) -> None:
        stem = path.name.removesuffix(".safetensors").partition("-")[0]
        file = self._stack.enter_context(safe_open(path, framework="pt"))
        for key in list(file.keys()):
            self._found[stem, key] = file

    def close(self) -> None:
        self._stack.close()

    def table(self, module: nn.Module) -> dict[str, list[Entry]]:
        """By `value/<name>` and `<slot>/<name>`, the pieces that are here."""
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        by_place = {self._place(name): f"{VALUE}/{name}" for name in names}
        table: dict[str, list[Entry]] = defaultdict(list)
        for (stem, key), file in self._found.items():
            cut = file.get_slice(key)
            shape, dtype = list(cut.get_shape()), str(cut.get_dtype())
            if stem == SHARD:
                whole, _, start = key.rpartition("@")
                table[whole].append((int(start), shape, dtype))
            elif (stem, key) in by_place:
                table[by_place[stem, key]].append((WHOLE, shape, dtype))
            elif stem == OPTIMIZER:
                table[key].append((WHOLE, shape, dtype))
        return dict(table)

    def read(self, key: str, start: int) -> torch.Tensor:
        slot, _, name = key.partition("/")
        shard = (SHARD, f"{key}@{start}")
        where = shard if shard in self._found else self._place(name) if slot == VALUE else (OPTIMIZER, key)
        found: torch.Tensor = self._found[where].get_tensor(where[1])
        return found

"""What a checkpoint holds, by the names of parameters, read a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from dtrain.checkpoint.layout import OPTIMIZER, Saved
from dtrain.checkpoint.snapshot import Place


class Reader:
    """The tensors of a verified checkpoint. Use it as a context: it maps its files."""

    def __init__(self, saved: Saved, place: Place) -> None:
        """
        Args:
            place: of the model that is to take the weights.
        """
        self._place = place
        self._stack = ExitStack()
        self._files: dict[tuple[str, str], Any] = {}
        self._slots: dict[str, list[str]] = {}
        for name in sorted(saved.manifest["files"]):
            if name.endswith(".safetensors"):
                self._open(saved.path / name)

    def _open(self, path: Path) -> None:
        stem = path.name.removesuffix(".safetensors").partition("-")[0]
        file = self._stack.enter_context(safe_open(path, framework="pt"))
        for key in list(file.keys()):
            self._files[stem, key] = file
            if stem == OPTIMIZER:
                slot, _, parameter = key.partition("/")
                self._slots.setdefault(parameter, []).append(slot)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        """Whether there is a parameter or buffer of that name."""
        return self._place(name) in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Of its tensor."""
        _, key = where = self._place(name)
        return tuple(self._files[where].get_slice(key).get_shape())

    def value(self, name: str) -> torch.Tensor:
        """A parameter or buffer, on the host."""
        _, key = where = self._place(name)
        found: torch.Tensor = self._files[where].get_tensor(key)
        return found

    def slots(self, name: str) -> Mapping[str, torch.Tensor]:
        """The optimizer's tensors for a parameter; none where it did not learn."""
        return {
            slot: self._files[OPTIMIZER, f"{slot}/{name}"].get_tensor(f"{slot}/{name}")
            for slot in self._slots.get(name, [])
        }

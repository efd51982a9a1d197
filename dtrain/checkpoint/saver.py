"""Saves the run's state while it goes on: the loop waits for a copy in memory, another process for the disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dtrain.checkpoint.block import Block
from dtrain.checkpoint.choosing import sees_rank_0s_folder
from dtrain.checkpoint.layout import CONFIG, STATE, folder_name
from dtrain.checkpoint.process import Writer
from dtrain.checkpoint.snapshot import copy_shards, copy_whole, estimate, place_in
from dtrain.checkpoint.writing import Order, Piece, clear_drafts
from dtrain.collectives import all_gather_object, barrier, broadcast_object
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError
from dtrain.topology import Topology


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint. error: why it is not there; None where it is. stall_s: what the loop waited for it."""

    step: int
    error: str | None
    stall_s: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Settings:
    """How checkpoints are made.

    sharded: each rank writes what it keeps; else rank 0 writes the whole, and one rank of `replicas` - 1 further nodes that
    do not share its folder. keep: newest ones. max_file_bytes: of a file with tensors.
    """

    sharded: bool
    keep: int
    replicas: int
    max_file_bytes: int
    asynchronous: bool


class Saver:
    """The checkpoints of one run, seen from one rank."""

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        settings: Settings,
        *,
        static: Callable[[], Mapping[str, bytes]],
        config_text: str,
        about: Mapping[str, Any],
    ) -> None:
        """Collective.

        Args:
            folder: of all checkpoints.
            static: small files that belong to each checkpoint; called where one is published.
            about: further entries of the manifest.
        """
        self._folder, self._topology, self._settings = folder, topology, settings
        self._config_text = config_text
        self._about = {**about, "config_sha256": hashlib.sha256(config_text.encode()).hexdigest()}
        self._nonce: str = broadcast_object(uuid.uuid4().hex[:8], topology)
        self._group = _group(folder.parent, topology)
        firsts = sorted({group[0] for group in all_gather_object(self._group, topology)})
        publishers = firsts if settings.sharded else firsts[: settings.replicas]
        self.publishes = topology.rank in publishers
        self.writes = settings.sharded or self.publishes
        self._pending: tuple[int, float] | None = None
        self._told: dict[str, Any] | None = None
        self._writer: Writer | None = None
        self._block: Block | None = None
        if self.publishes:
            folder.mkdir(parents=True, exist_ok=True)
            clear_drafts(folder)
        barrier(topology)  # from here on drafts are this start's
        if self.writes:
            self._writer, self._block = Writer(static() if self.publishes else {}), Block(folder)

    def prepare(self, module: nn.Module, *, slots: int) -> None:
        """Before the first step: room in memory and on the disk.

        Raises:
            CheckpointError: the disk has no room for the checkpoints that are kept, and one more.
        """
        if self._block is None or self._writer is None:
            return
        settings = self._settings
        size = estimate(module, slots=slots) // (self._topology.world_size if settings.sharded else 1)
        there = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
        needed = (settings.keep + 1) * size * (len(self._group) if settings.sharded else 1)
        free = shutil.disk_usage(self._folder).free + there
        if needed > free:
            each = needed / (settings.keep + 1) / 2**30
            raise CheckpointError(
                f"{self._folder} has room for {free / 2**30:.2f} GiB, but checkpoint.keep={settings.keep} checkpoints and "
                f"the next one take {needed / 2**30:.2f} GiB ({each:.2f} each). Make room, lower checkpoint.keep, or set "
                "run.output_dir to another disk."
            )
        self._block.grow(size)
        self._writer.start(self._block.fd)

    def save(self, engine: Engine, step: int, state: Mapping[str, Any], *, protected: Sequence[int]) -> Outcome | None:
        """Collective. Takes a copy of the state; gives what became of the checkpoint before, if it was still on its way.

        Args:
            state: for state.json.
            protected: steps of checkpoints that stay, however old.

        Raises:
            CheckpointError: the writing process has died.
        """
        begin = time.monotonic()
        before = self.result(wait=True)  # one at a time: the block is in use until then
        scalars = engine.scalars()
        pieces = self._copy(engine, step)
        if self._block is None or self._writer is None:
            return None
        settings = self._settings
        rank, sharded = self._topology.rank, settings.sharded
        parts = {"parts": self._group, "of": self._topology.world_size} if sharded else {}
        order = Order(
            checkpoints=str(self._folder),
            step=step,
            nonce=self._nonce,
            pieces=pieces,
            texts={STATE: json.dumps({**state, "engine": scalars}, indent=1) + "\n", CONFIG: self._config_text},
            about={**self._about, **parts, "engine": engine.name, "world_size": self._topology.world_size},
            max_file_bytes=settings.max_file_bytes,
            keep=settings.keep,
            protected=list(protected),
            part=rank if sharded else None,
            of_here=self._group if sharded and self.publishes else None,
        )
        self._writer.order(order, self._block.fd)
        self._told = None if settings.asynchronous else self._writer.result(wait=True)
        self._pending = (step, time.monotonic() - begin)
        return before

    def _copy(self, engine: Engine, step: int) -> list[Piece]:
        """Collective, unless it is sharded. The state into the block."""
        try:
            if self._settings.sharded:
                assert self._block is not None
                return copy_shards(self._block, engine.local_state(), self._topology.rank)
            entries = engine.named_state(here=self.writes)
            if self._block is not None:
                return copy_whole(self._block, entries, place_in(engine.module))
            for _ in entries:  # their gathering is a collective
                continue
        except OSError as error:
            raise CheckpointError(f"There is no memory to copy the checkpoint of step {step} into: {error}.") from error
        return []

    def result(self, *, wait: bool) -> Outcome | None:
        """What became of the checkpoint on its way; None while it is, or where this rank does not write.

        Raises:
            CheckpointError: the writing process has died.
        """
        if self._writer is None or self._pending is None:
            return None
        told = self._told or self._writer.result(wait=wait)
        if told is None:
            return None
        (step, stall_s), self._pending, self._told = self._pending, None, None
        if "error" in told:
            name = Path(told["file"]).name if told["file"] != "None" else folder_name(step)
            error = f"{folder_name(step)} cannot be written to {self._folder}: {name}: {told['error']}"
            return Outcome(step, error, stall_s, told["seconds"], 0)
        return Outcome(step, None, stall_s, told["seconds"], told["bytes"])

    def close(self) -> None:
        """Ends the writing process; a checkpoint on its way is given up."""
        if self._writer is not None:
            self._writer.close()
        if self._block is not None:
            self._block.close()


def _group(folder: Path, topology: Topology) -> list[int]:
    """Collective. The ranks that write to the same folder as this one."""
    if topology.num_nodes == 1:
        return list(range(topology.world_size))
    sees = sees_rank_0s_folder(folder, topology)
    nodes: list[int] = all_gather_object(topology.node_rank, topology)
    labels = [-1 if seen else node for seen, node in zip(sees, nodes, strict=True)]
    return [rank for rank, label in enumerate(labels) if label == labels[topology.rank]]

"""Saves the run's state while it goes on: the loop waits for a copy in memory, another process for the disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dtrain.checkpoint.block import Block
from dtrain.checkpoint.choosing import sees_rank_0s_folder
from dtrain.checkpoint.layout import CONFIG, STATE, folder_name
from dtrain.checkpoint.process import Writer
from dtrain.checkpoint.snapshot import copy_into, estimate, place_in
from dtrain.checkpoint.writing import Order, clear_drafts
from dtrain.collectives import all_gather_object
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


class Saver:
    """The checkpoints of one run. Rank 0 writes, and one rank of further nodes that have a folder of their own."""

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        *,
        keep: int,
        replicas: int,
        max_file_bytes: int,
        asynchronous: bool,
        static: Callable[[], Mapping[str, bytes]],
        config_text: str,
        about: Mapping[str, Any],
    ) -> None:
        """Collective.

        Args:
            folder: of all checkpoints.
            replicas: on how many nodes, where they do not share the folder.
            static: small files that belong to each checkpoint; called where one is written.
            about: further entries of the manifest.
        """
        self._folder, self._topology = folder, topology
        self._keep, self._max_file_bytes, self._asynchronous = keep, max_file_bytes, asynchronous
        self._config_text = config_text
        self._about = {**about, "config_sha256": hashlib.sha256(config_text.encode()).hexdigest()}
        sees = sees_rank_0s_folder(folder.parent, topology) if topology.num_nodes > 1 else [True] * topology.world_size
        nodes = all_gather_object(topology.node_rank, topology) if topology.num_nodes > 1 else [0] * len(sees)
        mains = [rank for rank, node in enumerate(nodes) if node not in nodes[:rank]]
        self.writers = [0, *[rank for rank in mains if rank > 0 and not sees[rank]][: replicas - 1]]
        self.writes = topology.rank in self.writers
        self._pending: tuple[int, float] | None = None
        self._told: dict[str, Any] | None = None
        self._writer: Writer | None = None
        self._block: Block | None = None
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            clear_drafts(folder)
            self._writer, self._block = Writer(static()), Block(folder)

    def prepare(self, module: nn.Module, *, slots: int) -> None:
        """Before the first step: room in memory and on the disk.

        Raises:
            CheckpointError: the disk has no room for the checkpoints that are kept, and one more.
        """
        if self._block is None or self._writer is None:
            return
        size = estimate(module, slots=slots)
        there = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
        needed = (self._keep + 1) * size
        free = shutil.disk_usage(self._folder).free + there
        if needed > free:
            raise CheckpointError(
                f"{self._folder} has room for {free / 2**30:.2f} GiB, but checkpoint.keep={self._keep} checkpoints and the "
                f"next one take {needed / 2**30:.2f} GiB ({size / 2**30:.2f} each). Make room, lower checkpoint.keep, or "
                "set run.output_dir to another disk."
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
        entries = engine.named_state(here=self.writes)
        if self._block is None or self._writer is None:
            for _ in entries:  # their gathering is a collective
                pass
            return None
        try:
            pieces = copy_into(self._block, entries, place_in(engine.module))
        except OSError as error:
            raise CheckpointError(f"There is no memory to copy the checkpoint of step {step} into: {error}.") from error
        order = Order(
            checkpoints=str(self._folder),
            step=step,
            pieces=pieces,
            texts={STATE: json.dumps({**state, "engine": scalars}, indent=1) + "\n", CONFIG: self._config_text},
            about={**self._about, "engine": engine.name, "world_size": self._topology.world_size},
            max_file_bytes=self._max_file_bytes,
            keep=self._keep,
            protected=list(protected),
        )
        self._writer.order(order, self._block.fd)
        self._told = None if self._asynchronous else self._writer.result(wait=True)
        self._pending = (step, time.monotonic() - begin)
        return before

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

"""Saves the run's state while it goes on: the loop waits for a copy in memory, another process for the disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dtrain.checkpoint.format import CONFIG, STATE, folder_name, found
from dtrain.checkpoint.publish import Order, Piece, clear_drafts, flush_folder
from dtrain.checkpoint.select import sees_rank_0s_folder
from dtrain.checkpoint.snapshot import copy_shards, copy_whole, estimate, place_in
from dtrain.checkpoint.staging_buffer import Block
from dtrain.checkpoint.writer_process import Writer
from dtrain.distributed.collectives import all_gather_object, broadcast_object
from dtrain.distributed.topology import Topology
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint. error: why it is not there; None where it is.

    stall_began_s, stall_s: the loop waited for it from then on, in monotonic time, and for so long.
    missing: why a further copy of it is not there.
    """

    step: int
    error: str | None
    stall_began_s: float
    stall_s: float
    seconds: float
    bytes: int
    missing: str | None = None


@dataclass(frozen=True)
class Settings:
    """How checkpoints are made.

    sharded: each rank writes what it keeps; else rank 0 writes the whole, and one rank of `replicas` - 1 further nodes that
    do not share its folder. keep: newest ones; keeps_best: and one more. max_file_bytes: of a file with tensors.
    """

    sharded: bool
    keep: int
    keeps_best: bool
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
        begun_at: int | None,
    ) -> None:
        """Collective.

        Args:
            folder: of all checkpoints.
            static: small files that belong to each checkpoint; called where one is published.
            about: further entries of the manifest.
            begun_at: step of the checkpoint that this start goes on from.

        Raises:
            CheckpointError: on every rank; the folder of one cannot be written.
        """
        self._folder, self._topology, self._settings = folder, topology, settings
        self._config_text = config_text
        self._nonce: str = broadcast_object(uuid.uuid4().hex[:8], topology)
        config_hash = hashlib.sha256(config_text.encode()).hexdigest()
        self._about = {**about, "start": self._nonce, "config_sha256": config_hash}
        self._group = _group(folder.parent, topology)
        firsts = sorted({group[0] for group in all_gather_object(self._group, topology)})
        publishers = firsts if settings.sharded else firsts[: settings.replicas]
        self.publishes = topology.rank in publishers
        self.writes = settings.sharded or self.publishes
        self._is_shared_work = settings.sharded or len(publishers) > 1
        self._whole = begun_at
        self._pending: tuple[int, float, float] | None = None
        self._told: dict[str, Any] | None = None
        self._writer: Writer | None = None
        self._block: Block | None = None

        def make_ready() -> None:
            if self.publishes:
                folder.mkdir(parents=True, exist_ok=True)
                flush_folder(folder.parent)
                clear_drafts(folder)
            if self.writes:
                self._writer, self._block = Writer(static() if self.publishes else {}), Block(folder)

        self._on_all(make_ready)  # from here on drafts are this start's

    def prepare(self, module: nn.Module, *, slots: int) -> None:
        """Collective. Before the first step: room in memory and on the disk.

        Raises:
            CheckpointError: on every rank; a disk has no room for the checkpoints that are kept, and one more.
        """
        sharded = self._settings.sharded
        size = estimate(module, slots=slots) // (self._topology.world_size if sharded else 1)

        def make_room() -> None:
            if self._block is None or self._writer is None:
                return
            if self.publishes:
                self._check_room(size * (len(self._group) if sharded else 1))
            self._block.grow(size)
            self._writer.start(self._block.fd)

        self._on_all(make_room)

    def _check_room(self, size: int) -> None:
        settings = self._settings
        # Damaged ones and those of another line stay, so that they make no room.
        there = sum(file.stat().st_size for path in found(self._folder).values() for file in path.iterdir())
        kept = max(settings.keep, 2 if self._is_shared_work else 1)  # the last that is whole everywhere stays
        needed = (kept + settings.keeps_best + 1) * size
        free = shutil.disk_usage(self._folder).free + there
        if needed > free:
            best = ", the best one" if settings.keeps_best else ""
            raise CheckpointError(
                f"{self._folder} has room for {free / 2**30:.2f} GiB, but checkpoint.keep={settings.keep} checkpoints{best} "
                f"and the next one take {needed / 2**30:.2f} GiB ({size / 2**30:.2f} each). Make room, lower "
                "checkpoint.keep, or set run.output_dir to another disk."
            )

    def _on_all(self, work: Callable[[], None]) -> None:
        """Collective. Does it on every rank, and raises on all what the first one raised."""
        words = None
        try:
            work()
        except CheckpointError as error:
            words = str(error)
        except OSError as error:
            words = f"{self._folder} cannot be written on {socket.gethostname()}: {error.filename}: {error.strerror}."
        told = [words for words in all_gather_object(words, self._topology) if words is not None]
        if told:
            self.close()
            failed = CheckpointError(told[0])
            failed.is_reported_elsewhere = not self._topology.is_main
            raise failed

    def save(self, engine: Engine, step: int, state: Mapping[str, Any], *, protected: Sequence[int]) -> Outcome | None:
        """Collective. Takes a copy of the state; gives what became of the checkpoint before, if that is not said yet.

        Args:
            state: for state.json.
            protected: steps of checkpoints that stay, however old.

        Raises:
            CheckpointError: the writing process has died.
        """
        begin = time.monotonic()
        before = self.settle()  # one at a time: the block is in use until then
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
            # What this node has newest may lack its parts elsewhere.
            protected=[*protected, *([self._whole] if self._is_shared_work and self._whole is not None else [])],
            part=rank if sharded else None,
            of_here=self._group if sharded and self.publishes else None,
        )
        self._writer.order(order, self._block.fd)
        self._told = None if settings.asynchronous else self._writer.result(wait=True)
        self._pending = (step, begin, time.monotonic() - begin)
        return before

    def _copy(self, engine: Engine, step: int) -> list[Piece]:
        """Collective; where it is sharded, only under engine.powersgd, which averages its memories. The state into the block."""
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

    def arrived(self) -> Outcome | None:
        """What became of the checkpoint on its way, where rank 0 alone knows; None while it is, and for all others.

        Raises:
            CheckpointError: the writing process has died.
        """
        return None if self._is_shared_work else self._own(wait=False)

    def settle(self) -> Outcome | None:
        """Collective. Waits until no checkpoint is on its way; gives what became of the last, unless that is said already.

        Raises:
            CheckpointError: the writing process has died.
        """
        own = self._own(wait=True)
        if not self._is_shared_work:
            return own
        told = [
            (rank, Outcome(**outcome))
            for rank, outcome in enumerate(all_gather_object(None if own is None else asdict(own), self._topology))
            if outcome is not None
        ]
        if not told:
            return None
        failed = [f"rank {rank}: {outcome.error}" for rank, outcome in told if outcome.error is not None]
        is_whole = not failed or not (self._settings.sharded or len(failed) == len(told))
        outcomes = [outcome for _, outcome in told]
        if is_whole:
            self._whole = outcomes[0].step
        return Outcome(
            outcomes[0].step,
            error=None if is_whole else failed[0],
            stall_began_s=outcomes[0].stall_began_s,  # rank 0's, whose clock the log has
            stall_s=max(outcome.stall_s for outcome in outcomes),
            seconds=max(outcome.seconds for outcome in outcomes),
            bytes=sum(outcome.bytes for outcome in outcomes),
            missing=failed[0] if is_whole and failed else None,
        )

    def _own(self, *, wait: bool) -> Outcome | None:
        """What became of this rank's work on the checkpoint; None while it is at it, or where it does not write."""
        if self._writer is None or self._pending is None:
            return None
        told = self._told or self._writer.result(wait=wait)
        if told is None:
            return None
        (step, begin, stall_s), self._pending, self._told = self._pending, None, None
        if "error" in told:
            name = Path(told["file"]).name if told["file"] != "None" else folder_name(step)
            error = f"{folder_name(step)} cannot be written to {self._folder}: {name}: {told['error']}"
            return Outcome(step, error, begin, stall_s, told["seconds"], 0)
        return Outcome(step, None, begin, stall_s, told["seconds"], told["bytes"])

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

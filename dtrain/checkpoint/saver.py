"""Saves the run's state during training: the loop waits for a copy in memory only; another process writes it to disk."""

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

from dtrain.checkpoint.format import CONFIG, STATE, folder_name, list_checkpoints
from dtrain.checkpoint.publish import StagedTensor, WriteRequest, clear_drafts, flush_folder
from dtrain.checkpoint.select import shares_folder_with_rank_0
from dtrain.checkpoint.snapshot import build_key_mapping, copy_full_tensors, copy_shards, estimate
from dtrain.checkpoint.staging_buffer import StagingBuffer
from dtrain.checkpoint.writer_process import WriterProcess
from dtrain.distributed.collectives import all_gather_object, broadcast_object
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.protocol import Engine
from dtrain.errors import ERROR_TYPES, CheckpointError, TopologyError


@dataclass(frozen=True)
class SaveResult:
    """The result of saving one checkpoint.

    Attributes:
        step: optimizer step of the checkpoint.
        error: why the checkpoint does not exist; None if it does.
        stall_began_s: monotonic time at which the training loop began to wait for it, in seconds.
        stall_s: how long the loop waited, in seconds.
        seconds: how long writing took.
        bytes: bytes written.
        missing_copy: why a further copy of it does not exist; None if all copies do.
    """

    step: int
    error: str | None
    stall_began_s: float
    stall_s: float
    seconds: float
    bytes: int
    missing_copy: str | None = None


@dataclass(frozen=True)
class SaverSettings:
    """Settings for saving checkpoints.

    Attributes:
        sharded: each rank writes its own shards. If false, rank 0 writes the full state, and so does one rank on each
            of `replicas` - 1 further nodes that do not share rank 0's folder.
        keep: number of newest checkpoints to keep.
        keeps_best: whether the best checkpoint is kept in addition.
        replicas: number of copies on separate disks.
        max_file_bytes: maximum size of a file with tensors.
        asynchronous: whether training continues while a checkpoint is written.
    """

    sharded: bool
    keep: int
    keeps_best: bool
    replicas: int
    max_file_bytes: int
    asynchronous: bool


class Saver:
    """Saves the checkpoints of one run. Every rank has one."""

    def __init__(
        self,
        folder: Path,
        context: RankContext,
        settings: SaverSettings,
        *,
        static: Callable[[], Mapping[str, bytes]],
        config_text: str,
        manifest_fields: Mapping[str, Any],
        resumed_step: int | None,
    ) -> None:
        """Collective. Decides which ranks write, and prepares their folders.

        Args:
            folder: folder of all checkpoints.
            static: returns the small files that are part of each checkpoint; called on ranks that publish.
            manifest_fields: further fields of the manifest.
            resumed_step: step of the checkpoint that this start resumes from; None if it starts from the beginning.

        Raises:
            CheckpointError: on every rank; a folder cannot be written.
        """
        self._folder, self._context, self._settings = folder, context, settings
        self._config_text = config_text
        self._nonce: str = broadcast_object(uuid.uuid4().hex[:8], context)
        config_hash = hashlib.sha256(config_text.encode()).hexdigest()
        self._manifest_fields = {**manifest_fields, "start": self._nonce, "config_sha256": config_hash}
        self._folder_ranks = _ranks_sharing_folder(folder.parent, context)
        first_ranks = sorted(set(all_gather_object(self._folder_ranks[0], context)))
        publishers = first_ranks if settings.sharded else first_ranks[: settings.replicas]
        self.publishes = context.rank in publishers
        self.writes = settings.sharded or self.publishes
        self._has_several_writers = settings.sharded or len(publishers) > 1
        self._last_complete_step = resumed_step
        self._pending: tuple[int, float, float] | None = None
        self._writer_result: dict[str, Any] | None = None
        self._writer: WriterProcess | None = None
        self._buffer: StagingBuffer | None = None

        def prepare_folder() -> None:
            if self.publishes:
                folder.mkdir(parents=True, exist_ok=True)
                flush_folder(folder.parent)
                clear_drafts(folder)
            if self.writes:
                self._writer = WriterProcess(static() if self.publishes else {})
                self._buffer = StagingBuffer(folder)

        self._run_on_all_ranks(prepare_folder)  # From here on, all drafts in the folder are of this start.

    def prepare(self, engine: Engine, *, slots: int) -> None:
        """Collective. Reserves memory and checks the disk space before the first step.

        Raises:
            CheckpointError: on every rank; a disk has no room for the checkpoints to keep and one more.
        """
        sharded = self._settings.sharded
        size = estimate(engine, slots=slots) // (self._context.world_size if sharded else 1)

        def reserve() -> None:
            if self._buffer is None or self._writer is None:
                return
            if self.publishes:
                self._check_disk_space(size * (len(self._folder_ranks) if sharded else 1))
            self._buffer.grow(size)
            self._writer.start(self._buffer.fd)

        self._run_on_all_ranks(reserve)

    def _check_disk_space(self, size: int) -> None:
        settings = self._settings
        # Damaged checkpoints and those of another history are never removed, so their space is not counted as free.
        removable = sum(f.stat().st_size for path in list_checkpoints(self._folder).values() for f in path.iterdir())
        # With several writers, the last checkpoint that is complete everywhere is kept too.
        kept = max(settings.keep, 2 if self._has_several_writers else 1)
        needed = (kept + settings.keeps_best + 1) * size
        free = shutil.disk_usage(self._folder).free + removable
        if needed > free:
            best = ", the best one" if settings.keeps_best else ""
            raise CheckpointError(
                f"{self._folder} has {free / 2**30:.2f} GiB free, but checkpoint.keep={settings.keep} checkpoints{best} "
                f"and the next one need {needed / 2**30:.2f} GiB ({size / 2**30:.2f} each). Free some space, lower "
                "checkpoint.keep, set run.output_dir to another disk, or set checkpoint.every=null to save none."
            )

    def _run_on_all_ranks(self, work: Callable[[], None]) -> None:
        """Collective. Calls `work` on every rank. If it fails on a rank, raises the first rank's error on all of them."""
        failure: tuple[str, str] | None = None
        try:
            work()
        except (CheckpointError, TopologyError) as error:
            failure = (type(error).__name__, str(error))
        except OSError as error:
            message = f"{self._folder} cannot be written on {socket.gethostname()}: {error.filename}: {error.strerror}."
            failure = (CheckpointError.__name__, message)
        failures = [each for each in all_gather_object(failure, self._context) if each is not None]
        if failures:
            self.close()
            kind, message = failures[0]
            failed = ERROR_TYPES[kind](message)
            failed.is_reported_elsewhere = not self._context.is_main
            raise failed

    def save(
        self, engine: Engine, step: int, state: Mapping[str, Any], *, protected: Sequence[int]
    ) -> SaveResult | None:
        """Collective. Copies the state into memory and starts writing it.

        Args:
            state: content for state.json.
            protected: steps of checkpoints to keep, however old.

        Returns:
            The result of the previous checkpoint, unless it was returned before.

        Raises:
            CheckpointError: the writer process has died.
        """
        begin = time.monotonic()
        previous = self.wait()  # The buffer is in use until then.
        scalars = engine.scalars()
        tensors = self._copy(engine, step)
        if self._buffer is None or self._writer is None:
            return None
        settings = self._settings
        rank, sharded = self._context.rank, settings.sharded
        parts = {"parts": self._folder_ranks, "of": self._context.world_size} if sharded else {}
        # Another node may lack parts of the newest checkpoint here, so the last complete one is kept too.
        last_complete = self._last_complete_step if self._has_several_writers else None
        request = WriteRequest(
            checkpoints=str(self._folder),
            step=step,
            nonce=self._nonce,
            tensors=tensors,
            texts={STATE: json.dumps({**state, "engine": scalars}, indent=1) + "\n", CONFIG: self._config_text},
            manifest_fields={
                **self._manifest_fields,
                **parts,
                "engine": engine.name,
                "world_size": self._context.world_size,
            },
            max_file_bytes=settings.max_file_bytes,
            keep=settings.keep,
            protected=[*protected, *([] if last_complete is None else [last_complete])],
            part=rank if sharded else None,
            local_parts=self._folder_ranks if sharded and self.publishes else None,
        )
        self._writer.submit(request, self._buffer.fd)
        self._writer_result = None if settings.asynchronous else self._writer.result(wait=True)
        self._pending = (step, begin, time.monotonic() - begin)
        return previous

    def _copy(self, engine: Engine, step: int) -> list[StagedTensor]:
        """Copies the state into the buffer.

        Collective, except that sharded checkpoints need no communication without engine.powersgd, which averages its
        error-feedback state here.
        """
        try:
            if self._settings.sharded:
                assert self._buffer is not None
                return copy_shards(self._buffer, engine.local_state(), self._context.rank)
            parameters = engine.named_state(here=self.writes)
            if self._buffer is not None:
                return copy_full_tensors(self._buffer, parameters, build_key_mapping(engine.module))
            for _ in parameters:  # Gathering them is a collective.
                continue
        except OSError as error:
            raise CheckpointError(f"Not enough memory to copy the checkpoint of step {step}: {error}.") from error
        return []

    def poll(self) -> SaveResult | None:
        """Returns the result of the current checkpoint if only rank 0 writes it. None while writing, and on other ranks.

        Raises:
            CheckpointError: the writer process has died.
        """
        return None if self._has_several_writers else self._local_result(wait=False)

    def wait(self) -> SaveResult | None:
        """Collective. Waits until no checkpoint is being written. Returns the last result, unless it was returned before.

        Raises:
            CheckpointError: the writer process has died.
        """
        local = self._local_result(wait=True)
        if not self._has_several_writers:
            return local
        results = [
            (rank, SaveResult(**result))
            for rank, result in enumerate(all_gather_object(None if local is None else asdict(local), self._context))
            if result is not None
        ]
        if not results:
            return None
        errors = [f"rank {rank}: {result.error}" for rank, result in results if result.error is not None]
        # A sharded checkpoint needs every part; otherwise one copy is enough.
        is_complete = not errors or not (self._settings.sharded or len(errors) == len(results))
        first = results[0][1]
        if is_complete:
            self._last_complete_step = first.step
        return SaveResult(
            first.step,
            error=None if is_complete else errors[0],
            stall_began_s=first.stall_began_s,  # The metrics log uses the clock of rank 0.
            stall_s=max(result.stall_s for _, result in results),
            seconds=max(result.seconds for _, result in results),
            bytes=sum(result.bytes for _, result in results),
            missing_copy=errors[0] if is_complete and errors else None,
        )

    def _local_result(self, *, wait: bool) -> SaveResult | None:
        """Returns the result of this rank's part of the work. None while writing, and on ranks that do not write."""
        if self._writer is None or self._pending is None:
            return None
        result = self._writer_result or self._writer.result(wait=wait)
        if result is None:
            return None
        (step, begin, stall_s), self._pending, self._writer_result = self._pending, None, None
        if "error" in result:
            name = Path(result["file"]).name if result["file"] != "None" else folder_name(step)
            error = f"{folder_name(step)} cannot be written to {self._folder}: {name}: {result['error']}"
            return SaveResult(step, error, begin, stall_s, result["seconds"], 0)
        return SaveResult(step, None, begin, stall_s, result["seconds"], result["bytes"])

    def close(self) -> None:
        """Ends the writer process. An unfinished checkpoint is abandoned."""
        if self._writer is not None:
            self._writer.close()
        if self._buffer is not None:
            self._buffer.close()


def _ranks_sharing_folder(folder: Path, context: RankContext) -> list[int]:
    """Collective. Returns the ranks that write to the same folder as this one."""
    if context.topology.num_nodes == 1:
        return list(range(context.world_size))
    shares = shares_folder_with_rank_0(folder, context)
    nodes: list[int] = all_gather_object(context.topology.node_rank, context)
    labels = [-1 if is_shared else node for is_shared, node in zip(shares, nodes, strict=True)]
    return [rank for rank, label in enumerate(labels) if label == labels[context.rank]]

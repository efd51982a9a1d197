"""Ends a rank after an error: writes exit.json and prints the message, once if all ranks have the same.

Ranks exchange the reasons why they end through the job's store, never in a collective: one rank may be the only one that
fails. The first reason counts for the job and goes into exit.json.
"""

from __future__ import annotations

import errno
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.bounded import call_with_timeout
from dtrain.distributed.device_faults import explain, find_fault, is_from_device
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.distributed.launcher_process import how_to_go_on
from dtrain.distributed.process_info import (
    ProcessIdentity,
    is_alive,
    open_files_hint,
    raise_open_files,
    this_process,
)
from dtrain.distributed.process_limit import process_limit_error
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import ignore_further
from dtrain.distributed.store import KeyValueStore
from dtrain.distributed.topology import Topology
from dtrain.environment import missing_module
from dtrain.errors import DeviceError, DtrainError, Interrupted, Preempted, TopologyError
from dtrain.job.launcher_error import write_launcher_error
from dtrain.runs.folder import write_exit
from dtrain.runs.lock import is_held_by_another_job

if TYPE_CHECKING:
    from dtrain.job.watchdog.client import WatchdogClient

T = TypeVar("T")

FINAL_MESSAGE_S = 2.0
"""How long a rank waits for rank 0's final message, and rank 0 for the others to read it."""

PROC_ENTRY_S = 0.2
"""How long a killed process may still be in /proc after its sockets are closed. mpirun kills the rest after 0.5 s."""

PEER_FAILURE_S = 0.5
"""How long the monitors may take to report a rank that has died."""

PEER_FAILURE_AT_SIGNAL_S = 0.1
"""The same limit after a signal from the launcher: mpirun kills this rank 0.25 s later."""

STORE_S = 3.0
"""How long an exchange through the store may take in total: its host may be gone."""


@dataclass(frozen=True)
class JobSession:
    """The job after all ranks have met.

    Attributes:
        context: place and services of this rank.
        store: the store that all ranks share; None for one process.
        processes: the ranks' processes, by rank.
        watchdog: this rank's side of its monitor.
    """

    context: RankContext
    store: KeyValueStore | None
    processes: Sequence[ProcessIdentity]
    watchdog: WatchdogClient


@dataclass(frozen=True)
class ExitRecord:
    """Why a rank ended, with the fields of exit.json.

    Attributes:
        code: exit code.
        cause: type of the error.
        rank: the rank where it happened.
        host: host name of that rank.
        message: the message for the user.
    """

    code: int
    cause: str
    rank: int
    host: str
    message: str

    @property
    def first_line(self) -> str:
        """The first line of the message."""
        return (self.message.splitlines() or [self.cause])[0]


def success_record(topology: Topology) -> ExitRecord:
    """Returns the record of a run that ended well."""
    return ExitRecord(0, "done", topology.rank, socket.gethostname(), "done")


def interrupted_early(topology: Topology, name: str) -> Interrupted:
    """Returns what a signal raises before the first step of a training run: nothing is lost, so the code is 75."""
    message = f"Stopped before the first step of this start ({name}): nothing is lost. {how_to_go_on(topology)}"
    return Interrupted(message, Preempted.exit_code)


def for_user(error: BaseException) -> BaseException:
    """Returns the error to report: one that has a message for the user, where a library raised another."""
    if _is_for_user(error):
        return error
    if (message := missing_module(error)) is not None:
        return DtrainError(message)
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return TopologyError(f"{error}: {open_files_hint(raise_open_files())}")
    if (limit := process_limit_error(error)) is not None:
        return limit
    # Not imported here: a signal may have interrupted the first import of torch, and a second one would crash.
    workers = sys.modules.get("dtrain.data.worker_batches")
    death: BaseException | None = workers.worker_death(error) if workers is not None else None
    return death or explain(error) or error


def error_record(error: BaseException, topology: Topology) -> ExitRecord:
    """Returns the record of an error on this rank."""
    error = for_user(error)
    message = str(error) if _is_for_user(error) and str(error) else f"{type(error).__name__}: {error}"
    code = error.exit_code if isinstance(error, DtrainError | Interrupted) else 1
    return ExitRecord(code, type(error).__name__, topology.rank, socket.gethostname(), message)


def write_exit_json(record: ExitRecord, config: Config, heartbeat: Heartbeat) -> None:
    """Writes exit.json if the run's folder exists and no other job works in it. The first writer wins."""
    if config.run_dir.is_dir() and not is_held_by_another_job(config.run_dir, heartbeat.lock_id):
        write_exit(config.run_dir / "exit.json", **asdict(record))


def write_exit_file(record: ExitRecord, topology: Topology) -> None:
    """Writes the files of the launcher: that of launch/*.sh, where the first rank of a node wins, and torchrun's.

    launch/*.sh reads it if the run has no exit.json.
    """
    write_launcher_error(topology.launcher_error_file, record.message)
    file = topology.exit_file
    if file is not None and file.parent.is_dir():
        write_exit(file, **asdict(record))


def report_failure(
    error: BaseException, config: Config, job: JobSession, *, has_exit_json: bool, is_launcher_alive: Callable[[], bool]
) -> int:
    """Writes and prints why this rank ends; returns the exit code.

    Args:
        has_exit_json: whether the command writes exit.json.
        is_launcher_alive: if it is not, launcher_watch.py ends this process and reports why.
    """
    ignore_further()  # a launcher that sees one rank end sends signals to the others
    topology = job.context.topology
    job.watchdog.wait_if_silenced()
    job.context.heartbeat.at(Phase.ENDING)
    follows = _follows_another(error, job)
    if follows and not is_launcher_alive():
        threading.Event().wait(FINAL_MESSAGE_S)
    own, first = _settle(error, config, job, follows=follows, has_exit_json=has_exit_json)
    if follows:
        _print(f"{_follower_message(first, own)} Rank {topology.rank} ends as well.", job, error, follows=True)
        return first.code
    _print(_error_text(error, own), job, error, follows=False, title=_traceback_title(error, topology))
    return own.code


def record_failure(error: BaseException, config: Config, job: JobSession) -> TopologyError | None:
    """Writes why a run that was started from Python code ends. Prints nothing: the code gets the error.

    Returns:
        What to raise instead, if the error shows only that another rank is gone: an error that names it.
    """
    ignore_further()  # until `fit` restores the signal handlers
    job.context.heartbeat.at(Phase.ENDING)
    follows = _follows_another(error, job)
    own, first = _settle(error, config, job, follows=follows, has_exit_json=True)
    return None if not follows or isinstance(error, KeyboardInterrupt) else TopologyError(_follower_message(first, own))


def report_failure_alone(error: BaseException, config: Config, context: RankContext, *, has_exit_json: bool) -> int:
    """Reports a failure like `report_failure`, before the ranks have met or after they have separated."""
    ignore_further()
    topology = context.topology
    record = error_record(error, topology)
    write_exit_file(record, topology)
    if has_exit_json:
        write_exit_json(record, config, context.heartbeat)
    if topology.is_main if isinstance(error, KeyboardInterrupt) else not getattr(error, "is_reported_elsewhere", False):
        log.error("%s", _traceback_title(error, topology) + _error_text(error, record))
    return record.code


def lost_peer_error(error: BaseException, topology: Topology, job: JobSession | None) -> TopologyError:
    """Returns the error to raise instead of one that shows only that another rank is gone.

    Args:
        job: None if the ranks have not exchanged their processes yet.
    """
    ignore_further()
    if job is None:
        return TopologyError(_lost_connection_record(error, topology.rank, socket.gethostname()).message)
    return TopologyError(_follower_record(error, job).message)


def _follows_another(error: BaseException, job: JobSession) -> bool:
    """Returns whether this rank ends because another one has ended."""
    from dtrain.distributed.collectives import is_lost_peer

    return job.context.world_size > 1 and (is_lost_peer(error) or _is_signal_after_failure(error, job))


def _is_signal_after_failure(error: BaseException, job: JobSession) -> bool:
    """Returns whether a launcher stops this rank because another one failed; its signal may precede the broken connection."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    failure = job.watchdog.peer_failure(PEER_FAILURE_AT_SIGNAL_S)
    return failure is not None and not failure.by_signal


def _settle(
    error: BaseException, config: Config, job: JobSession, *, follows: bool, has_exit_json: bool
) -> tuple[ExitRecord, ExitRecord]:
    """Tells the others, unless this rank follows one of them, and writes the files.

    Returns:
        This rank's record, and the first record of the job.
    """
    own = _follower_record(error, job) if follows else error_record(error, job.context.topology)
    if not follows and own.code != Preempted.exit_code:  # all ranks agree on a stop with a checkpoint
        job.watchdog.report_failure(own.first_line, own.code, by_signal=isinstance(error, KeyboardInterrupt))
    first = _with_store(partial(_publish_cause, own, job.store), own)
    write_exit_file(first, job.context.topology)
    if has_exit_json and getattr(error, "is_recorded", True):
        write_exit_json(first, config, job.context.heartbeat)
    return own, first


# ---------------------------------------------------------------- the message


def _is_for_user(error: BaseException) -> bool:
    return isinstance(error, DtrainError | KeyboardInterrupt)


def _error_text(error: BaseException, own: ExitRecord) -> str:
    """Returns the message of an error that has one for the user; the traceback where it has none, or is a bug."""
    shown, trace = for_user(error), "".join(traceback.format_exception(error)).rstrip()
    if isinstance(shown, DeviceError) and shown.is_bug:
        return f"{trace}\n{own.message}"
    return own.message if _is_for_user(shown) else trace


def _traceback_title(error: BaseException, topology: Topology) -> str:
    """Returns what to print before a traceback, or a fault of one rank's GPU: which rank it is from."""
    shown = for_user(error)
    is_of_one = isinstance(shown, DeviceError) or not _is_for_user(shown)
    if topology.world_size == 1 or not is_of_one:
        return ""
    has_message = isinstance(shown, DeviceError) and not shown.is_bug
    return f"Rank {topology.rank} on {socket.gethostname()} failed:{' ' if has_message else chr(10)}"


def _follower_message(first: ExitRecord, own: ExitRecord) -> str:
    return f"Rank {first.rank} on {first.host} ended: {first.first_line}" if first != own else own.message


def _print(message: str, job: JobSession, error: BaseException, *, follows: bool, title: str = "") -> None:
    """Prints the message on rank 0, and on ranks whose message differs from rank 0's.

    Args:
        title: printed above the message; differs between ranks whose messages may be equal.
    """
    # At Ctrl-C the ranks do not wait for each other: one that waits in a collective ends with the first that leaves.
    is_urgent = isinstance(error, KeyboardInterrupt) and not follows
    if job.context.is_main:
        log.error("%s%s", title, message)
        _with_store(partial(_send_final_message, message, job, wait_s=0.0 if is_urgent else FINAL_MESSAGE_S), None)
    elif not is_urgent:
        is_printed = isinstance(error, DtrainError) and error.is_reported_elsewhere
        wait_s = 0.0 if is_printed else FINAL_MESSAGE_S
        final: str | None = _with_store(partial(_receive_final_message, job.store, wait_s=wait_s), None)
        if not (is_printed or final == message or (follows and final is not None)):
            log.error("%s%s", title, message)


# ---------------------------------------------------------------- through the store


def _send_final_message(message: str, job: JobSession, *, wait_s: float) -> None:
    """Publishes rank 0's final message and waits until the others have read it: the store ends with rank 0."""
    store, deadline = job.store, time.monotonic() + wait_s
    if store is None:
        return
    store.compare_set("end/message", "", message)
    while store.add("end/readers", 0) < len(job.processes) - 1 - len(_dead(job)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _receive_final_message(store: KeyValueStore | None, *, wait_s: float) -> str | None:
    """Returns the final message of rank 0, if that ends too."""
    if store is None:
        return None
    deadline = time.monotonic() + wait_s
    while not store.check(["end/message"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    message = store.get("end/message").decode() if store.check(["end/message"]) else None
    store.add("end/readers", 1)
    return message


def _publish_cause(own: ExitRecord, store: KeyValueStore | None) -> ExitRecord:
    """Publishes why this rank ends, unless another one has; returns the first record."""
    if store is None:
        return own
    return ExitRecord(**json.loads(store.compare_set("end/cause", "", json.dumps(asdict(own)))))


def _with_store(exchange: Callable[[], T], default: T) -> T:
    """Returns the result of an exchange through the store, or `default`: without its host it fails or blocks."""
    return call_with_timeout(exchange, STORE_S, default, ignore=(RuntimeError,))


# ---------------------------------------------------------------- which rank is gone


def _follower_record(error: BaseException, job: JobSession) -> ExitRecord:
    """Returns the record of a lost connection: names the rank that is gone, from the monitors or from /proc."""
    failure = job.watchdog.peer_failure(PEER_FAILURE_S)
    if failure is not None:
        return ExitRecord(failure.code, TopologyError.__name__, failure.rank, failure.host, failure.message)
    deadline = time.monotonic() + PROC_ENTRY_S
    while not (dead := _dead(job)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if not dead:
        return _lost_connection_record(error, job.context.rank, job.processes[job.context.rank].host)
    names = ", ".join(f"rank {rank} ({job.processes[rank]})" for rank in dead[:8])
    message = f"{names[:1].upper()}{names[1:]} exited without an error message: killed by a signal, or out of memory?"
    return ExitRecord(TopologyError.exit_code, TopologyError.__name__, dead[0], job.processes[dead[0]].host, message)


def _lost_connection_record(error: BaseException, rank: int, host: str) -> ExitRecord:
    """Returns the record of `rank`, which cannot see which rank it has lost."""
    fault = find_fault(str(error)) if is_from_device(error) else None
    if fault is not None and fault.fault.name != "remote":  # NCCL says more than that a connection is gone
        message = f"Rank {rank} on {host}: {fault.fault.cause} {fault.fault.cure} ({fault.line})"
        return ExitRecord(TopologyError.exit_code, TopologyError.__name__, rank, host, message)
    # gloo writes [10.0.0.2]:4567, and NCCL 10.0.0.2<4567>.
    address = re.search(r"(?:\[|\b)([0-9a-fA-F.:]+)(?:\]:|<)\d+", str(error))
    message = (
        f"Rank {rank} on {host} lost its connection to another rank{f' at {address[1]}' if address else ''}: that rank "
        "has died, or its node or the network is down."
    )
    return ExitRecord(TopologyError.exit_code, TopologyError.__name__, rank, host, message)


def _dead(job: JobSession) -> list[int]:
    """Returns the ranks whose process has ended. Only processes on this host can be checked."""
    observer = this_process()
    return [rank for rank, process in enumerate(job.processes) if is_alive(process, observer=observer) is False]

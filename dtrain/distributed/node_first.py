"""Work that takes hours on some ranks while the others wait in the store, not in a collective.

Call it through collectives.node_first, for work of one rank per node, or collectives.every_rank. Needs no torch.

The last node to end sets one key, for which all ranks wait. So a call costs the store a few operations per rank, however
many nodes there are.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dtrain.console import log
from dtrain.distributed.device_faults import explain
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.distributed.process_limit import process_limit_error
from dtrain.distributed.store import KeyValueStore
from dtrain.errors import ERROR_TYPES, DtrainError, Interrupted, TopologyError

LINGER_S = 2.0

MAX_LOOKS_PER_S = 2048
"""How often all ranks together look into the store, once they have waited for a while."""

_INTERRUPTED = Interrupted.__name__


@dataclass(frozen=True)
class NodeWork:
    """One call of node_first, or of every_rank, on one rank.

    Attributes:
        store: the job's store.
        name: prefix of the keys of this call.
        rank: this rank.
        world_size: number of ranks.
        node_rank: number of this rank's node; of every_rank: this rank.
        num_nodes: number of nodes; of every_rank: of ranks.
        unit: what works for itself: node or rank.
        heartbeat: where this rank reports that it waits.
    """

    store: KeyValueStore
    name: str
    rank: int
    world_size: int
    node_rank: int
    num_nodes: int
    unit: str = "node"
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def result_key(self, node_rank: int) -> str:
        """Returns the key that is set when a node's work has ended."""
        return f"{self.name}/{node_rank}"

    @property
    def num_done_key(self) -> str:
        """Counts the nodes whose work has ended."""
        return f"{self.name}/done"

    @property
    def num_failed_key(self) -> str:
        """Counts the nodes whose work has failed."""
        return f"{self.name}/failed"

    @property
    def end_key(self) -> str:
        """Set once there is nothing to wait for: to an empty object, or to the failure. The only key that ranks poll."""
        return f"{self.name}/end"

    @property
    def max_pause_s(self) -> float:
        """Longest pause between two looks at the store, which answers this many ranks."""
        return max(0.5, self.world_size / MAX_LOOKS_PER_S)

    @property
    def readers_key(self) -> str:
        """Counts the ranks that have read a failure."""
        return f"{self.name}/read"


def run_node_work(node_work: NodeWork, work: Callable[[], Any] | None, *, progress_every_s: float) -> Any:
    """Collective. Runs `work` if given (on one rank of each node), and waits for all nodes.

    Returns:
        The result of this rank's node, through JSON.

    Raises:
        DtrainError: what the work of the first failing node raised, with the same type, on all ranks.
        Interrupted: a signal has stopped the work, here or on another rank.
    """
    store = node_work.store
    with _progress(node_work, progress_every_s):
        if work is not None:
            _publish_result(node_work, work)
        with node_work.heartbeat.within(Phase.WAITING_FOR_NODE):
            pause = 0.005
            while not store.check([node_work.end_key]):
                time.sleep(pause)
                pause = min(pause * 1.5, node_work.max_pause_s)
    failure = json.loads(store.get(node_work.end_key))
    if not failure:
        return json.loads(store.get(node_work.result_key(node_work.node_rank)))["value"]
    store.add(node_work.readers_key, 1)
    _wait_for_readers(node_work)
    if failure["error"] == _INTERRUPTED:
        raise Interrupted(failure["message"], failure["code"])
    error = ERROR_TYPES[failure["error"]](failure["message"])
    error.is_reported_elsewhere = node_work.rank != 0
    raise error


def _publish_result(node_work: NodeWork, work: Callable[[], Any]) -> None:
    store, failed = node_work.store, False
    try:
        text = json.dumps({"value": work()})
    except DtrainError as error:
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in ERROR_TYPES)
        text, failed = json.dumps({"error": kind, "message": str(error)}), True
    except BaseException as error:
        # A bug in the work, or Ctrl-C: the others must not wait forever. On this rank the error propagates unchanged.
        message = f"Rank {node_work.rank} failed in the work of its node: {type(error).__name__}: {error}"
        limit = process_limit_error(error)
        failure: dict[str, Any] = {"error": "DtrainError", "message": message}
        if limit is not None:
            failure = {"error": TopologyError.__name__, "message": str(limit)}
        elif (fault := explain(error)) is not None:
            shown = TopologyError if fault.exit_code == TopologyError.exit_code else DtrainError
            message = f"Rank {node_work.rank} failed in the work of its node: {fault}"
            failure = {"error": shown.__name__, "message": message}
        if isinstance(error, Interrupted):  # a signal stops all ranks, but may reach this one first
            failure = {"error": _INTERRUPTED, "message": str(error), "code": error.exit_code}
        crash = json.dumps(failure)
        store.compare_set(node_work.end_key, "", crash)
        store.add(node_work.readers_key, 1)
        _wait_for_readers(node_work)
        raise
    store.compare_set(node_work.result_key(node_work.node_rank), "", text)
    if failed:
        store.add(node_work.num_failed_key, 1)
    if store.add(node_work.num_done_key, 1) == node_work.num_nodes:
        store.compare_set(node_work.end_key, "", json.dumps(_first_failure(node_work)))


def _first_failure(node_work: NodeWork) -> dict[str, Any]:
    """Returns what the first failing node has published; empty if none failed. Called once, when all are done."""
    if not node_work.store.add(node_work.num_failed_key, 0):
        return {}
    results = (json.loads(node_work.store.get(node_work.result_key(node))) for node in range(node_work.num_nodes))
    return next(result for result in results if "error" in result)


def _wait_for_readers(node_work: NodeWork) -> None:
    """Keeps rank 0, which may host the store, alive until all ranks have read the failure, or for LINGER_S."""
    deadline = time.monotonic() + LINGER_S
    while (
        node_work.rank == 0
        and node_work.store.add(node_work.readers_key, 0) < node_work.world_size
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)


@contextmanager
def _progress(node_work: NodeWork, every_s: float) -> Iterator[None]:
    """Logs on rank 0, also while that is at work itself, which nodes are not done."""
    done, begin = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(every_s):
            seconds = time.monotonic() - begin
            who = (
                "One process per node is at work, the others wait" if node_work.unit == "node" else "Ranks are at work"
            )
            log.info("%s: %.0f s so far%s", who, seconds, _busy(node_work))

    reporter = threading.Thread(target=report, daemon=True)
    if node_work.rank == 0:
        reporter.start()
    try:
        yield
    finally:
        done.set()
        if node_work.rank == 0:
            reporter.join(timeout=5.0)


def _busy(node_work: NodeWork) -> str:
    if node_work.num_nodes == 1:
        return ""
    nodes = range(node_work.num_nodes)
    busy = list(islice((str(node) for node in nodes if not node_work.store.check([node_work.result_key(node)])), 9))
    return f"; {node_work.unit}s not done: {', '.join(busy[:8])}{', ...' if len(busy) > 8 else ''}"

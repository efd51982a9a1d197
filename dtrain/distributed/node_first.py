"""Work that one rank per node does while the others wait in the store, not in a collective: it may take hours.

collectives.node_first is the way in. Needs no torch.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dtrain.console import log
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.distributed.rendezvous import Board
from dtrain.errors import ERROR_TYPES, DtrainError

JSON = Any
LINGER_S = 2.0


@dataclass(frozen=True)
class Turn:
    """One piece of work on all nodes: its own keys in the store, and this rank's part in it."""

    board: Board
    name: str
    rank: int
    world_size: int
    node_rank: int
    num_nodes: int
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def keys(self) -> list[str]:
        """One per node, set when its work has ended."""
        return [f"{self.name}/{node}" for node in range(self.num_nodes)]

    @property
    def broken(self) -> str:
        """Set when a rank dies in its work, so that nobody waits for it."""
        return f"{self.name}/broken"


def take_turn(turn: Turn, work: Callable[[], JSON] | None, *, progress_every_s: float) -> JSON:
    """Collective. Runs `work` where it is given (one rank of each node), and waits for all nodes.

    Returns:
        The result of this rank's node, through JSON.

    Raises:
        DtrainError: what the work of the first failing node raised, of the same type, on all ranks.
    """
    with _progress(turn, progress_every_s):
        if work is not None:
            _work_and_tell(turn, work)
        with turn.heartbeat.within(Phase.WAITING_FOR_NODE):
            pause = 0.005
            while not turn.board.check(turn.keys) and not turn.board.check([turn.broken]):
                time.sleep(pause)
                pause = min(pause * 1.5, 0.5)
    keys = [turn.broken] if turn.board.check([turn.broken]) else turn.keys
    results = [json.loads(turn.board.get(key)) for key in keys]
    failed = next((result for result in results if "error" in result), None)
    if failed is None:
        return results[turn.node_rank]["value"]
    turn.board.add(f"{turn.name}/read", 1)
    _linger(turn)
    error = ERROR_TYPES[failed["error"]](failed["message"])
    error.is_reported_elsewhere = turn.rank != 0
    raise error


def _work_and_tell(turn: Turn, work: Callable[[], JSON]) -> None:
    try:
        text = json.dumps({"value": work()})
    except DtrainError as error:
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in ERROR_TYPES)
        text = json.dumps({"error": kind, "message": str(error)})
    except BaseException as error:
        # A mistake in the work, or Ctrl-C: the others must not wait for ever. Here it goes on as it is.
        message = f"Rank {turn.rank} failed in the work of its node: {type(error).__name__}: {error}"
        turn.board.compare_set(turn.broken, "", json.dumps({"error": "DtrainError", "message": message}))
        turn.board.add(f"{turn.name}/read", 1)
        _linger(turn)
        raise
    turn.board.compare_set(turn.keys[turn.node_rank], "", text)


def _linger(turn: Turn) -> None:
    """Lets rank 0, whose end is the store's, wait a moment until all have read why it ends."""
    until = time.monotonic() + LINGER_S
    while turn.rank == 0 and turn.board.add(f"{turn.name}/read", 0) < turn.world_size and time.monotonic() < until:
        time.sleep(0.02)


@contextmanager
def _progress(turn: Turn, every_s: float) -> Iterator[None]:
    """Says on rank 0, also while that works itself, which nodes are still at work."""
    done, begin = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(every_s):
            seconds = time.monotonic() - begin
            log.info("One process per node is at work, the others wait: %.0f s so far%s", seconds, _busy(turn))

    reporter = threading.Thread(target=report, daemon=True)
    if turn.rank == 0:
        reporter.start()
    try:
        yield
    finally:
        done.set()
        if turn.rank == 0:
            reporter.join(timeout=5.0)


def _busy(turn: Turn) -> str:
    if turn.num_nodes == 1:
        return ""
    busy: Sequence[str] = [str(node) for node, key in enumerate(turn.keys) if not turn.board.check([key])]
    return f"; nodes not done: {', '.join(busy[:8])}{', ...' if len(busy) > 8 else ''}"

"""Imports once, runs the ranks of this node as forks, and starts them again after a failure: `--ranks N`.

On one machine this process decides about restarts itself. On several hosts the coordinator does, which knows them all:
launch/dtrain.sh starts this launcher on each host, spare ones included, and node_orders.py brings its orders.
"""

from __future__ import annotations

import gc
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dtrain.cluster.rounds import RoundOrder
from dtrain.console import log
from dtrain.distributed import launcher_env, linux_process, network
from dtrain.distributed.topology import SINGLE
from dtrain.distributed.torchrun_agent import LAUNCHER_NAME
from dtrain.errors import FINAL_CODES, Preempted, TopologyError
from dtrain.job.failure import interrupted_early
from dtrain.job.forked_outcome import describe_first_failure, final_message
from dtrain.job.forked_ranks import (
    STOP_SIGNALS,
    RankForker,
    RoundEnd,
    block_signals,
    end_descendants,
    process_name,
)
from dtrain.job.node_orders import Orders, open_orders, wait_for_orders


@dataclass(frozen=True)
class RankLaunch:
    """What to start.

    Attributes:
        ranks: number of ranks, unless the coordinator orders another one.
        max_restarts: how often they are started again after a failure; on several hosts the coordinator decides.
        exit_file: exit.json of the run folder; None for a command that writes none.
        preload: imports what the ranks will import.
        run_rank: runs a rank in its process and returns its exit code.
    """

    ranks: int
    max_restarts: int
    exit_file: Path | None
    preload: Callable[[], None]
    run_rank: Callable[[], int]


def run_ranks(launch: RankLaunch, env: MutableMapping[str, str]) -> int:
    """Runs all ranks to their end, with restarts, and returns the job's exit code.

    Args:
        env: os.environ; a rank's variables are set in it, in the process of the rank.

    Raises:
        Interrupted: a signal told the job to stop before there were ranks.
        TopologyError: a rank could not be started, or the socket where ranks meet could not be opened.
    """
    name = process_name()
    linux_process.name_process(LAUNCHER_NAME.encode())
    linux_process.adopt_orphans()  # what a killed rank leaves behind becomes ours, and ends with us
    gc.disable()  # imports leave next to nothing to collect
    with _interruptible():
        launch.preload()
        signals, mask = block_signals()
    gc.freeze()  # the ranks' garbage collections would copy every shared page
    gc.enable()
    orders = open_orders(env)
    forker = RankForker(launch.run_rank, launch.exit_file, env, signals, mask, name, orders)
    end = _restart_alone(forker, launch) if orders is None else _follow_orders(forker, orders)
    end_descendants()
    if end is None:
        return 0
    if (message := final_message(end.start, end.record)) is not None and end.code != Preempted.exit_code:
        log.error("%s", message)
    return end.code


def _restart_alone(forker: RankForker, launch: RankLaunch) -> RoundEnd:
    """Runs the ranks of a job on one machine, and starts them again after a failure."""
    ranks, max_restarts = launch.ranks, launch.max_restarts
    run_id, restart, end = f"dtrain-{secrets.token_hex(8)}", 0, None
    while True:
        listener = network.listen("127.0.0.1", 0)  # rank 0 inherits it, so that its port is free and stays so
        port = listener.getsockname()[1]
        order = RoundOrder(ranks, 0, ranks, 0, 1, "127.0.0.1", port, restart, max_restarts, [])
        end = forker.run(order, listener, run_id=run_id, earlier=end)
        if end.was_stopped or end.code in FINAL_CODES or restart == max_restarts:
            return end
        restart += 1
        what = describe_first_failure(end.start)
        log.warning("%s All %d ranks start again: restart %d of %d.", what, ranks, restart, max_restarts)


def _follow_orders(forker: RankForker, orders: Orders) -> RoundEnd | None:
    """Runs the ranks of this node as the coordinator of a job on several hosts orders it; None without any start."""
    end: RoundEnd | None = None
    listener: socket.socket | None = None
    run_id = f"dtrain-{launcher_env.fingerprint(forker.env.get(launcher_env.JOB_ID, ''))}"  # the same on all nodes
    orders.report(ready=socket.gethostname())
    while True:
        found, was_stopped = wait_for_orders(orders, forker.signals)
        if was_stopped or not found:
            return end
        stopped = [order["stop"] for order in found if "stop" in order]
        for order in found:
            if "finish" in order:
                return end
            if "start" in order and order["start"]["restart"] in stopped:
                continue  # both came during the imports
            if "stop" in order:
                orders.report(ended=order["stop"], code=TopologyError.exit_code, failure="")
            elif "listen" in order:
                if listener is not None:  # of a start that was stopped before it began
                    listener.close()
                if end is not None:  # what dead ranks have left may hold the same port
                    forker.clear(end)
                listener = _listen(orders, **order["listen"])
            elif "start" in order:
                start = RoundOrder(**order["start"])
                socket_here = listener if start.node_rank == 0 else None
                end = forker.run(start, socket_here, run_id=run_id, earlier=end)
                listener = None
                failure = describe_first_failure(end.start) if end.start.failures() else ""
                orders.report(ended=start.restart, code=end.code, failure=failure)
                if end.was_stopped:
                    return end


def _listen(orders: Orders, address: str, port: int) -> socket.socket:
    """Opens the socket where the ranks meet, and reports its port.

    Raises:
        TopologyError: it cannot be opened.
    """
    try:
        listener = network.listen_as_master(address, port, serves_other_nodes=True)
    except OSError as error:
        raise TopologyError(f"cannot open the rendezvous at {address}:{port}: {error.strerror}.") from error
    orders.report(listening=listener.getsockname()[1])
    return listener


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets a signal end the imports. No helper thread, unlike signals.py: it would be one at the fork."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise interrupted_early(SINGLE, signal.Signals(number).name)

    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

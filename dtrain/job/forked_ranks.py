"""Runs the ranks of one node as forks of this process, once: for rank_launcher.py.

Forked and not spawned, because everything is imported once for all ranks and all restarts (a rank is there 0.1 s after its
start, not 4 s), and that is safe as long as this process has no thread, no CUDA context and no process group: preload.py
only imports, `other_threads` checks, and where a thread exists nevertheless, ranks are started as new programs.

A rank sees the variables of torchrun, is in a session of its own, and handles signals itself. This process only waits.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, MutableMapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dtrain import console
from dtrain.cluster.remote_supervisor import stamp
from dtrain.cluster.rounds import RoundOrder
from dtrain.console import log
from dtrain.distributed import launcher_env, linux_process, process_limit
from dtrain.errors import Preempted, TopologyError
from dtrain.job.forked_outcome import RankStart, job_code, read_exit
from dtrain.job.node_orders import Orders

PATIENT_CODES = (0, Preempted.exit_code)
"""Exit codes of one rank after which the others may take as long as they need."""

SETTLE_S = 5.0
"""Time for the other ranks to end by themselves after one has failed; they notice at once, and report it."""

TERM_S = 3.0
"""Time from SIGTERM to SIGKILL for a rank that has not ended by then."""

LINGER_S = 2.0
"""Time for helper processes of ranks to end by themselves before this process ends: a monitor may still write."""

AFTER_RESTART_S = 0.3
"""The same before ranks start again. Ranks that reported an error have been heard by then."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that are passed on to all ranks."""

SAFE_THREADS = ("jemalloc_bg_thd",)
"""Names of threads that may exist before a fork: jemalloc (in pyarrow) takes its locks before and starts it again after."""


@dataclass(frozen=True)
class RoundEnd:
    """How one start of the ranks has ended.

    Attributes:
        start: its ranks and their exit codes.
        record: content of exit.json if this start has written it.
        code: dtrain's exit code of the job, as this node sees it.
        was_stopped: a signal told the job to stop.
        was_killed: the coordinator has had the ranks killed.
    """

    start: RankStart
    record: dict[str, Any] | None
    code: int
    was_stopped: bool
    was_killed: bool


@dataclass(frozen=True)
class RankForker:
    """What every start of this node's ranks needs.

    Attributes:
        run_rank: runs a rank in its process and returns its exit code.
        exit_file: exit.json of the run folder; None for a command that writes none.
        env: os.environ; a rank's variables are set in it, in the process of the rank.
        signals: the signals to wait for, which are blocked here.
        mask: the signals that are blocked in a rank.
        name: the process name of a rank.
        orders: the channel to the coordinator of a job on several hosts; None on one.
    """

    run_rank: Callable[[], int]
    exit_file: Path | None
    env: MutableMapping[str, str]
    signals: set[signal.Signals]
    mask: set[signal.Signals]
    name: bytes
    orders: Orders | None

    def run(
        self, order: RoundOrder, listener: socket.socket | None, *, run_id: str, earlier: RoundEnd | None
    ) -> RoundEnd:
        """Runs the ranks once, to their end.

        Args:
            listener: the open socket where they meet, if rank 0 is here; it is closed here when the ranks have it.
            earlier: the end of the start before this one. Its monitors would report it as the end of this one, so they
                are ended first.
        """
        if earlier is not None:
            self.clear(earlier)
        file = self.exit_file
        old_stamp = stamp(file)
        if own_file := self.env.get(launcher_env.EXIT_FILE):  # an earlier start's end is not this one's
            Path(own_file).unlink(missing_ok=True)
        with listener or nullcontext():
            start = _start_all(self, order, listener, run_id=run_id)
        was_stopped, was_killed = _wait(start, self.signals, self.orders)
        record = read_exit(file, old_stamp)
        return RoundEnd(start, record, job_code(start, record), was_stopped, was_killed)

    def clear(self, earlier: RoundEnd) -> None:
        """Ends what the ranks of an earlier start have left."""
        end_descendants(0.0 if earlier.was_killed else AFTER_RESTART_S)


# ---------------------------------------------------------------- starting ranks


def _start_all(forker: RankForker, order: RoundOrder, listener: socket.socket | None, *, run_id: str) -> RankStart:
    """Forks all ranks. Rank 0 inherits the socket where they meet."""
    start, launcher, threads = RankStart(), os.getpid(), other_threads()
    if threads:
        log.warning("Ranks are started as new programs, which takes longer: a thread (%s) runs already.", threads[0])
    common = {
        "WORLD_SIZE": order.world_size,
        "LOCAL_WORLD_SIZE": order.ranks,
        "GROUP_RANK": order.node_rank,
        "GROUP_WORLD_SIZE": order.num_nodes,
        "MASTER_ADDR": order.address,
        "MASTER_PORT": order.port,
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": order.restart,
        "TORCHELASTIC_MAX_RESTARTS": order.max_restarts,
        launcher_env.LAUNCHER_PID: launcher,
        launcher_env.LOST_HOSTS: ",".join(order.lost_hosts),
    }
    console.flush_streams()  # all processes would write what is still buffered
    for local_rank in range(order.ranks):
        pid = _fork(start)
        rank = order.first_rank + local_rank
        if pid:
            start.running[pid] = rank
            start.pids[rank] = pid
            continue
        own = {"RANK": rank, "LOCAL_RANK": local_rank}
        if forker.orders is not None:
            forker.orders.socket.close()
        if listener is not None and rank == 0:
            own[launcher_env.MASTER_FD] = listener.fileno()
        elif listener is not None:
            listener.close()
        forker.env.update({key: str(value) for key, value in {**common, **own}.items()})
        _become_rank(launcher, forker.mask, forker.name)
        _run_rank(forker.run_rank, forker.env, own.get(launcher_env.MASTER_FD), threads)
    return start


def _fork(start: RankStart) -> int:
    """Returns the process id of a fork, 0 in the fork; ends the ranks that are there if there can be no further one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about forks with threads: see SAFE_THREADS
            return os.fork()
    except OSError as error:
        start.send(signal.SIGKILL)
        raise process_limit.start_error() from error


def _become_rank(launcher: int, mask: set[signal.Signals], name: bytes) -> None:
    """Gives this fork what a newly started program has: a session, default signals, a name."""
    os.setsid()
    linux_process.send_on_parent_death()  # until it watches its launcher itself: launcher_watch.py
    if os.getppid() != launcher:
        os._exit(TopologyError.exit_code)
    linux_process.name_process(name)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_rank(
    run_rank: Callable[[], int], env: MutableMapping[str, str], master_fd: int | None, threads: list[str]
) -> NoReturn:
    """Runs the rank and ends its process; as a new program if a thread of the launcher is missing in this fork."""
    code = 1
    try:
        if threads:
            if master_fd is not None:
                os.set_inheritable(master_fd, True)
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # else all ranks would draw the same numbers, in code of the user
        code = run_rank()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - this is the outermost handler of the process
        traceback.print_exc()
    finally:
        console.flush_streams()
        os._exit(code)


def other_threads() -> list[str]:
    """Returns the names of this process's threads that a fork would lose; a lock that one holds would stay locked."""
    tasks = Path("/proc/self/task")
    names = [_read(task / "comm") for task in tasks.iterdir() if task.name != str(os.getpid())]
    return [name for name in names if name and name not in SAFE_THREADS]


# ---------------------------------------------------------------- waiting for their end


def block_signals() -> tuple[set[signal.Signals], set[signal.Signals]]:
    """Blocks the signals that this process waits for, until it ends: none is missed, and none needs a handler.

    Returns:
        The signals to wait for, and the mask from before.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, no exit code is kept
    # nohup ignores SIGHUP, and a shell SIGINT in the background: they must stay ignored.
    waited = {
        signal.SIGCHLD,
        signal.SIGIO,
        *(each for each in STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN),
    }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    return waited, {signal.Signals(number) for number in mask}


def _wait(start: RankStart, signals: set[signal.Signals], orders: Orders | None) -> tuple[bool, bool]:
    """Waits until all ranks have ended. Ends those that do not end by themselves after another has failed.

    Returns:
        Whether a signal told the job to stop, and whether the coordinator had the ranks killed.
    """
    was_stopped, was_killed, next_number, deadline = False, False, signal.SIGTERM, float("inf")
    while start.running:
        remaining_s = min(deadline - time.monotonic(), 60.0)
        info = signal.sigtimedwait(signals, max(remaining_s, 0.0))
        if info is not None and info.si_signo in STOP_SIGNALS:
            was_stopped = True
            start.send(info.si_signo)
        if orders is not None and orders.take_stop():
            was_killed = True
            start.send(signal.SIGKILL)
        _collect(start)
        if deadline == float("inf") and start.failures(PATIENT_CODES):
            deadline = time.monotonic() + SETTLE_S
        elif time.monotonic() > deadline:
            start.send(next_number)
            next_number, deadline = signal.SIGKILL, time.monotonic() + TERM_S
    return was_stopped, was_killed


def _collect(start: RankStart) -> None:
    """Collects the processes that have ended, helpers of dead ranks included."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        rank = start.running.pop(pid, None)
        if rank is not None:
            start.codes[rank] = os.waitstatus_to_exitcode(status)


def end_descendants(linger_s: float | None = None) -> None:
    """Waits LINGER_S, or this long, for helper processes that dead ranks have left, and kills those that stay."""
    deadline = time.monotonic() + (LINGER_S if linger_s is None else linger_s)
    while left := _children(os.getpid()):
        if time.monotonic() > deadline:
            for pid in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        _collect(RankStart())
        time.sleep(0.01)
        if time.monotonic() > deadline + LINGER_S:  # the kernel does not end it: a dead disk
            return


def _children(pid: int) -> list[int]:
    listings = [_read(task / "children") for task in Path(f"/proc/{pid}/task").iterdir()]
    return [int(child) for listing in listings for child in listing.split()]


def process_name() -> bytes:
    return _read(Path("/proc/self/comm")).encode()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""

"""Runs the ranks of one node as forks of this process, and starts them again after a failure: `--ranks N`.

Forked and not spawned, because everything is imported once for all ranks and all restarts (a rank is there 0.1 s after its
start, not 4 s), and that is safe as long as this process has no thread, no CUDA context and no process group: preload.py
only imports, `other_threads` checks, and where a thread exists nevertheless, ranks are started as new programs.

A rank sees the variables of torchrun, is in a session of its own, and handles signals itself. This process only waits.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dtrain import console
from dtrain.cluster.remote_supervisor import stamp
from dtrain.console import log
from dtrain.distributed import launcher_env, linux_process, network, process_limit
from dtrain.distributed.launcher_env import NodePlace
from dtrain.distributed.topology import SINGLE
from dtrain.distributed.torchrun_agent import LAUNCHER_NAME
from dtrain.errors import CheckpointError, ConfigError, DataError, Preempted, TopologyError
from dtrain.job.failure import interrupted_early
from dtrain.job.forked_outcome import (
    RankStart,
    describe_first_failure,
    final_message,
    job_code,
    read_exit,
)

FINAL_CODES = (0, ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code, Preempted.exit_code)
"""Exit codes after which the ranks are not started again: the same error would come again, or all is saved."""

PATIENT_CODES = (0, Preempted.exit_code)
"""Exit codes of one rank after which the others may take as long as they need."""

SETTLE_S = 5.0
"""Time for the other ranks to end by themselves after one has failed; they notice at once, and report it."""

TERM_S = 3.0
"""Time from SIGTERM to SIGKILL for a rank that has not ended by then."""

LINGER_S = 2.0
"""Time for helper processes of ranks to end by themselves before this process ends: a monitor may still write."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that are passed on to all ranks."""

SAFE_THREADS = ("jemalloc_bg_thd",)
"""Names of threads that may exist before a fork: jemalloc (in pyarrow) takes its locks before and starts it again after."""


@dataclass(frozen=True)
class RankLaunch:
    """What to start.

    Attributes:
        ranks: number of ranks on this node.
        node: this node's place in the job.
        max_restarts: how often they are started again after a failure.
        exit_file: exit.json of the run folder; None for a command that writes none.
        preload: imports what the ranks will import.
        run_rank: runs a rank in its process and returns its exit code.
    """

    ranks: int
    node: NodePlace
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
        TopologyError: a rank could not be started.
    """
    own_name = _process_name()
    linux_process.name_process(LAUNCHER_NAME.encode())
    linux_process.adopt_orphans()  # what a killed rank leaves behind becomes ours, and ends with us
    gc.disable()  # imports leave next to nothing to collect
    with _interruptible():
        launch.preload()
        signals, mask = _block_signals()
    gc.freeze()  # the ranks' garbage collections would copy every shared page
    gc.enable()
    # Nodes that launch/dtrain.sh has started share a token of their own: launcher_env.JOB_ID.
    run_id, restart = f"dtrain-{secrets.token_hex(8)}" if launch.node.num_nodes == 1 else "dtrain", 0
    while True:
        old_stamp = stamp(launch.exit_file)
        start = _start_all(launch, env, run_id=run_id, restart=restart, mask=mask, name=own_name)
        was_stopped = _wait(start, signals)
        record = read_exit(launch.exit_file, old_stamp)
        code = job_code(start, record)
        if was_stopped or code in FINAL_CODES or restart == launch.max_restarts:
            break
        restart += 1
        log.warning(
            "%s All %d ranks start again: restart %d of %d.",
            describe_first_failure(start),
            launch.ranks,
            restart,
            launch.max_restarts,
        )
    _end_descendants()
    if (message := final_message(start, record)) is not None and code != Preempted.exit_code:
        log.error("%s", message)
    return code


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


# ---------------------------------------------------------------- starting ranks


def _start_all(
    launch: RankLaunch,
    env: MutableMapping[str, str],
    *,
    run_id: str,
    restart: int,
    mask: set[signal.Signals],
    name: bytes,
) -> RankStart:
    """Forks all ranks. Rank 0 inherits the socket where they meet, so that its port is free and stays so."""
    start, launcher, threads = RankStart(), os.getpid(), other_threads()
    if threads:
        log.warning("Ranks are started as new programs, which takes longer: a thread (%s) runs already.", threads[0])
    node = launch.node
    with _master_socket(node) as listener:
        common = {
            "WORLD_SIZE": node.world_size,
            "LOCAL_WORLD_SIZE": launch.ranks,
            "GROUP_RANK": node.node_rank,
            "GROUP_WORLD_SIZE": node.num_nodes,
            **({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": listener.getsockname()[1]} if listener is not None else {}),
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_RESTART_COUNT": restart,
            "TORCHELASTIC_MAX_RESTARTS": launch.max_restarts,
            launcher_env.LAUNCHER_PID: launcher,
        }
        console.flush_streams()  # all processes would write what is still buffered
        for local_rank in range(launch.ranks):
            pid = _fork(start)
            rank = node.first_rank + local_rank
            if pid:
                start.running[pid] = rank
                start.pids[rank] = pid
                continue
            own = {"RANK": rank, "LOCAL_RANK": local_rank}
            if listener is not None and rank == 0:
                own[launcher_env.MASTER_FD] = listener.fileno()
            env.update({key: str(value) for key, value in {**common, **own}.items()})
            if listener is not None and rank > 0:
                listener.close()
            _become_rank(launcher, mask, name)
            _run_rank(launch.run_rank, env, own.get(launcher_env.MASTER_FD), threads)
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


def _master_socket(node: NodePlace) -> AbstractContextManager[socket.socket | None]:
    """Opens the socket where the ranks of one machine meet. On several, rank 0 opens it on the port that was chosen."""
    return network.listen("127.0.0.1", 0) if node.num_nodes == 1 else nullcontext()


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


def _block_signals() -> tuple[set[signal.Signals], set[signal.Signals]]:
    """Blocks the signals that this process waits for, until it ends: none is missed, and none needs a handler.

    Returns:
        The signals to wait for, and the mask from before.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, no exit code is kept
    # nohup ignores SIGHUP, and a shell SIGINT in the background: they must stay ignored.
    waited = {signal.SIGCHLD, *(each for each in STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    return waited, {signal.Signals(number) for number in mask}


def _wait(start: RankStart, signals: set[signal.Signals]) -> bool:
    """Waits until all ranks have ended. Ends those that do not end by themselves after another has failed.

    Returns:
        Whether a signal told the job to stop.
    """
    was_stopped, next_number, deadline = False, signal.SIGTERM, float("inf")
    while start.running:
        remaining_s = min(deadline - time.monotonic(), 60.0)
        info = signal.sigtimedwait(signals, max(remaining_s, 0.0))
        if info is not None and info.si_signo != signal.SIGCHLD:
            was_stopped = True
            start.send(info.si_signo)
        _collect(start)
        if deadline == float("inf") and start.failures(PATIENT_CODES):
            deadline = time.monotonic() + SETTLE_S
        elif time.monotonic() > deadline:
            start.send(next_number)
            next_number, deadline = signal.SIGKILL, time.monotonic() + TERM_S
    return was_stopped


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


def _end_descendants() -> None:
    """Waits for helper processes that dead ranks have left, and kills those that stay."""
    deadline = time.monotonic() + LINGER_S
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


def _process_name() -> bytes:
    return _read(Path("/proc/self/comm")).encode()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""

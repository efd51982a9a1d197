"""The limit of processes and threads of a user or container: checked at the start, and named where it is hit.

Root is exempt from RLIMIT_NPROC, so what root has tested may fail for an ordinary user.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from dtrain.console import log
from dtrain.distributed.control_groups import control_groups, read_text
from dtrain.errors import TopologyError

MIN_THREADS = 8
"""What every rank starts besides threads for computing: its monitor, the heartbeat of run.lock, a watcher of signals, ..."""

MAX_PROBED = 512
"""Threads that are tried at most: it takes 20 us for each of them."""

LIBRARY_THREADS = ("OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
"""Libraries that start a thread for each core, and end or interrupt the process if they cannot."""


def check_process_limit(env: MutableMapping[str, str], *, local_world_size: int) -> None:
    """Checks that this rank can start the threads that it needs. Call it before the heavy libraries are imported.

    Args:
        env: os.environ. Where the limit is tight, variables that limit libraries to one thread are set in it.

    Raises:
        TopologyError: it cannot.
    """
    _raise_soft_limit()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = env.get("OMP_NUM_THREADS", "")
    computing = int(text) if text.isdecimal() and int(text) else max(cores // local_world_size, 1)
    needed = MIN_THREADS + computing - 1
    available = _count_available(min(needed + cores, MAX_PROBED))
    if available < min(needed, MAX_PROBED):
        raise TopologyError(
            f"Only {available} more processes and threads can be started on {socket.gethostname()}, but a rank needs {needed} "
            f"of them, {computing} for computing. {_limits()}"
        )
    if available < min(needed + cores, MAX_PROBED) and any(name not in env for name in LIBRARY_THREADS):
        log.warning("Few processes and threads are left: libraries get one thread. %s", _limits())
        for name in LIBRARY_THREADS:
            env.setdefault(name, "1")


def process_limit_error(error: BaseException) -> TopologyError | None:
    """Returns what to report instead of an error that says only that a process or thread could not be started."""
    text = str(error)
    is_fork = isinstance(error, OSError) and error.errno == errno.EAGAIN and error.filename is None
    is_thread = "can't start new thread" in text or text == os.strerror(errno.EAGAIN)
    is_pool = "ThreadPoolBuildError" in text  # of Rust libraries: the tokenizers
    if not (is_fork or is_thread or is_pool):
        return None
    return start_error()


def start_error() -> TopologyError:
    """Returns the error of a process or thread that could not be started."""
    return TopologyError(f"A process or thread could not be started on {socket.gethostname()}. {_limits()}")


def _raise_soft_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS refuses values above its own limit
            resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))


def _count_available(wanted: int) -> int:
    """Returns how many threads can be started now, up to `wanted`."""
    done, threads = threading.Event(), []
    try:
        for _ in range(wanted):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError):
        pass
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return len(threads)


def _limits() -> str:
    """Returns the limits that apply here, and how to raise them or need less."""
    limits, cures = [], []
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    if os.geteuid() and hard != resource.RLIM_INFINITY:
        running = _count_threads()
        limits.append(
            f"the limit of this user's processes and threads is {hard} (ulimit -u)"
            + (f", and {running} of any program run now" if running else "")
        )
        cures.append("nproc in /etc/security/limits.conf, LimitNPROC= of a service, docker run --ulimit nproc=65536")
    if (pids := _container_limit()) is not None:
        limits.append(f"the limit of this container or session is {pids} (pids.max)")
        cures.append("docker run --pids-limit 65536, TasksMax= of a service or of user-.slice")
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        limits.append(f"the limit of address space is {space >> 20} MiB (ulimit -v)")
        cures.append("ulimit -v unlimited")
    found = (
        f"Here {'; '.join(limits)}"
        if limits
        else "The system's own limit is reached (kernel.threads-max, kernel.pid_max)"
    )
    cures = cures or ["sysctl kernel.threads-max and kernel.pid_max"]
    return f"{found}. Raise it: {'; '.join(cures)}. Or start fewer: OMP_NUM_THREADS=1, fewer data.workers, fewer ranks here."


def _count_threads() -> int:
    """Returns how many threads this user's processes have; 0 without /proc."""
    count, user = 0, os.getuid()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == user:
                count += len(os.listdir(process / "task"))  # noqa: PTH208 - the entries are not files to open
    return count


def _container_limit(root: Path = Path("/")) -> int | None:
    """Returns the smallest pids.max of this process's control groups; None without one.

    Args:
        root: folder that holds proc/ and sys/; another one in tests.
    """
    texts = [read_text(folder / "pids.max").strip() for folders in control_groups("pids", root) for folder in folders]
    return min((int(text) for text in texts if text.isdecimal()), default=None)

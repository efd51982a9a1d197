"""Runs a function on several gloo ranks, for tests: `run_ranks(function, 3, argument)`.

Ranks meet in a file, never at a port. They are forked from a server that has imported torch, transformers and DeepSpeed
once (nothing else runs in it), so that a run costs tens of milliseconds; each runs on one thread. The earliest failure is
the one reported: the others only say that a connection was closed; ranks that hang are shown with their stacks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from dtrain.distributed.process_group import process_group
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import SINGLE, Topology

PRELOADED = (
    "pytest",
    "sklearn.metrics",
    "tests.support.training",
    "tests.support.whole_runs",
    # An engine imports these when it is built, so every rank would pay for them: 0.2 s of CPU time for DDP, and 1.2 s for
    # ZeRO, whose optimizer check imports torch's compiler.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "distutils.ccompiler",
    "dtrain.engine.ddp",
    "dtrain.engine.deepspeed",
    "dtrain.engine.fsdp",
    "transformers.models.bert.modeling_bert",
    __name__,
)
"""What the server imports before it forks the first rank; a module that is not installed is left out."""

GRACE_S = 5.0
"""How long the others may go on when one rank has failed."""


class RanksFailed(AssertionError):
    """What went wrong first, on which rank, and who finished."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """`function(context, *args)` on `world_size` ranks of one node; its JSON results in rank order.

    Args:
        function: at module level, since each rank imports it by name.
        args: anything that pickles.
        timeout_s: hard limit for everything.

    Raises:
        RanksFailed: a rank raised, died, or did not finish in time.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        home = Path(folder)
        processes = [
            context.Process(target=_rank, args=(function, rank, world_size, args, folder, timeout_s, dict(os.environ)))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, home, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [json.loads((home / f"result-{rank}").read_text()) for rank in range(world_size)]


def _wait(processes: list[BaseProcess], home: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        failed = any(home.glob("failure-*")) or any(process.exitcode not in (None, 0) for process in processes)
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            break
        for process in processes:
            process.join(timeout=0.02)
    failures = sorted(
        (json.loads(path.read_text()) for path in home.glob("failure-*")), key=lambda entry: entry["time"]
    )
    finished = [rank for rank in range(len(processes)) if (home / f"result-{rank}").exists()]
    if failures:
        first = failures[0]
        raise RanksFailed(f"rank {first['rank']} failed first (finished: {finished}):\n{first['traceback']}")
    if len(finished) < len(processes) or any(process.exitcode for process in processes):
        codes = {rank: process.exitcode for rank, process in enumerate(processes)}
        stacks = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(home.glob("stack-*")))
        raise RanksFailed(
            f"not all ranks ended well within {timeout_s:g} s; finished: {finished}; exit codes: {codes}\n{stacks}"
        )


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    folder: str,
    timeout_s: float,
    env: dict[str, str],
) -> None:
    """One rank, from its fork to its end."""
    os.environ.clear()
    os.environ.update(env, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    # The last resort, should the parent itself be killed. (A daemonic process would do, but may not have children.)
    threading.Timer(timeout_s + 10.0, os._exit, args=(1,)).start()
    home = Path(folder)
    topology = Topology(rank, world_size, rank, world_size, 0, 1, "env", None, None) if world_size > 1 else SINGLE
    with (home / f"stack-{rank}").open("w") as stack:
        # The parent ends the ranks so long after it began to start them, and this rank may have started late.
        faulthandler.dump_traceback_later(timeout_s * 0.6, file=stack)
        try:
            store = FileStore(str(home / "store"), world_size)
            with process_group(topology, os.environ, timeout_s=timeout_s, store=store) as ready:
                try:
                    _write(home / f"result-{rank}", json.dumps(function(RankContext(ready), *args)))
                except BaseException:  # noqa: BLE001 - reported by the parent
                    _fail(home, rank)  # at once: leaving the group takes time, and the first failure is the cause
        except BaseException:  # noqa: BLE001 - reported by the parent
            _fail(home, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    # A plain return runs torch's teardown at interpreter shutdown, which aborts now and then.
    os._exit(0)


def _fail(home: Path, rank: int) -> NoReturn:
    failure = {"rank": rank, "time": time.monotonic(), "traceback": traceback.format_exc()}
    _write(home / f"failure-{rank}", json.dumps(failure))
    os._exit(1)


def _write(path: Path, text: str) -> None:
    """Whole or not at all, since the parent looks at any time."""
    draft = path.with_name(f"draft-{path.name}")
    draft.write_text(text)
    draft.rename(path)

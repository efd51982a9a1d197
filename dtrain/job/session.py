"""The context of every command: starts the monitor, imports the heavy libraries, then waits for all ranks.

Heavy libraries are imported inside functions: the monitor is forked before torch is loaded, which saves 80 MiB per
rank.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from dtrain.config.schema import Config
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.process_info import ProcessIdentity, this_process
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import telling_peers
from dtrain.distributed.topology import Topology
from dtrain.errors import TopologyError
from dtrain.job.failure import JobSession, lost_peer_error
from dtrain.job.imports import without_collections
from dtrain.job.watchdog.client import WatchdogClient, start_watchdog
from dtrain.job.watchdog.rules import HangSettings

KEPT_KERNELS = "64"
"""The default of 1024 took 0.4 GB, and 2 GB before the heap was trimmed, where each batch had another number of tokens."""


@contextmanager
def session(
    config: Config, topology: Topology, env: MutableMapping[str, str], *, command: str = "train"
) -> Iterator[JobSession]:
    """Collective. Yields the job with its complete topology, watched by a separate process. Imports torch.

    Args:
        env: os.environ; the variables that libraries read the rank from are set in it.
        command: name of the command; all ranks must run the same.
    """
    settings = HangSettings(config.train.hang_timeout or None, compiles=bool(config.model.compile))
    with (
        start_watchdog(topology.rank, settings, config.run_dir, topology.launcher_error_file) as watchdog,
        _join_group(config, topology, env, watchdog, command=command) as job,
    ):
        yield job


@contextmanager
def _join_group(
    config: Config, topology: Topology, env: MutableMapping[str, str], watchdog: WatchdogClient, *, command: str
) -> Iterator[JobSession]:
    """Collective. Yields the job with its complete topology, after the process group has formed.

    Args:
        env: os.environ; the variables that libraries read the rank from are set in it.
        watchdog: connects this rank's monitor to the others.

    Raises:
        TopologyError: the ranks have not met; or one of them died before they had exchanged their processes, or at the
            end.
    """
    # In a notebook torch may be loaded, with objects that become garbage later.
    with without_collections(keep="torch" not in sys.modules):
        from dtrain.distributed.collectives import all_gather_object, is_lost_peer, job_store, on_main
        from dtrain.distributed.process_group import process_group
        from dtrain.job import rank_checks
        from dtrain.job.cpu_sharing import set_threads, share_cores

        set_threads(topology, env)
        _limit_kernels(config, env)
        if config.engine.bitwise:
            env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may add in another order in each run
        _silence_libraries(env)
    run = {"command": command, "run folder": str(config.run_dir)}
    watchdog.heartbeat.on_run_dir_lost = lambda reason: _report_lost_run_dir(reason, watchdog)
    job: JobSession | None = None
    try:
        with process_group(topology, env, timeout_s=config.run.startup_timeout_s, run=run) as complete:
            context = RankContext(complete, watchdog.heartbeat)
            share_cores(context, env, bind=config.run.bind_cores)
            processes = [ProcessIdentity(*values) for values in all_gather_object(this_process(), context)]
            job = JobSession(context, job_store(context), processes, watchdog)
            rank_checks.compare_software(context, processes)
            rank_checks.compare_clocks(context, processes)
            rank_checks.compare_devices(context, processes)
            rank_checks.compare_configs(config, context, processes)
            if context.world_size == 1:
                watchdog.watch_single_rank()
            else:
                watchdog.join(on_main(lambda: watchdog.start_coordinator(complete), context))
            with telling_peers(watchdog.pass_on_signal):
                yield job
            context.heartbeat.at(Phase.FINISHING)
    except RuntimeError as error:  # not from the command, whose errors are reported before
        if topology.world_size == 1 or not is_lost_peer(error):
            raise
        raise lost_peer_error(error, topology, job) from error


def _report_lost_run_dir(reason: str, watchdog: WatchdogClient) -> None:
    """Tells the monitor why this rank is about to end, and waits until it has read that: it must not report a death."""
    watchdog.report_failure(reason, TopologyError.exit_code, by_signal=False)
    watchdog.close()


def _limit_kernels(config: Config, env: MutableMapping[str, str]) -> None:
    """Limits the compiled kernels that oneDNN keeps in memory, if it computes linear layers, unless the user has.

    It keeps one for each shape. torch and oneDNN read these variables at the first call of oneDNN.
    """
    from dtrain.models.fast_linear import is_on

    if config.engine.precision == "fp32" and is_on(config.model.fast_linear):
        for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            env.setdefault(name, KEPT_KERNELS)


def _silence_libraries(env: MutableMapping[str, str]) -> None:
    """Silences progress bars and advice of libraries, which would hide our log on every rank."""
    import datasets
    import torch
    import transformers

    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)

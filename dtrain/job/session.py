"""What surrounds every command: the monitor first, then the heavy imports, then the ranks' meeting.

Heavy libraries are imported inside functions: the monitor is forked before torch is there, which saves 80 MiB a rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from dtrain.config.schema import Config
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import Topology
from dtrain.errors import TopologyError
from dtrain.job.failure import Job, Peer, of_lost_peer, own_peer
from dtrain.job.watchdog.client import Watch, watching
from dtrain.job.watchdog.rules import Rules


@contextmanager
def session(
    config: Config, topology: Topology, env: MutableMapping[str, str], *, command: str = "train"
) -> Iterator[Job]:
    """Collective. Yields the job with its complete topology, watched by a process of its own. Imports torch on the way.

    Args:
        env: os.environ; what libraries read of the topology is set in it.
    """
    rules = Rules(config.train.hang_timeout or None, compiles=bool(config.model.compile))
    with (
        watching(topology.rank, rules, config.run_dir) as watch,
        _in_group(config, topology, env, watch, command=command) as job,
    ):
        yield job


@contextmanager
def _in_group(
    config: Config, topology: Topology, env: MutableMapping[str, str], watch: Watch, *, command: str
) -> Iterator[Job]:
    """Collective. Yields the job with its complete topology; its group has formed where there is more than one rank.

    Args:
        env: os.environ; what libraries read of the topology is set in it.
        watch: this rank's monitor, which is told where the others' are.

    Raises:
        TopologyError: the ranks have not met; or one was gone before they were told of each other, or as they parted.
    """
    from dtrain.distributed.collectives import all_gather_object, is_lost_peer, job_board, on_main
    from dtrain.distributed.process_group import process_group
    from dtrain.job import rank_checks
    from dtrain.job.cpu_sharing import set_threads, share_cores

    set_threads(topology, env)
    _quieten_libraries(env)
    run = {"command": command, "run folder": str(config.run_dir)}
    watch.heartbeat.on_disowned = lambda words: _say_disowned(words, watch)
    job: Job | None = None
    try:
        with process_group(topology, env, timeout_s=config.run.startup_timeout_s, run=run) as complete:
            ready = RankContext(complete, watch.heartbeat)
            share_cores(ready, env, bind=config.run.bind_cores)  # the roll-call has learned who shares this node
            peers = [Peer(*peer) for peer in all_gather_object(own_peer(), ready)]
            job = Job(ready, job_board(ready), peers, watch)
            rank_checks.compare_software(ready, peers)
            rank_checks.compare_clocks(ready, peers)
            rank_checks.compare_configs(config, ready, peers)
            if ready.world_size == 1:
                watch.alone()
            else:
                watch.join(on_main(lambda: watch.serve(complete), ready))
            yield job
            ready.heartbeat.at(Phase.FINISHING)
    except RuntimeError as error:  # not of the command, whose errors come here reported
        if topology.world_size == 1 or not is_lost_peer(error):
            raise
        raise of_lost_peer(error, topology, job) from error


def _say_disowned(words: str, watch: Watch) -> None:
    """This rank's folder is another job's. Its monitor has read so when it is gone, and does not take it for a death."""
    watch.failing(words, TopologyError.exit_code, by_signal=False)
    watch.close()


def _quieten_libraries(env: MutableMapping[str, str]) -> None:
    """Their progress bars and advice would drown ours, on every rank."""
    import datasets
    import torch
    import transformers

    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
